"""What a forward pass must compute and move, by formula from shapes: floating-point operations and bytes.

A product of [m, k] with [k, n] is 2 m k n operations; it reads both and writes m n numbers. Bytes count each weight
once per pass, and each activation where it is written and where it is read by a product: the least that a device
without a cache for activations could do. No tensors here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from minillm.hardware.devices import Device
from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.policy.batch import Batch, Chunk

USABLE = 0.9  # of a device's memory


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of memory traffic; costs add."""

    flops: int = 0
    memory_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.memory_bytes + other.memory_bytes)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flops * times, self.memory_bytes * times)

    def split(self, parts: int) -> list[Cost]:
        """The same in so many even parts; the first takes what is left over."""
        each = Cost(self.flops // parts, self.memory_bytes // parts)
        rest = Cost(self.flops - (parts - 1) * each.flops, self.memory_bytes - (parts - 1) * each.memory_bytes)
        return [rest, *[each] * (parts - 1)]

    @property
    def intensity(self) -> float:
        """Operations per byte: where the pass stands on a roofline (Williams et al., 2009)."""
        return self.flops / self.memory_bytes if self.memory_bytes else 0.0

    def time_s(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The roofline's time: the slower of computing and moving."""
        return max(self.flops / flops_per_s, self.memory_bytes / bytes_per_s)


@dataclass(frozen=True)
class PassCost:
    """A forward pass in its two parts, which behave differently: products with weights, and attention over the cache."""

    products: Cost
    attention: Cost

    @property
    def total(self) -> Cost:
        """Both."""
        return self.products + self.attention


def cache_room_bytes(config: ModelConfig, device: Device, dtype: str) -> float:
    """What nine tenths of a device's memory leave for the KV cache beside the weights.

    Raises `ValueError` for weights that do not fit.
    """
    weights = config.parameters * DTYPE_BYTES[dtype]
    if weights >= USABLE * device.memory_bytes:
        raise ValueError(
            f"the weights take {weights / 1e9:.1f} GB, and of the {device.memory_bytes / 1e9:.0f} GB of {device.name} "
            f"{USABLE:.0%} are used: they do not fit"
        )
    return USABLE * device.memory_bytes - weights


def product_cost(rows: int, inputs: int, outputs: int, element_bytes: int) -> Cost:
    """[rows, inputs] times a weight [inputs, outputs]."""
    moved = inputs * outputs + rows * (inputs + outputs)
    return Cost(2 * rows * inputs * outputs, moved * element_bytes)


def attention_cost(config: ModelConfig, tokens: int, context: int, element_bytes: int) -> Cost:
    """One layer's attention for `tokens` new tokens of a sequence whose length is then `context`.

    Scores and weighted values take 4 · heads · head_dim operations per pair (token, position it sees); a causal token
    sees only what came before. K and V of the context are read once, queries and outputs moved once.
    """
    start = context - tokens
    pairs = tokens * start + tokens * (tokens + 1) // 2
    flops = 4 * config.heads * config.head_dim * pairs
    moved = 2 * context * config.kv_heads * config.head_dim + 2 * tokens * config.heads * config.head_dim
    return Cost(flops, moved * element_bytes)


def mlp_cost(rows: int, hidden: int, wide: int, element_bytes: int) -> Cost:
    """The two products of an MLP."""
    return product_cost(rows, hidden, 2 * wide, element_bytes) + product_cost(rows, wide, hidden, element_bytes)


def chosen_cost(pairs: int, read: int, hidden: int, wide: int, element_bytes: int) -> Cost:
    """The MLPs of `read` experts for so many pairs of (token, expert)."""
    products = mlp_cost(pairs, hidden, wide, element_bytes)
    return Cost(products.flops, products.memory_bytes + (read - 1) * 3 * hidden * wide * element_bytes)


def experts_cost(config: ModelConfig, rows: int, element_bytes: int) -> Cost:
    """A mixture of experts: its router, `top_k` experts a row, and the shared one, if every expert is chosen as often.

    Of E experts E · (1 − (1 − k/E)^rows) are then read, on average.
    """
    moe, hidden = config.moe, config.hidden_size
    assert moe is not None
    read = min(moe.experts, math.ceil(moe.experts * (1 - (1 - moe.top_k / moe.experts) ** rows)))
    chosen = chosen_cost(rows * moe.top_k, read, hidden, moe.intermediate_size, element_bytes)
    router = product_cost(rows, hidden, moe.experts, element_bytes)
    return router + chosen + mlp_cost(rows, hidden, moe.shared_size, element_bytes)


def block_costs(config: ModelConfig, batch: Batch, element_bytes: int, sparse: bool = False) -> tuple[Cost, Cost, Cost]:
    """What one layer takes: the products of its attention block, its attention, and the products of its MLP, or of its mixture
    of experts.
    """
    rows = sum(len(chunk.token_ids) for chunk in batch.chunks)
    hidden, queries, keys = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim
    project = product_cost(rows, hidden, queries + 2 * keys, element_bytes)
    project += product_cost(rows, queries, hidden, element_bytes)
    dense = mlp_cost(rows, hidden, config.intermediate_size, element_bytes)
    mlp = experts_cost(config, rows, element_bytes) if sparse else dense
    attention = Cost()
    for chunk in batch.chunks:
        attention += attention_cost(config, len(chunk.token_ids), chunk.end, element_bytes)
    return project, attention, mlp


def head_cost(config: ModelConfig, batch: Batch, element_bytes: int, every_row: bool = False) -> Cost:
    """What the LM head takes for the rows that sample, or for every row."""
    asked = sum(len(chunk.token_ids) if every_row else chunk.samples for chunk in batch.chunks)
    return product_cost(asked, config.hidden_size, config.vocab_size, element_bytes) if asked else Cost()


def pass_cost(
    config: ModelConfig, batch: Batch, element_bytes: int | None = None, every_row: bool = False, head: bool = True
) -> PassCost:
    """The cost of `Decoder.forward(batch)`: all products with weights, all attention. Norms and the like are left out.

    Without `head` it is that of the layers alone, as on all stages of a pipeline but the last.
    """
    size = element_bytes or DTYPE_BYTES[config.dtype]
    project, attention, mlp = block_costs(config, batch, size)
    sparse = len(config.moe.layers) if config.moe else 0
    products = project * config.layers + mlp * (config.layers - sparse)
    if sparse:
        products += block_costs(config, batch, size, sparse=True)[2] * sparse
    return PassCost(
        products + head_cost(config, batch, size, every_row) if head else products, attention * config.layers
    )


def decode_cost(config: ModelConfig, batch: int, context: int, element_bytes: int) -> PassCost:
    """One decode step of `batch` requests that have `context` tokens each, the new one included."""
    chunk = Chunk(0, context - 1, (0,), ())
    return pass_cost(config, Batch((chunk,) * batch), element_bytes)
