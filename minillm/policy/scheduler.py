"""Which tokens go into the next step: continuous batching, chunked prefill, preemption, over a pool of blocks.

A plain state machine. It holds no tensors, reads no clock and does no I/O, so that the engine drives it with real steps
and the simulator with computed ones. (Orca, Yu et al. 2022, section 3.2; vLLM, Kwon et al. 2023, section 4.5;
Sarathi-Serve, Agrawal et al. 2024, section 4.2.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from minillm.policy.batch import Batch
from minillm.policy.blocks import BlockPool, BlockTable
from minillm.policy.options import EngineOptions
from minillm.policy.queue import Ordered, Queue, by_length
from minillm.policy.request import Load, Order, ScheduledRequest, Status, first_come
from minillm.policy.step import Step


class Scheduler:
    """Requests that wait and run, and the next batch of them.

    `order(request, now_s)` is a sort key; the lowest goes first, and the highest is preempted first. A batch that was
    scheduled is given back by `postprocess`, in order; after an error `recover` takes all back that were under way.
    Meanwhile `schedule` may be called again: of requests in batches under way it takes at most the next part of a prompt.
    `depth` is how many batches are meant to be under way at once; each then holds its share of the requests.
    """

    def __init__(
        self, pool: BlockPool, options: EngineOptions | None = None, order: Order = first_come, depth: int = 1
    ) -> None:  # fmt: skip
        self.pool = pool
        self.depth, self.under_way = depth, 0
        self.options = options or EngineOptions()
        self.order = order
        self.waiting = self._queue()
        self.running: list[ScheduledRequest] = []
        self.requests: dict[int, ScheduledRequest] = {}
        self.beyond = 0  # blocks that other instances lend at most
        self.preempted: list[int] = []  # since the last batch
        self.readings = 0  # of prompts that are handed over
        self.gone: list[int] = []  # of these, since the last batch
        self.may_start: Callable[[ScheduledRequest], bool] = lambda request: True

    def add(self, request: ScheduledRequest) -> None:
        """Let a request wait. Raises `ValueError` for an id in use, and for a request that can never run."""
        self.check(request)
        self.requests[request.request_id] = request
        self.waiting.push(request)

    def check(self, request: ScheduledRequest) -> None:
        """Raise `ValueError` for what `add` would refuse."""
        if request.request_id in self.requests:
            raise ValueError(f"there is a request {request.request_id} already: give another id")
        most = (self.pool.num_blocks + self.beyond) * self.pool.block_size
        if request.most_cached > most:
            lent = f", and {self.beyond} that others may lend" * bool(self.beyond)
            raise ValueError(
                f"a request may need room for {request.most_cached} tokens, but the KV cache has room for {most} in all "
                f"({self.pool.num_blocks} blocks of {self.pool.block_size}{lent}): shorten it, lower max_tokens, or raise "
                f"num_blocks"
            )
        if self.outgrows(request) and request.samples > 1:
            raise ValueError(
                f"a request for n={request.samples} samples may need {request.most_cached} tokens, more than the "
                f"{self.pool.num_blocks} blocks here: such a one borrows for one sample alone"
            )
        self.check_samples(request.samples, request.most_cached)

    def outgrows(self, request: ScheduledRequest) -> bool:
        """Whether the request may grow longer than this whole pool, so that it has to borrow."""
        return self.pool.blocks_for(request.most_cached) > self.pool.num_blocks

    def check_samples(self, samples: int, most_cached: int = 1) -> None:
        """Raise `ValueError` when so many samples of one prompt can never run together."""
        together = self.options.max_running
        if not self.options.preemption:
            together = min(together, self.pool.num_blocks // self.pool.blocks_for(most_cached))
        if samples > together:
            raise ValueError(f"a request asks for n={samples} samples, but only {together} can run together")

    def schedule(self, now_s: float) -> Batch:
        """The next batch: tokens of decoding requests first, then of prompts begun, then of new ones. Empty if none can run."""
        self.running.sort(key=lambda request: self.order(request, now_s))
        step = Step(self.options.max_step_tokens, self._share())
        ready = [request for request in self.running if request.remaining]
        for request in sorted(ready, key=lambda request: request.remaining > 1):  # decodes, then prompts begun
            if request.status is Status.RUNNING and step.has_place:
                self._continue(request, step)
        if not step.preempted and (self.options.continuous or not self.running):
            self._start_new(step, now_s)
        self.under_way += bool(step.chunks)
        preempted, self.preempted = tuple(self.preempted), []
        gone: tuple[int, ...] = ()
        if step.chunks:  # else nobody hears of it
            gone, self.gone = tuple(self.gone), []
        return Batch(tuple(step.chunks), tuple(step.copies), preempted, arrivals=tuple(step.arrivals), gone=gone)

    def postprocess(self, batch: Batch, tokens: Sequence[int | None]) -> None:
        """The batch has run: `tokens` has the next token of each chunk that samples, None for the others."""
        self.under_way = max(0, self.under_way - 1)
        for chunk, token in zip(batch.chunks, tokens, strict=True):
            request = self.requests[chunk.request_id]
            request.in_flight -= len(chunk.token_ids)
            request.computed = chunk.end
            if request.status is Status.GONE:
                if not request.in_flight:
                    self._let_go(request)
                continue
            assert request.table is not None
            request.table.remember(request.tokens, request.computed)
            if chunk.samples and token is not None:
                request.tokens.append(token)
                if request.handed:
                    self.running.remove(request)
                    request.status = Status.KEPT
            elif chunk.samples:  # what it had at another instance is lost
                self.preempt(request)

    def recover(self) -> frozenset[int]:
        """No batch that is under way will come back: its requests start again. Returns their ids."""
        self.under_way = 0
        lost = [request for request in self.requests.values() if request.in_flight and not request.arriving]
        for request in lost:
            request.in_flight = 0
            if request.status is Status.GONE:
                self._let_go(request)
            elif request.status is Status.RUNNING:
                self.preempt(request)
        self.preempted.clear()
        return frozenset(request.request_id for request in lost)

    def fork(self, request_id: int, twin: ScheduledRequest) -> None:
        """`twin` runs on from where a running request stands, on the same blocks, until either writes to them."""
        if twin.request_id in self.requests:
            raise ValueError(f"there is a request {twin.request_id} already: give another id")
        parent = self.requests[request_id]
        assert parent.status in (Status.RUNNING, Status.KEPT) and parent.table is not None
        twin.table, twin.computed, twin.status = parent.table.fork(), parent.computed, parent.status
        twin.arrival_s, twin.priority, twin.reading = parent.arrival_s, parent.priority, parent.reading
        parent.samples -= 1
        self.requests[twin.request_id] = twin
        if twin.status is Status.RUNNING:
            self.running.append(twin)

    def remove(self, request_id: int) -> None:
        """A request has finished or is cancelled: its blocks are free at once, or when its batches under way are back."""
        request = self.requests[request_id]
        request.status = Status.GONE
        if not request.in_flight:
            self._let_go(request)

    def arrived(self, request_id: int) -> None:
        """K and V of a request have come from another instance."""
        request = self.requests[request_id]
        request.computed, request.in_flight, request.arriving = request.arriving, 0, 0
        if request.status is Status.GONE:
            self._let_go(request)
        elif request.table is not None:
            request.table.remember(request.tokens, request.computed)

    def missed(self, request_id: int) -> None:
        """They will not come, nor be written here any more: the request is computed here from its beginning."""
        request = self.requests[request_id]
        came_to, request.in_flight, request.arriving = request.in_flight, 0, 0
        if request.status is Status.GONE:
            self._let_go(request)
        elif came_to:
            self.preempt(request)

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.requests)

    @property
    def load(self) -> Load:
        """How full it is now."""
        return Load(len(self.running), len(self.waiting), self.pool.num_used, self.pool.num_blocks)

    def _queue(self) -> Queue[ScheduledRequest]:
        """Who waits: by `order`, or by the length of their prompts; what has been read elsewhere goes before those."""
        options = self.options
        if options.prompt_order == "fcfs":
            return Ordered(lambda request, now_s: self.order(request, now_s))
        if self.order is not first_come:
            raise ValueError(f"prompt_order={options.prompt_order!r} and an order of one's own: give one of them")
        before = lambda each: (not each.arriving, each.priority)  # noqa: E731
        return by_length(options.prompt_order, options.prompt_window, lambda each: len(each.tokens), before)

    def _share(self) -> int:
        """The most requests of one batch. When several batches are to be under way, an equal part of all that run or can
        start, and of those that no batch has yet.
        """
        if self.depth == 1:
            return self.options.max_running
        starting = self._startable()
        free = max(1, self.depth - self.under_way)
        ready = sum(request.remaining > 0 for request in self.running) + starting
        return min(-(-(len(self.running) + starting) // self.depth), -(-ready // free)) or 1

    def _startable(self) -> int:
        """How many waiting requests there are places and blocks for, about."""
        free, count = self.pool.num_free, 0
        for request in islice(self.waiting, max(0, self.options.max_running - len(self.running))):
            free -= self.pool.blocks_for(len(request.tokens))
            if free < 0:
                break
            count += 1
        return count

    def _continue(self, request: ScheduledRequest, step: Step) -> None:
        """Give a running request its next tokens, if there are blocks for them."""
        table = request.table
        assert table is not None
        count = self._part(request, step)
        start = request.computed + request.in_flight
        while (missing := table.missing(start, start + count)) > self.pool.num_free:
            if missing <= self.pool.num_free + self.pool.leaving:
                return  # until what moves to other instances has arrived there
            victim = self._victim()
            if victim is None or (victim is request and request.remaining > 1 and step.chunks):
                return  # a prompt begun waits for those that decode, and keeps what it has
            self.preempt(victim)
            step.preempted.append(victim.request_id)
            if victim is request:
                return
        step.take(request, count)

    def _start_new(self, step: Step, now_s: float) -> None:
        """Start waiting requests in order until one does not fit."""
        self.waiting.look(now_s)
        while self.waiting and (step.has_place or not self.options.continuous):
            request = self.waiting.first
            if not self.may_start(request):
                return
            if sum(each.samples for each in self.running) + request.samples > self.options.max_running:
                return
            request.table = request.table or BlockTable(self.pool)
            if request.arriving and self._has_room(request):
                self._expect(self.waiting.pop(), step)
                continue
            if request.arriving:
                return
            if not request.table.reserved:
                request.computed = request.reused = request.table.reuse(request.tokens)
            count = self._part(request, step)
            whole_and_more = not self.options.chunked_prefill and count > step.budget and step.has_prompt
            if whole_and_more or not self._has_room(request):
                request.table.free()
                request.computed = request.reused = 0
                return
            self.running.append(self.waiting.pop())
            request.status = Status.RUNNING
            if request.handed:
                self.readings += 1
                request.reading = self.readings
            if count > 0:
                step.take(request, count)

    def _expect(self, request: ScheduledRequest, step: Step) -> None:
        """Take the blocks to which a request's K and V will come."""
        assert request.table is not None
        request.table.write(0, request.arriving)
        request.in_flight, request.status = request.arriving, Status.RUNNING
        self.running.append(request)
        step.arrivals.append(request.request_id)

    def _part(self, request: ScheduledRequest, step: Step) -> int:
        """How many of its tokens a request may put into the step: of one that outgrows the pool as many as have room here now."""
        count = min(request.remaining, step.budget) if self.options.chunked_prefill else request.remaining
        if not self.outgrows(request):
            return count
        assert request.table is not None
        start = request.computed + request.in_flight
        room = (len(request.table.blocks) + self.pool.num_free) * self.pool.block_size - start
        return min(count, max(1, room))

    def _has_room(self, request: ScheduledRequest) -> bool:
        """Whether the blocks suffice to start: for all tokens it has now, or, without preemption, will ever have."""
        assert request.table is not None
        if self.outgrows(request):
            return max(1, self.pool.blocks_for(request.most_cached) - request.table.num_reserved) <= self.pool.num_free
        if self.options.preemption and (self.options.continuous or not self.running):
            return request.table.missing(request.computed, len(request.tokens)) <= self.pool.num_free
        kept = [each for each in self.requests.values() if each.status is Status.KEPT]
        claims = sum(each.samples * self._claim(each) for each in [*self.running, *kept, request])
        return claims <= self.pool.num_blocks

    def _claim(self, request: ScheduledRequest) -> int:
        """Blocks set aside for a request: what its tokens take, or without preemption what they may grow to."""
        return self.pool.blocks_for(len(request.tokens) if self.options.preemption else request.most_cached)

    def _victim(self) -> ScheduledRequest | None:
        """The last in order, unless it is in a batch under way: then its turn comes when it is back."""
        return self.running[-1] if not self.running[-1].in_flight else None

    def preempt(self, request: ScheduledRequest) -> None:
        """Take the blocks of a running request that is in no batch under way; it will be computed again (recomputation, vLLM section 4.5)."""
        assert request.table is not None
        request.table.free()
        request.computed, request.status = 0, Status.WAITING
        self.running.remove(request)
        self.waiting.put_back(request)
        self.preempted.append(request.request_id)
        if request.reading:
            self.gone.append(request.reading)
            request.reading = 0

    def _let_go(self, request: ScheduledRequest) -> None:
        if request.table is not None:
            request.table.free()
        del self.requests[request.request_id]
        if request.reading and all(each.reading != request.reading for each in self.requests.values()):
            self.gone.append(request.reading)
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self.running.remove(request)
