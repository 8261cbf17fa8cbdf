"""What it is worth to borrow memory, by formula: a decode step of an instance whose requests fill its own, without and with more."""

from __future__ import annotations

from dataclasses import dataclass

from minillm.distkv.spread import answer_bytes
from minillm.hardware.devices import Device, Link
from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.model.cost import attention_cost, cache_room_bytes, decode_cost


@dataclass(frozen=True)
class Worth:
    """Requests that run together, and seconds of a decode step: without borrowing and with it."""

    alone: int
    together: int
    alone_s: float
    together_s: float

    @property
    def gain(self) -> float:
        """How many times as many tokens/s: batch over step time, TPS = β / T (Infinite-LLM, section 5)."""
        return self.together / self.together_s * self.alone_s / self.alone


def worth_of(config: ModelConfig, device: Device, link: Link, dtype: str, context: int, idle: float) -> Worth:
    """An instance of one device, whose requests have `context` tokens each, borrows a share `idle` of what another device like it has
    for its KV cache. In each layer queries of the requests whose keys are there go out and answers come back, while the rank reads its
    own keys; the step goes on when both are done.

    Raises `ValueError` when not one request fits without.
    """
    size = DTYPE_BYTES[dtype]
    room, each = cache_room_bytes(config, device, dtype), context * config.kv_numbers_per_token * size
    alone, together = int(room // each), int((1 + idle) * room // each)
    if not alone:
        raise ValueError(f"{context:,} tokens do not fit {device.name} beside the weights")
    seconds = lambda cost: cost.time_s(device.flops_per_s(dtype), device.bytes_per_s)  # noqa: E731
    far = together - alone
    keys = attention_cost(config, 1, context, size)
    asking = 2 * link.latency_s + far * answer_bytes(config.heads, config.head_dim, size) / link.bytes_per_s
    attention = max(seconds(keys * alone), asking + seconds(keys * far) if far else 0.0)
    products = lambda batch: seconds(decode_cost(config, batch, context, size).products)  # noqa: E731
    return Worth(
        alone,
        together,
        products(alone) + config.layers * seconds(keys * alone),
        products(together) + config.layers * attention,
    )
