"""One engine on a computed clock: the scheduler that the real engine drives, with step times from the roofline.

A step takes as long as the slower of computing its operations and moving its bytes, on a named device; nothing else is
counted, so a real engine is slower. The file knows no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from minillm.hardware.devices import Device
from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.model.cost import Cost, cache_room_bytes, pass_cost
from minillm.policy.batch import Batch
from minillm.policy.blocks import BlockPool
from minillm.policy.options import EngineOptions
from minillm.policy.request import Order, ScheduledRequest, first_come
from minillm.policy.scheduler import Scheduler
from minillm.trace.life import Event, RequestLife
from minillm.trace.trace import Clock, Kind, Span, Trace
from minillm.trace.workload import Arrival


def simulate(
    arrivals: Sequence[Arrival],
    config: ModelConfig,
    device: Device,
    dtype: str,
    options: EngineOptions | None = None,
    order: Order = first_come,
) -> Trace:
    """Serve the requests on one `device`; returns a trace whose clock is *planned*, from second 0.

    Without `num_blocks` the KV cache has what the device's memory leaves beside the weights. Raises `ValueError` for a
    model or a request that does not fit.
    """
    options = options or EngineOptions()
    if options.prefix_reuse:
        raise ValueError(
            "a simulated prompt has a length and no tokens, so nothing can be reused: set prefix_reuse=False"
        )
    pool = BlockPool(options.num_blocks or _blocks(config, device, dtype, options), options.block_size)
    scheduler = Scheduler(pool, options, order)
    lives = [RequestLife(number, prompt_tokens=each.prompt_tokens) for number, each in enumerate(arrivals)]
    trace = Trace(clock=Clock.PLANNED, about={"model": "", "dtype": dtype, "device": device.name}, lives=lives)
    coming = deque(sorted(enumerate(arrivals), key=lambda each: each[1].time_s))
    now_s = 0.0
    while coming or scheduler.has_work:
        while coming and coming[0][1].time_s <= now_s:
            _arrive(scheduler, lives, *coming.popleft())
        batch = scheduler.schedule(now_s)
        if not batch.chunks:
            now_s = coming[0][1].time_s
            continue
        _begin(lives, batch, now_s)
        cost = pass_cost(config, batch, DTYPE_BYTES[dtype]).total
        began_s, now_s = now_s, now_s + cost.time_s(device.flops_per_s(dtype), device.bytes_per_s)
        trace.spans.append(_span(batch, cost, began_s, now_s, len(trace.spans) + 1))
        _end(scheduler, lives, batch, now_s)
    return trace


def _arrive(scheduler: Scheduler, lives: list[RequestLife], number: int, arrival: Arrival) -> None:
    longest = arrival.prompt_tokens + arrival.new_tokens
    scheduler.add(ScheduledRequest(number, [0] * arrival.prompt_tokens, longest, arrival.time_s))
    lives[number].note(Event.ARRIVED, arrival.time_s)


def _begin(lives: list[RequestLife], batch: Batch, now_s: float) -> None:
    """Who lost its blocks for this batch, and who starts with it."""
    for number in batch.preempted:
        lives[number].note(Event.PREEMPTED, now_s)
    for chunk in batch.chunks:
        if lives[chunk.request_id].moments[-1][0] in (Event.ARRIVED, Event.PREEMPTED):
            lives[chunk.request_id].note(Event.STARTED, now_s)


def _span(batch: Batch, cost: Cost, began_s: float, ended_s: float, step: int) -> Span:
    kind = Kind.PREFILL if any(chunk.is_prefill for chunk in batch.chunks) else Kind.DECODE
    return Span(
        0, kind, kind.value, began_s, ended_s, step, tokens=sum(len(chunk.token_ids) for chunk in batch.chunks),
        request_ids=tuple(chunk.request_id for chunk in batch.chunks), flops=cost.flops, memory_bytes=cost.memory_bytes,
    )  # fmt: skip


def _end(scheduler: Scheduler, lives: list[RequestLife], batch: Batch, now_s: float) -> None:
    """Every chunk that samples gives a token; requests with their last one leave."""
    scheduler.postprocess(batch, [0 if chunk.samples else None for chunk in batch.chunks])
    for chunk in batch.chunks:
        if chunk.samples:
            lives[chunk.request_id].note(Event.TOKEN, now_s)
            if chunk.end + 1 >= scheduler.requests[chunk.request_id].longest:
                lives[chunk.request_id].note(Event.FINISHED, now_s)
                scheduler.remove(chunk.request_id)


def _blocks(config: ModelConfig, device: Device, dtype: str, options: EngineOptions) -> int:
    """Blocks that fit beside the weights, one at least."""
    block_bytes = options.block_size * config.kv_numbers_per_token * DTYPE_BYTES[dtype]
    return max(1, int(cache_room_bytes(config, device, dtype) // block_bytes))
