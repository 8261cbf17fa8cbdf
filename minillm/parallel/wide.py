"""One layer's experts over very many devices (wide EP), by formula: what every token sends, what a device reads and computes,
and how long all wait for the fullest one. Nothing is run.

Every device has as many tokens, and the router prefers no expert, but for the `imbalance` given: the fullest device's share over
the mean. Weights and what is dispatched are in eight bits where the device computes in them, and in sixteen otherwise; what
is combined is in sixteen (DeepSeek-V3 Technical Report, section 3.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from minillm.hardware.devices import Device, Link
from minillm.model.cost import USABLE, Cost
from minillm.model.shapes import Mixture


@dataclass(frozen=True)
class ExpertsTime:
    """Seconds of one layer's experts on the fullest of `ranks` devices, each of which holds `held` experts: `dispatch_s`, what they
    read or compute, `combine_s`.
    """

    ranks: int
    held: int
    dispatch_s: float
    reads_s: float
    computes_s: float
    combine_s: float
    fits: bool  # whether the experts of all layers leave room in the memory that is used

    @property
    def experts_s(self) -> float:
        """The roofline's: the longer of reading weights and computing."""
        return max(self.reads_s, self.computes_s)

    @property
    def total_s(self) -> float:
        """One after another."""
        return self.dispatch_s + self.experts_s + self.combine_s


def held_experts(mixture: Mixture, ranks: int) -> int:
    """Experts of a layer on each device; where they do not divide, some are there twice (`redundant_experts`)."""
    return -(-mixture.experts // ranks)


def rows_sent(mixture: Mixture, ranks: int, once: bool) -> float:
    """How many times a token leaves its device, on average: for each expert elsewhere or, with `once`, for each device that has
    some of its experts. Of R devices with e of E experts each, R · (1 − C(E − e, k) / C(E, k)) have some of k.
    """
    held = held_experts(mixture, ranks)
    slots = held * ranks
    if not once:
        return mixture.top_k * (1 - 1 / ranks)
    return (ranks - 1) * (1 - comb(slots - held, mixture.top_k) / comb(slots, mixture.top_k))


def experts_time(
    mixture: Mixture, device: Device, link: Link, ranks: int, tokens: int, imbalance: float = 1.0, once: bool = True
) -> ExpertsTime:
    """One layer when each of `ranks` devices has so many tokens. Raises `ValueError` for more devices than experts."""
    if not 1 <= ranks <= mixture.experts:
        raise ValueError(f"{ranks} devices for {mixture.experts} experts: give 1 to {mixture.experts}")
    dtype, width = ("float8", 1) if "float8" in device.flops else ("float16", 2)
    held, pairs = held_experts(mixture, ranks), imbalance * tokens * mixture.top_k
    rows = imbalance * tokens * rows_sent(mixture, ranks, once)
    asked = held * (1 - (1 - mixture.top_k / mixture.experts) ** (tokens * ranks))  # experts that somebody chose
    cost = Cost(round(2 * pairs * mixture.expert_numbers), round(asked * mixture.expert_numbers * width))
    weights = held * mixture.layers * mixture.expert_numbers * width
    send = (lambda size: link.time_s(rows * mixture.hidden_size * size)) if ranks > 1 else (lambda size: 0.0)
    return ExpertsTime(
        ranks,
        held,
        send(width),
        cost.memory_bytes / device.bytes_per_s,
        cost.flops / device.flops_per_s(dtype),
        send(2),
        weights <= USABLE * device.memory_bytes,
    )
