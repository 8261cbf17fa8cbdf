"""How long a step takes, by one of three models: fitted coefficients, measured curves, the roofline of a device. No torch.

A decode step of a given batch is linear in the context that it reads, in all three: that lets a simulation leap over steps.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from minillm.hardware.devices import Device, Link
from minillm.hardware.profiles import (
    DISTSERVE,
    LARGE_BATCH,
    SPLITWISE_PROMPT,
    SPLITWISE_TOKEN,
    SPLITWISE_TOKEN_RELEASED,
    Curve,
    Fit,
)
from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.model.cost import PassCost, decode_cost, pass_cost
from minillm.policy.batch import Batch, Chunk


class Costs(Protocol):
    """Seconds of a step on one machine."""

    @property
    def stages(self) -> int:
        """Of a pipeline, which share a step evenly."""

    def prompt_s(self, tokens: int, squares: int) -> float:
        """So many prompt tokens are read; `squares` is Σ (end² - start²) over their chunks: what attention sees, twice."""

    def decode(self, batch: int) -> tuple[float, float]:
        """A decode step of so many requests: seconds, and seconds more for each token of all their contexts."""

    def mixed_s(self, tokens: int, squares: int, batch: int, context: int) -> float:
        """Both in one step."""


@dataclass(frozen=True)
class Fitted:
    """DistServe's model (appendix A, as released): a step of prompts takes a + b · tokens + c · Σ length², a decode step
    a + b · context + c · batch. With `stages` each of them takes an even part; a decoding machine has one batch in each.
    """

    fit: Fit
    stages: int = 1

    @classmethod
    def published(cls, model: str, tp: int, stages: int = 1, engine: str = "DistServe") -> Fitted:
        """The coefficients of an engine, a model and so many tensor parallel ranks. Raises `ValueError` that lists those known."""
        try:
            return cls(DISTSERVE[engine, model, tp], stages)
        except KeyError:
            known = ", ".join(f"{name} {each} tp={n}" for name, each, n in DISTSERVE)
            raise ValueError(f"nothing is published for {engine} {model} tp={tp}; there are {known}") from None

    def prompt_s(self, tokens: int, squares: int) -> float:
        a, b, c = self.fit.prompt
        return (a + b * tokens + c * squares) / 1e3

    def decode(self, batch: int) -> tuple[float, float]:
        each = -(-batch // self.stages)
        a, b, c = self.fit.small if each < LARGE_BATCH else self.fit.large
        return (a + c * each) / 1e3, b / self.stages / 1e3

    def mixed_s(self, tokens: int, squares: int, batch: int, context: int) -> float:
        return self.prompt_s(tokens + batch, squares) + self.decode(batch)[1] * context


@dataclass(frozen=True)
class Measured:
    """Splitwise's model: a step of prompts takes what the curve says of its tokens, a decode step what its curve says of its requests; a
    step of both takes `mixed` times what its tokens would take as prompts. `slower` multiplies prompts on a machine whose power is capped.
    """

    prompts: Curve
    tokens: Curve
    mixed: float = 1.1
    slower: float = 1.0
    stages: int = 1

    @classmethod
    def published(cls, model: str, gpu: str, capped: bool = False, as_released: bool = False) -> Measured:
        """The curves of a model on eight GPUs. `as_released` reads decode times as the released simulator does: almost the same for any
        batch. Raises `ValueError` that lists those known.
        """
        if (model, gpu) not in SPLITWISE_PROMPT:
            known = ", ".join(f"{each} on {name}" for each, name in SPLITWISE_PROMPT)
            raise ValueError(f"nothing is published for {model} on {gpu}; there are {known}")
        curves = SPLITWISE_TOKEN_RELEASED if as_released else SPLITWISE_TOKEN
        return cls(SPLITWISE_PROMPT[model, gpu], curves[model, gpu], slower=1.3 if capped else 1.0)

    def prompt_s(self, tokens: int, squares: int) -> float:
        return self.slower * at(self.prompts, tokens) / 1e3

    def decode(self, batch: int) -> tuple[float, float]:
        return at(self.tokens, batch) / 1e3, 0.0

    def mixed_s(self, tokens: int, squares: int, batch: int, context: int) -> float:
        return self.mixed * self.prompt_s(tokens + batch, squares)


@lru_cache(65_536)
def at(curve: Curve, x: float) -> float:
    """The curve at x: between its points a line, and beyond them the line of the two outermost."""
    right = min(max(1, bisect_right(curve.xs, x)), len(curve.xs) - 1)
    x0, x1, y0, y1 = curve.xs[right - 1], curve.xs[right], curve.ms[right - 1], curve.ms[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True)
class Roofline:
    """A model on `tp` ranks of a device: products, then attention, each as long as the slower of computing and moving, and two sums a
    layer over the `link` between the ranks (ring). A real engine is slower.
    """

    config: ModelConfig
    device: Device
    dtype: str
    tp: int = 1
    link: Link | None = None
    stages: int = 1
    _decodes: dict[int, tuple[float, float]] = field(default_factory=dict, compare=False)

    def prompt_s(self, tokens: int, squares: int) -> float:
        one = self._cost(tokens)
        pairs = squares / (tokens * tokens)  # of one prompt as long as all
        products, attention = self._time(one.products), self._time(one.attention)
        return products + attention * pairs + self._sums_s(tokens)

    def decode(self, batch: int) -> tuple[float, float]:
        if batch not in self._decodes:
            near, far = (self._step_s(batch, context) for context in (1_000, 2_000))
            slope = (far - near) / (1_000 * batch)
            self._decodes[batch] = near - slope * 1_000 * batch + self._sums_s(batch), slope
        return self._decodes[batch]

    def mixed_s(self, tokens: int, squares: int, batch: int, context: int) -> float:
        return self.prompt_s(tokens + batch, squares) + self.decode(batch)[1] * context

    def _cost(self, tokens: int) -> PassCost:
        return pass_cost(self.config, Batch((Chunk(0, 0, (0,) * tokens, ()),)), DTYPE_BYTES[self.dtype])

    def _step_s(self, batch: int, context: int) -> float:
        cost = decode_cost(self.config, batch, context, DTYPE_BYTES[self.dtype])
        return self._time(cost.products) + self._time(cost.attention)

    def _time(self, cost: object) -> float:
        return cost.time_s(self.device.flops_per_s(self.dtype), self.device.bytes_per_s) / self.tp  # type: ignore[attr-defined]

    def _sums_s(self, tokens: int) -> float:
        """Two all-reduces a layer: 2 (n - 1) / n of the hidden states, and 2 (n - 1) hops."""
        if self.tp == 1 or self.link is None:
            return 0.0
        moved = 2 * (self.tp - 1) / self.tp * tokens * self.config.hidden_size * DTYPE_BYTES[self.dtype]
        hops = 2 * (self.tp - 1) * self.link.latency_s
        return 2 * self.config.layers * (moved / self.link.bytes_per_s + hops)
