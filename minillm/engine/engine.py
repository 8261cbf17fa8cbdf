"""The loop of the engine: schedule, run, postprocess. For now with static batches; lesson 02 makes them continuous.

A wave of requests gets a cache; each prompt is prefilled by itself, then all of the wave decode together until the
last has finished. The engine knows tokens and requests, and nothing of texts beyond the stop strings.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from minillm.engine.request import Piece, Request
from minillm.kv.contiguous import ContiguousCache
from minillm.model.batch import Batch, Chunk
from minillm.model.decoder import Decoder
from minillm.model.sampling import sample
from minillm.trace.trace import Kind, Span, Trace

MAX_RUNNING = 16


class Engine:
    """Runs requests on one decoder. `trace` holds a span for each step."""

    def __init__(self, model: Decoder, requests: list[Request], max_running: int = MAX_RUNNING) -> None:
        self.model = model
        self.waiting = list(requests)
        self.max_running = max_running
        self.slots: dict[int, Request] = {}  # slot of the cache -> request, prefilled or not
        self.cache: ContiguousCache | None = None
        self.trace = Trace()

    def run(self) -> Iterator[Piece]:
        """Step until every request has finished; yields what each step added."""
        while self.waiting or self.slots:
            yield from self.step()

    def step(self) -> list[Piece]:
        """One turn of the loop."""
        batch = self.schedule()
        began = time.monotonic()
        logits = self.model(batch, self.cache)
        return self.postprocess(batch, logits, began)

    def schedule(self) -> Batch:
        """The next batch: one prompt that is not in the cache yet, else one token of every running request."""
        if not self.slots:
            self._admit()
        for slot, request in self.slots.items():
            if not request.token_ids:
                return Batch((Chunk(slot, 0, tuple(request.prompt)),))
        return Batch(tuple(Chunk(slot, r.length - 1, (r.token_ids[-1],)) for slot, r in self.slots.items()))

    def postprocess(self, batch: Batch, logits: torch.Tensor, began_s: float) -> list[Piece]:
        """Sample a token for every chunk; requests that finished leave their slot."""
        requests = [self.slots[chunk.slot] for chunk in batch.chunks]
        tokens = [sample(row, r.params, r.seed, r.index, r.length) for row, r in zip(logits, requests)]
        now = time.monotonic()
        pieces = [request.append(token, now) for request, token in zip(requests, tokens)]
        prefill = batch.chunks[0].start == 0
        kind = Kind.PREFILL if prefill else Kind.DECODE
        self.trace.add(Span(0, kind, kind.value, began_s, now, len(batch.token_ids), tuple(r.index for r in requests)))
        self.slots = {slot: request for slot, request in self.slots.items() if request.finish_reason is None}
        return pieces

    def _admit(self) -> None:
        """Start the next wave, with a cache that holds its longest sequence."""
        wave, self.waiting = self.waiting[: self.max_running], self.waiting[self.max_running :]
        self.slots = dict(enumerate(wave))
        longest = max(request.longest for request in wave)
        self.cache = ContiguousCache(self.model.config, len(wave), longest, self.model.device, self.model.dtype)
