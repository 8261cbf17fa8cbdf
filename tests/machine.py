"""A scheduler on a device that knows only tokens: no model, no clock."""

from __future__ import annotations

from collections import deque

from minillm.policy.batch import Batch
from minillm.policy.blocks import BlockPool
from minillm.policy.options import EngineOptions
from minillm.policy.request import ScheduledRequest
from minillm.policy.scheduler import Scheduler


def next_token(context: list[int]) -> int:
    """What a model that looks at its whole context would say."""
    return sum((place + 3) * token for place, token in enumerate(context)) % 5


class Machine:
    """Runs batches on a memory of (block, offset) -> token, as a device would, some time after they were scheduled."""

    def __init__(self, options: EngineOptions, depth: int) -> None:
        assert options.num_blocks is not None
        self.pool = BlockPool(options.num_blocks, options.block_size, options.prefix_reuse)
        self.scheduler = Scheduler(self.pool, options, depth=depth)
        self.options, self.depth = options, depth
        self.memory: dict[tuple[int, int], int] = {}
        self.under_way: deque[tuple[Batch, list[int | None]]] = deque()
        self.ended: dict[int, list[int]] = {}
        self.next_id = 100
        self.missed: set[int] = set()  # whose caches did not come

    def launch(self, now_s: float) -> None:
        """Schedule a batch, check it, and run it; its tokens come back later. If none can run, one comes back now."""
        batch = self.scheduler.schedule(now_s)
        if not batch.chunks:
            if self.under_way:
                self.land()
            return
        self.run(batch)

    def run(self, batch: Batch) -> None:
        """Compute a batch."""
        self.check(batch)
        for old, new in batch.copies:
            for offset in range(self.pool.block_size):
                if (old, offset) in self.memory:
                    self.memory[new, offset] = self.memory[old, offset]
        tokens: list[int | None] = []
        for chunk in batch.chunks:
            where = [
                (chunk.block_table[at // self.pool.block_size], at % self.pool.block_size) for at in range(chunk.end)
            ]
            self.memory.update(zip(where[chunk.start :], chunk.token_ids))
            context = [self.memory[place] for place in where]
            assert context == self.scheduler.requests[chunk.request_id].tokens[: chunk.end]
            tokens.append(next_token(context) if chunk.samples else None)
        self.under_way.append((batch, tokens))

    def check(self, batch: Batch) -> None:
        """The limits hold, and of a request only the next part of its prompt may follow another chunk under way."""
        sizes = [len(chunk.token_ids) for chunk in batch.chunks]
        assert len({chunk.request_id for chunk in batch.chunks}) == len(batch.chunks) <= self.options.max_running
        latest = {chunk.request_id: chunk for other, _ in self.under_way for chunk in other.chunks}
        for chunk in batch.chunks:
            before = latest.get(chunk.request_id)
            assert before is None or (before.end == chunk.start and not before.samples)
        if self.depth > 1 and self.options.continuous:
            assert len(sizes) <= -(-self.options.max_running // self.depth)
        if self.options.chunked_prefill or sum(size > 1 for size in sizes) > 1:
            assert sum(sizes) <= self.options.max_step_tokens
        assert sum(each.samples for each in self.scheduler.running) <= self.options.max_running
        if not self.options.preemption:
            assert set(batch.preempted) <= self.missed

    def land(self) -> None:
        """The oldest batch under way comes back."""
        batch, tokens = self.under_way.popleft()
        self.scheduler.postprocess(batch, tokens)
        for chunk in batch.chunks:
            request = self.scheduler.requests.get(chunk.request_id)
            if request is None or not chunk.samples:
                continue
            if request.samples > 1:
                self.fork(request)
            if len(request.tokens) >= request.longest:
                self.ended[request.request_id] = list(request.tokens)
                self.scheduler.remove(request.request_id)

    def news(self) -> list[tuple[int, int]]:
        """What the oldest batch under way has given, (request, token)."""
        batch, tokens = self.under_way.popleft()
        self.scheduler.postprocess(batch, tokens)
        return [(chunk.request_id, token) for chunk, token in zip(batch.chunks, tokens) if token is not None]

    def fork(self, request: ScheduledRequest) -> None:
        """A second sample goes on from the prompt with another first token."""
        self.next_id += 1
        twin = ScheduledRequest(self.next_id, [*request.tokens[:-1], 7], request.longest)
        self.scheduler.fork(request.request_id, twin)
        if len(twin.tokens) >= twin.longest:
            self.ended[twin.request_id] = list(twin.tokens)
            self.scheduler.remove(twin.request_id)


def alone(tokens: list[int], longest: int) -> list[int]:
    """What a request gets by itself."""
    tokens = list(tokens)
    while len(tokens) < longest:
        tokens.append(next_token(tokens))
    return tokens
