"""Engines on a computed clock: the scheduler and the router that the real ones drive, with step times from the roofline.

A step takes as long as the slower of computing its operations and moving its bytes, on a named device; nothing else is
counted, so a real engine is slower. The file knows no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.hardware.devices import Device
from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.model.cost import Cost, cache_room_bytes, pass_cost
from minillm.policy.batch import Batch
from minillm.policy.blocks import BlockPool
from minillm.policy.options import EngineOptions
from minillm.policy.request import Order, ScheduledRequest, first_come
from minillm.policy.router import Router, make_router
from minillm.policy.scheduler import Scheduler
from minillm.trace.life import LOST_BLOCKS, Event, RequestLife
from minillm.trace.trace import Clock, Kind, Span, Trace
from minillm.trace.workload import Arrival


def simulate(
    arrivals: Sequence[Arrival],
    config: ModelConfig,
    device: Device,
    dtype: str,
    options: EngineOptions | None = None,
    order: Order = first_come,
    replicas: int = 1,
    router: str | type[Router] = "least-tokens",
) -> Trace:
    """Serve the requests on `replicas` of one `device` each; returns a trace whose clock is *planned*, from second 0.

    Without `num_blocks` the KV cache has what the device's memory leaves beside the weights. Raises `ValueError` for a
    model or a request that does not fit.
    """
    options = options or EngineOptions()
    if options.prefix_reuse:
        raise ValueError(
            "a simulated prompt has a length and no tokens, so nothing can be reused: set prefix_reuse=False"
        )
    num_blocks = options.num_blocks or _blocks(config, device, dtype, options)
    lives = [RequestLife(number, prompt_tokens=each.prompt_tokens) for number, each in enumerate(arrivals)]
    trace = Trace(clock=Clock.PLANNED, about={"model": "", "dtype": dtype, "device": device.name}, lives=lives)
    run = _Run(config, device, dtype, trace, make_router(router, replicas))
    for number in range(replicas):
        scheduler = Scheduler(BlockPool(num_blocks, options.block_size), options, order)
        run.replicas.append(_Replica(number, scheduler))
    coming = deque(sorted(enumerate(arrivals), key=lambda each: each[1].time_s))
    while coming or any(replica.batch for replica in run.replicas):
        first = min((replica for replica in run.replicas if replica.batch), key=lambda each: each.ends_s, default=None)
        if first is None or (coming and coming[0][1].time_s <= first.ends_s):
            now_s = coming[0][1].time_s
            while coming and coming[0][1].time_s <= now_s:
                run.arrive(*coming.popleft())
        else:
            now_s = first.ends_s
            run.end(first)
        for replica in run.replicas:
            run.begin(replica, now_s)
    trace.spans.sort(key=lambda span: span.end_s)
    return trace


@dataclass
class _Replica:
    """One device: its scheduler, and the batch that it computes until `ends_s`, if any."""

    number: int
    scheduler: Scheduler
    batch: Batch | None = None
    ends_s: float = 0.0
    steps: int = 0


class _Run:
    """All replicas on one clock, which the caller turns."""

    def __init__(self, config: ModelConfig, device: Device, dtype: str, trace: Trace, router: Router) -> None:
        self.config, self.device, self.dtype, self.trace, self.router = config, device, dtype, trace, router
        self.replicas: list[_Replica] = []

    def arrive(self, number: int, arrival: Arrival) -> None:
        """A request comes, and goes where the router says. Every prompt begins with tokens of its own."""
        prompt = [number] * arrival.prompt_tokens
        replica = self.replicas[self.router.route(number, prompt, arrival.new_tokens)]
        longest = arrival.prompt_tokens + arrival.new_tokens
        replica.scheduler.add(ScheduledRequest(number, prompt, longest, arrival.time_s))
        self.trace.lives[number].rank = replica.number
        self.trace.lives[number].note(Event.ARRIVED, arrival.time_s)

    def begin(self, replica: _Replica, now_s: float) -> None:
        """Let a replica that is free begin its next step, if it has one."""
        if replica.batch is not None or not replica.scheduler.has_work:
            return
        batch, lives = replica.scheduler.schedule(now_s), self.trace.lives
        for number in batch.preempted:
            lives[number].note(Event.PREEMPTED, now_s)
        if not batch.chunks:
            return
        for chunk in batch.chunks:
            last = lives[chunk.request_id].moments[-1][0]
            if last is Event.ARRIVED or last in LOST_BLOCKS:
                lives[chunk.request_id].note(Event.STARTED, now_s)
        cost = pass_cost(self.config, batch, DTYPE_BYTES[self.dtype]).total
        replica.batch, replica.steps = batch, replica.steps + 1
        replica.ends_s = now_s + cost.time_s(self.device.flops_per_s(self.dtype), self.device.bytes_per_s)
        self.trace.spans.append(_span(replica, batch, cost, now_s))

    def end(self, replica: _Replica) -> None:
        """Every chunk that samples gives a token; requests with their last one leave."""
        batch, scheduler = replica.batch, replica.scheduler
        assert batch is not None
        replica.batch = None
        scheduler.postprocess(batch, [0 if chunk.samples else None for chunk in batch.chunks])
        for chunk in batch.chunks:
            if chunk.samples:
                self.trace.lives[chunk.request_id].note(Event.TOKEN, replica.ends_s)
                self.router.gave(chunk.request_id)
                if chunk.end + 1 >= scheduler.requests[chunk.request_id].longest:
                    self.trace.lives[chunk.request_id].note(Event.FINISHED, replica.ends_s)
                    self.router.ended(chunk.request_id)
                    scheduler.remove(chunk.request_id)


def _span(replica: _Replica, batch: Batch, cost: Cost, began_s: float) -> Span:
    kind = Kind.PREFILL if any(chunk.is_prefill for chunk in batch.chunks) else Kind.DECODE
    return Span(
        replica.number, kind, kind.value, began_s, replica.ends_s, replica.steps, tokens=sum(len(chunk.token_ids) for chunk in batch.chunks),
        request_ids=tuple(chunk.request_id for chunk in batch.chunks), flops=cost.flops, memory_bytes=cost.memory_bytes,
    )  # fmt: skip


def _blocks(config: ModelConfig, device: Device, dtype: str, options: EngineOptions) -> int:
    """Blocks that fit beside the weights, one at least."""
    block_bytes = options.block_size * config.kv_numbers_per_token * DTYPE_BYTES[dtype]
    return max(1, int(cache_room_bytes(config, device, dtype) // block_bytes))
