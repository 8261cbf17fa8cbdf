"""What a prompt, a decode step and the move of a cache between them take, by the rooflines of a device and a link; and how many instances
of each kind a load wants. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minillm.hardware.devices import Device, Link
from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.model.cost import PassCost, cache_room_bytes, decode_cost, pass_cost
from minillm.policy.batch import Batch, Chunk
from minillm.policy.options import TRANSFERS

CHUNK = 512  # tokens of a prompt that are read in one step where it is cut


def time_of(cost: PassCost, device: Device, dtype: str) -> float:
    """Seconds of a pass: its products, then its attention, each at the roofline."""
    flops_per_s = device.flops_per_s(dtype)
    return sum(each.time_s(flops_per_s, device.bytes_per_s) for each in (cost.products, cost.attention))


def prefill_s(config: ModelConfig, device: Device, dtype: str, tokens: int, start: int = 0) -> float:
    """Seconds to read `tokens` of one prompt, after `start` others of it."""
    chunk = Chunk(0, start, (0,) * tokens, ())
    return time_of(pass_cost(config, Batch((chunk,)), DTYPE_BYTES[dtype]), device, dtype)


def decode_s(config: ModelConfig, device: Device, dtype: str, batch: int, context: int) -> float:
    """Seconds of a decode step of so many requests with `context` tokens each."""
    return time_of(decode_cost(config, batch, context, DTYPE_BYTES[dtype]), device, dtype)


def cache_bytes(config: ModelConfig, dtype: str, tokens: int) -> int:
    """K and V of a prompt: 2 · layers · kv_heads · head_dim numbers a token."""
    return tokens * config.kv_numbers_per_token * DTYPE_BYTES[dtype]


def seen_s(config: ModelConfig, device: Device, link: Link, dtype: str, tokens: int, transfer: str) -> float:
    """How long after a prompt is read its cache is complete at the other instance: moved "whole" then, "chunk" by chunk or "layer" by layer
    while it is read. What is ready leaves at once, one part after the other. Raises `ValueError` for another word.
    """
    if transfer not in TRANSFERS:
        raise ValueError(f"transfer={transfer!r}: give one of {', '.join(TRANSFERS)}")
    total = cache_bytes(config, dtype, tokens)
    if transfer == "whole":
        return link.time_s(total)
    if transfer == "layer":
        whole = prefill_s(config, device, dtype, tokens)
        return _tail([(whole / config.layers, total / config.layers)] * config.layers, link)
    parts = []
    for start in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - start)
        parts.append((prefill_s(config, device, dtype, count, start), total * count / tokens))
    return _tail(parts, link)


def _tail(parts: Sequence[tuple[float, float]], link: Link) -> float:
    """How long after the last part is computed it has arrived: parts (seconds to compute, bytes) leave in order."""
    computed = arrived = 0.0
    for seconds, count in parts:
        computed += seconds
        arrived = max(arrived, computed) + link.time_s(count)
    return arrived - computed


@dataclass(frozen=True)
class Demand:
    """Requests of one kind: tokens in and out, and what a token after the first may take."""

    tokens_in: int
    tokens_out: int
    tpot_s: float


@dataclass(frozen=True)
class Rates:
    """Requests per second that one instance serves: prefill alone, decode alone in steps of `batch`, or both by turns, in steps of
    `both_batch`; 0 where that cannot keep to the goal.
    """

    prefill: float
    decode: float
    both: float
    batch: int
    both_batch: int = 0

    def split(self, prefills: int, decodes: int) -> float:
        """With so many instances of each kind: what the slower kind lets through."""
        return min(prefills * self.prefill, decodes * self.decode)

    def best(self, instances: int) -> int:
        """How many of them should read prompts."""
        return max(range(1, instances), key=lambda prefills: self.split(prefills, instances - prefills))


def rates_of(config: ModelConfig, device: Device, dtype: str, demand: Demand) -> Rates:
    """What one instance on one device serves. Decode takes the largest batch, a power of two, that fits and whose steps keep to `tpot_s`.

    An instance that does both reads batch / tokens_out prompts for each step on average, and with them its steps must keep to the
    goal. Raises `ValueError` when not even one request alone does, saying how long its step takes.
    """
    context = demand.tokens_in + demand.tokens_out
    room = cache_room_bytes(config, device, dtype) // cache_bytes(config, dtype, context)
    if room < 1:
        raise ValueError(f"{context:,} tokens do not fit {device.name} beside the weights")
    step = lambda batch: decode_s(config, device, dtype, batch, context)  # noqa: E731
    if step(1) > demand.tpot_s:
        raise ValueError(f"a step of one request takes {1e3 * step(1):.3g} ms on {device.name}: more than the goal")
    reading = prefill_s(config, device, dtype, demand.tokens_in)
    mixed = lambda batch: step(batch) + reading * batch / demand.tokens_out  # noqa: E731
    sizes = [2**power for power in range(11) if 2**power <= room]
    batch = max(size for size in sizes if step(size) <= demand.tpot_s)
    both = max((size for size in sizes if mixed(size) <= demand.tpot_s), default=0)
    together = both / (demand.tokens_out * mixed(both)) if both else 0.0
    return Rates(1 / reading, batch / (demand.tokens_out * step(batch)), together, batch, both)
