"""The loop of the engine: schedule, run, postprocess. For now with static batches; lesson 02 makes them continuous.

A wave of requests gets a cache; each prompt is prefilled by itself, then all of the wave decode together until the
last has finished. The engine knows tokens and requests, and nothing of texts beyond the stop strings.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from minillm.engine.request import Piece, Request
from minillm.kv.contiguous import ContiguousCache
from minillm.model.batch import Batch, Chunk
from minillm.model.cost import pass_cost
from minillm.model.decoder import Decoder
from minillm.model.sampling import sample
from minillm.trace.allocations import peak_of
from minillm.trace.life import Event
from minillm.trace.recorder import Recorder
from minillm.trace.trace import Category, Kind

MAX_RUNNING = 16


class Engine:
    """Runs requests on one decoder. `recorder` gets a span for each step, and the memory that the run holds."""

    def __init__(
        self, model: Decoder, requests: list[Request], recorder: Recorder, max_running: int = MAX_RUNNING
    ) -> None:  # fmt: skip
        self.model = model
        self.recorder = recorder
        self.waiting = list(requests)
        self.max_running = max_running
        self.slots: dict[int, Request] = {}  # slot of the cache -> request, prefilled or not
        self.cache: ContiguousCache | None = None
        recorder.trace.lives += [request.life for request in requests]
        recorder.memory(Category.WEIGHTS, sum(parameter.nbytes for parameter in model.parameters()))

    def run(self) -> Iterator[Piece]:
        """Step until every request has finished; yields what each step added."""
        while self.waiting or self.slots:
            yield from self.step()

    def step(self) -> list[Piece]:
        """One turn of the loop."""
        batch = self.schedule()
        self.recorder.step += 1
        with self._span(batch):
            tokens = self.compute(batch)
        return self.postprocess(batch, tokens)

    def schedule(self) -> Batch:
        """The next batch: one prompt that is not in the cache yet, else one token of every running request."""
        if not self.slots:
            self._admit()
        for slot, request in self.slots.items():
            if not request.token_ids:
                request.life.note(Event.STARTED, time.monotonic())
                return Batch((Chunk(slot, 0, tuple(request.prompt)),))
        return Batch(tuple(Chunk(slot, r.length - 1, (r.token_ids[-1],)) for slot, r in self.slots.items()))

    def compute(self, batch: Batch) -> list[int]:
        """One forward pass and the tokens it gives, in the batch's order."""
        if not self.recorder.activations:
            return self.sample(batch, self.model(batch, self.cache))
        began_s = self.recorder.now_s()
        logits, peak = peak_of(lambda: self.model(batch, self.cache), self.model.device)
        self.recorder.memory(Category.ACTIVATIONS, peak, began_s)
        self.recorder.memory(Category.ACTIVATIONS, 0)
        return self.sample(batch, logits)

    def sample(self, batch: Batch, logits: torch.Tensor) -> list[int]:
        """The next token of every chunk's request."""
        requests = [self.slots[chunk.slot] for chunk in batch.chunks]
        return [sample(row, r.params, r.seed, r.index, r.length) for row, r in zip(logits, requests)]

    def postprocess(self, batch: Batch, tokens: list[int]) -> list[Piece]:
        """Hand every request its token; those that finished leave their slot."""
        now = time.monotonic()
        pieces = [self.slots[chunk.slot].append(token, now) for chunk, token in zip(batch.chunks, tokens)]
        self.slots = {slot: request for slot, request in self.slots.items() if request.finish_reason is None}
        return pieces

    def _admit(self) -> None:
        """Start the next wave, with a cache that holds its longest sequence."""
        wave, self.waiting = self.waiting[: self.max_running], self.waiting[self.max_running :]
        self.slots = dict(enumerate(wave))
        longest = max(request.longest for request in wave)
        self.cache = ContiguousCache(self.model.config, len(wave), longest, self.model.device, self.model.dtype)
        self.recorder.memory(Category.KV_CACHE, self.cache.bytes)

    def _span(self, batch: Batch) -> AbstractContextManager[object]:
        """The span of a step, with what it costs by formula."""
        kind = Kind.PREFILL if batch.chunks[0].start == 0 else Kind.DECODE
        cost = pass_cost(self.model.config, batch, self.model.dtype.itemsize).total
        return self.recorder.span(
            kind,
            kind.value,
            tokens=len(batch.token_ids),
            request_ids=tuple(self.slots[chunk.slot].index for chunk in batch.chunks),
            flops=cost.flops,
            memory_bytes=cost.memory_bytes,
        )
