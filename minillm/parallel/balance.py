"""Where to cut a model into pipeline stages so that the heaviest stage is as light as it can be.

What a layer weighs may be bytes, or seconds; the embedding comes on top in the first stage, the LM head in the last.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minillm.hardware.devices import Device
from minillm.kv.paged import PagedCache
from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.model.cost import pass_cost, product_cost
from minillm.model.decoder import Decoder
from minillm.policy.batch import Batch, Chunk

ROUNDS = 5
BLOCK = 64


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a model take for a batch: the embedding, one layer, and the LM head."""

    embedding_s: float
    layer_s: float
    head_s: float


def balance(layers: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0) -> tuple[int, ...]:
    """How many layers each stage takes so that the heaviest stage weighs least; of equals, the more even.

    `layers` are the weights of the layers, `first` and `last` what the first and the last stage have on top. Exact, by
    dynamic programming over (stages, layers). Raises `ValueError` for more stages than layers.
    """
    count = len(layers)
    if not 1 <= stages <= count:
        raise ValueError(f"{count} layers cannot be cut into {stages} stages: each needs a layer at least")
    upto = [0.0]
    for each in layers:
        upto.append(upto[-1] + each)

    def weight(stage: int, begin: int, end: int) -> float:
        return upto[end] - upto[begin] + (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)

    best: dict[int, tuple[float, float, tuple[int, ...]]] = {
        0: (0.0, 0.0, ())
    }  # layers used -> heaviest, squares, cuts
    for stage in range(stages):
        ends = range(stage + 1, count - (stages - stage - 1) + 1)
        best = {
            end: min(
                (
                    max(heaviest, weight(stage, begin, end)),
                    squares + weight(stage, begin, end) ** 2,
                    (*cuts, end - begin),
                )
                for begin, (heaviest, squares, cuts) in best.items()
                if begin < end
            )
            for end in ends
        }
    return best[count][2]


def measure_costs(model: Decoder, sequences: int, tokens: int, context: int = 0) -> Costs:
    """What a batch takes on this CPU, in the thread's own time: `tokens` new ones of each of some `sequences`, after
    `context` others. Medians of a few rounds.
    """
    batch = _batch(sequences, tokens, context)
    cache = PagedCache(model.config, batch.chunks[-1].block_table[-1] + 1, BLOCK, model.device, model.dtype)
    with torch.inference_mode():
        embedding_s, x = _timed(lambda: model.embed(batch))
        layers_s, x = _timed(lambda: model.through(x, batch, cache))
        head_s, _ = _timed(lambda: model.logits(x, batch))
    return Costs(embedding_s, layers_s / model.config.layers, head_s)


def predict_costs(
    config: ModelConfig, device: Device, dtype: str, sequences: int, tokens: int, context: int = 0
) -> Costs:
    """What such a batch takes on a device of the table, by the roofline: each part the slower of its operations and its
    bytes. Raises `ValueError` for a dtype that the device has no rate for.
    """
    batch, size = _batch(sequences, tokens, context), DTYPE_BYTES[dtype]
    rates = device.flops_per_s(dtype), device.bytes_per_s
    layers = pass_cost(config, batch, size, head=False).total
    head = product_cost(sequences, config.hidden_size, config.vocab_size, size)
    rows = 2 * sequences * tokens * config.hidden_size * size  # read from the table, written
    return Costs(rows / device.bytes_per_s, layers.time_s(*rates) / config.layers, head.time_s(*rates))


def _batch(sequences: int, tokens: int, context: int) -> Batch:
    """`tokens` new ones of each of some sequences, after `context` others, in blocks of their own."""
    blocks = -(-(context + tokens) // BLOCK)
    tables = [tuple(range(number * blocks, (number + 1) * blocks)) for number in range(sequences)]
    return Batch(tuple(Chunk(n, context, (1,) * tokens, table) for n, table in enumerate(tables)))


def _timed(job: Callable[[], Any]) -> tuple[float, Any]:
    job()
    seconds = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        result = job()
        seconds.append(time.thread_time() - began)
    return statistics.median(seconds), result
