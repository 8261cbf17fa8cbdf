"""What users feel, from the lives of requests: percentiles of latencies with their sampling error, throughput, goodput.

A percentile of few requests is a rough guess, so those over requests come with the interval that holds the true one with
a confidence of 95 %, if requests are independent; under load they are not quite, and the error is larger. Gaps between
tokens are shared by all requests of a step, so their percentiles have no interval. The file loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.trace.life import Event, RequestLife

_Z = 1.96  # standard deviations either side of the mean that hold 95 % of a normal distribution


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval that holds the true one with 95 % confidence; None where the data do not bound it."""

    value: float
    low: float | None
    high: float | None

    def text(self, factor: float = 1.0) -> str:
        """The figure times `factor`, in brackets the interval if there is one."""
        if self.low is None and self.high is None:
            return f"{self.value * factor:.0f}"
        low, high = ("?" if bound is None else f"{bound * factor:.0f}" for bound in (self.low, self.high))
        return f"{self.value * factor:.0f} ({low}–{high})"


def percentile(values: Sequence[float], percent: float) -> Estimate:
    """The value that `percent` of all lie at or below (nearest rank), between two order statistics.

    How many of n values lie below the true percentile is binomial; its normal approximation gives the ranks of the
    bounds (David and Nagaraja, Order Statistics, section 7.1). Raises `ValueError` without values.
    """
    if not 0 < percent < 100:
        raise ValueError(f"percent={percent!r}: give a number between 0 and 100")
    if not values:
        raise ValueError("there are no values to take a percentile of")
    ordered, n, share = sorted(values), len(values), percent / 100
    error = _Z * math.sqrt(n * share * (1 - share))
    low, high = math.floor(n * share - error), math.ceil(n * share + error) + 1  # ranks, from 1
    return Estimate(
        ordered[math.ceil(n * share) - 1],
        ordered[low - 1] if low >= 1 else None,
        ordered[high - 1] if high <= n else None,
    )


def proportion(hits: int, total: int) -> Estimate:
    """hits / total with Wilson's interval (1927), which is sound for few and for extreme shares too."""
    if not 0 <= hits <= total or total == 0:
        raise ValueError(f"{hits} of {total} is no share")
    share, z2 = hits / total, _Z**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


@dataclass(frozen=True)
class SLO:
    """A service level objective: a request meets it when both its TTFT and its TPOT do (DistServe, section 2)."""

    ttft_s: float
    tpot_s: float

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: give seconds above 0")

    def met_by(self, life: RequestLife) -> bool:
        """Whether this request was fast enough."""
        return life.ttft_s <= self.ttft_s and life.tpot_s <= self.tpot_s


@dataclass(frozen=True)
class Report:
    """The figures of a run: of all requests that finished, from the first arrival to the last end."""

    lives: tuple[RequestLife, ...]
    slo: SLO | None = None

    @classmethod
    def of(cls, lives: Sequence[RequestLife], slo: SLO | None = None) -> Report:
        """Count the finished requests among `lives`. Raises `ValueError` when there is none."""
        finished = tuple(life for life in lives if life.moments and life.moments[-1][0] is Event.FINISHED)
        if not finished:
            raise ValueError("no request has finished: there is nothing to report")
        return cls(finished, slo)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last end."""
        ends = [life.moments[-1][1] for life in self.lives]
        return max(ends) - min(life.first(Event.ARRIVED) for life in self.lives)

    @property
    def output_tokens(self) -> int:
        """All tokens generated."""
        return sum(len(life.token_s) for life in self.lives)

    @property
    def tokens_per_s(self) -> float:
        """Output throughput."""
        return self.output_tokens / self.duration_s

    @property
    def requests_per_s(self) -> float:
        """Finished requests per second."""
        return len(self.lives) / self.duration_s

    def latency(self, kind: str, percent: float) -> Estimate:
        """A percentile in seconds of "ttft", "tpot", "e2e" or "queue" over requests, or of "itl" over all gaps."""
        if kind not in ("ttft", "tpot", "e2e", "queue", "itl"):
            raise ValueError(f"{kind!r} is no latency: choose ttft, tpot, itl, e2e or queue")
        if kind == "itl":
            gaps = [gap for life in self.lives for gap in life.itl_s]
            return Estimate(percentile(gaps or [0.0], percent).value, None, None)
        several = [life for life in self.lives if kind != "tpot" or len(life.token_s) > 1] or self.lives
        return percentile([getattr(life, f"{kind}_s") for life in several], percent)

    @property
    def attainment(self) -> Estimate:
        """Share of requests that met the SLO. Raises `ValueError` without one."""
        return proportion(self._met, len(self.lives))

    @property
    def goodput_per_s(self) -> float:
        """Requests per second that met the SLO. (DistServe's goodput is the highest rate at which, say, 90 % meet it:
        found by running at several rates.)
        """
        return self._met / self.duration_s

    @property
    def _met(self) -> int:
        if self.slo is None:
            raise ValueError("there is no SLO: give SLO(ttft_s=…, tpot_s=…)")
        return sum(self.slo.met_by(life) for life in self.lives)

    def as_dict(self) -> dict[str, object]:
        """All figures, for JSON."""
        figures: dict[str, object] = {
            "requests": len(self.lives),
            "duration_s": self.duration_s,
            "output_tokens": self.output_tokens,
            "tokens_per_s": self.tokens_per_s,
            "requests_per_s": self.requests_per_s,
        }
        for kind in ("ttft", "tpot", "itl", "e2e", "queue"):
            figures[f"{kind}_s"] = {f"p{percent}": vars(self.latency(kind, percent)) for percent in (50, 90, 99)}
        if self.slo is not None:
            figures |= {
                "slo": vars(self.slo),
                "attainment": vars(self.attainment),
                "goodput_per_s": self.goodput_per_s,
            }
        return figures

    def as_text(self) -> str:
        """A table with units; in brackets the 95 % interval."""
        lines = [
            f"{len(self.lives)} requests in {self.duration_s:.1f} s: {self.requests_per_s:.2f} requests/s, "
            f"{self.tokens_per_s:.1f} output tokens/s",
            f"{'ms':6}" + "".join(f"{f'P{percent}':>26}" for percent in (50, 90, 99)),
        ]
        for kind, name in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2e", "E2E"), ("queue", "queue")):
            cells = [self.latency(kind, percent).text(1e3) for percent in (50, 90, 99)]
            lines.append(f"{name:6}" + "".join(f"{cell:>26}" for cell in cells))
        if self.slo is not None:
            share = self.attainment.text(100)
            lines.append(
                f"SLO TTFT ≤ {self.slo.ttft_s:g} s and TPOT ≤ {self.slo.tpot_s:g} s: met by {share} %, "
                f"goodput {self.goodput_per_s:.2f} requests/s"
            )
        return "\n".join(lines)
