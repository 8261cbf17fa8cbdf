"""The loop of the engine: schedule, run, postprocess. It serves many requests at once on one decoder.

What goes into a step is decided in `policy/scheduler.py`; where K and V lie, in `policy/blocks.py`. The engine knows
tokens and requests, and nothing of texts beyond the stop strings. One thread at a time may use it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from minillm.engine.request import Piece, Request, with_twins
from minillm.kv.paged import PagedCache
from minillm.model.cost import pass_cost
from minillm.model.decoder import Decoder
from minillm.model.sampling import sample
from minillm.policy.batch import Batch
from minillm.policy.blocks import BlockPool
from minillm.policy.options import EngineOptions
from minillm.policy.scheduler import Order, Scheduler, first_come
from minillm.trace.allocations import peak_of
from minillm.trace.life import Event
from minillm.trace.recorder import Recorder
from minillm.trace.trace import Category, Kind

CPU_CACHE_BYTES = 2**30
GPU_CACHE_SHARE = 0.8


class Engine:
    """Runs requests on one decoder. `recorder` gets a span for each step, and the memory that the run holds."""

    def __init__(
        self, model: Decoder, options: EngineOptions, recorder: Recorder, order: Order = first_come
    ) -> None:  # fmt: skip
        self.model = model
        self.options = options
        blocks = options.num_blocks or default_num_blocks(model, options)
        self.scheduler = Scheduler(BlockPool(blocks, options.block_size, options.prefix_reuse), options, order)
        self.cache = PagedCache(model.config, blocks, options.block_size, model.device, model.dtype)
        self.requests: dict[int, Request] = {}
        self.failed: frozenset[int] = frozenset()  # who was in the last step that ended in an error
        self.record(recorder)

    def record(self, recorder: Recorder) -> None:
        """Let `recorder` have what happens from now on."""
        self.recorder = recorder
        recorder.memory(Category.WEIGHTS, sum(parameter.nbytes for parameter in self.model.parameters()))

    def add(self, requests: Sequence[Request], arrived_s: float | None = None) -> None:
        """Let requests wait that came at `arrived_s`, or now; all of them or, with a `ValueError` for one that can never
        run, none.
        """
        for request in requests:
            self.scheduler.check(request.scheduled)
        when = time.monotonic() if arrived_s is None else arrived_s
        for request in requests:
            request.scheduled.arrival_s = when
            self.scheduler.add(request.scheduled)
            self._enter(request)
            request.life.note(Event.ARRIVED, when)

    def run(self) -> Iterator[Piece]:
        """Step until every request has finished; yields what each step added."""
        while self.requests:
            yield from self.step()

    def step(self) -> list[Piece]:
        """One turn of the loop."""
        try:
            batch = self.schedule()
            with self._span(batch):
                tokens = self.compute(batch)
            return self.postprocess(batch, tokens)
        except BaseException:  # such as the stop button: who was in the step is computed again
            self.failed = self.scheduler.recover()
            raise

    def schedule(self) -> Batch:
        """The next batch; what it means to the lives of requests is noted."""
        now = time.monotonic()
        batch = self.scheduler.schedule(now)
        self.recorder.step += 1
        for request_id in batch.preempted:
            self.requests[request_id].life.note(Event.PREEMPTED, now)
        for chunk in batch.chunks:
            request = self.requests[chunk.request_id]
            last = request.life.moments[-1][0]
            if last is Event.ARRIVED:
                request.life.reused_tokens = chunk.start
            if last in (Event.ARRIVED, Event.PREEMPTED):
                request.life.note(Event.STARTED, now)
        self._note_cache()
        return batch

    def compute(self, batch: Batch) -> list[list[int]]:
        """One forward pass and the tokens it gives, in the batch's order: none for a chunk within its prompt."""
        self.cache.copy(batch.copies)
        if not self.recorder.activations:
            return self.sample(batch, self.model(batch, self.cache))
        began_s = self.recorder.now_s()
        logits, peak = peak_of(lambda: self.model(batch, self.cache), self.model.device)
        self.recorder.memory(Category.ACTIVATIONS, peak, began_s)
        self.recorder.memory(Category.ACTIVATIONS, 0)
        return self.sample(batch, logits)

    def sample(self, batch: Batch, logits: torch.Tensor) -> list[list[int]]:
        """The next token of each chunk's request; as many as there are samples where they fork."""
        rows, likeliest = iter(logits), iter(logits.argmax(-1).tolist())
        return [self._draw(next(rows), next(likeliest), c.request_id) if c.samples else [] for c in batch.chunks]

    def postprocess(self, batch: Batch, tokens: list[list[int]]) -> list[Piece]:
        """Hand every request its token; those that finished leave their blocks."""
        now = time.monotonic()
        self.scheduler.postprocess(batch, [drawn[0] if drawn else None for drawn in tokens])
        pieces = []
        for chunk, drawn in zip(batch.chunks, tokens):
            request = self.requests.get(chunk.request_id)
            if request is None:  # cancelled while its batch was under way
                continue
            if len(drawn) > 1:
                self._fork(request, drawn)
            for each, token in zip([request, *request.twins], drawn):
                pieces.append(each.take(token, now))
                if each.finish_reason is not None:
                    self._leave(each)
        self._note_cache()
        return pieces

    def cancel(self, requests: Iterable[Request]) -> None:
        """End requests that have not ended yet; their blocks are free at once."""
        for request in with_twins(requests):
            if request.finish_reason is None:
                request.cancel(time.monotonic())
                if request.request_id in self.requests:
                    self._leave(request)

    def _draw(self, logits: torch.Tensor, likeliest: int, request_id: int) -> list[int]:
        request = self.requests.get(request_id)
        if request is None or (request.params.greedy and request.scheduled.samples == 1):
            return [likeliest]
        position = len(request.scheduled.tokens)
        forks = request.twins if request.scheduled.samples > 1 else []
        return [sample(logits, each.params, each.seed, each.noise_key, position) for each in [request, *forks]]

    def _fork(self, request: Request, drawn: list[int]) -> None:
        """The request's twins go on from its prompt, each with its own first token."""
        for twin, token in zip(request.twins, drawn[1:]):
            twin.scheduled.tokens[:] = [*request.prompt, token]
            self.scheduler.fork(request.request_id, twin.scheduled)
            self._enter(twin)
            twin.life.moments = list(request.life.moments)

    def _note_cache(self) -> None:
        """The blocks in use, in bytes. The pool behind them is `cache.bytes`, in use or not."""
        self.recorder.memory(Category.KV_CACHE, self.scheduler.pool.num_used * self.cache.block_bytes)

    def _enter(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.recorder.trace.lives.append(request.life)

    def _leave(self, request: Request) -> None:
        del self.requests[request.request_id]
        self.scheduler.remove(request.request_id)

    def _span(self, batch: Batch) -> AbstractContextManager[object]:
        """The span of a step, with what it costs by formula."""
        prompts = sum(chunk.is_prefill for chunk in batch.chunks)
        name = "decode" if not prompts else "prefill" if prompts == len(batch.chunks) else "prefill + decode"
        cost = pass_cost(self.model.config, batch, self.model.dtype.itemsize).total
        return self.recorder.span(
            Kind.PREFILL if prompts else Kind.DECODE,
            name,
            tokens=sum(len(chunk.token_ids) for chunk in batch.chunks),
            request_ids=tuple(chunk.request_id for chunk in batch.chunks),
            flops=cost.flops,
            memory_bytes=cost.memory_bytes,
        )


def default_num_blocks(model: Decoder, options: EngineOptions) -> int:
    """As many blocks as the longest sequences can use together, within the memory that is kept for the cache."""
    config = model.config
    block_bytes = options.block_size * config.kv_numbers_per_token * model.dtype.itemsize
    longest = -(-config.max_positions // options.block_size)
    room = CPU_CACHE_BYTES
    if model.device.type == "cuda":
        room = int(torch.cuda.mem_get_info(model.device)[0] * GPU_CACHE_SHARE)
    return max(1, min(longest * options.max_running, room // block_bytes))
