"""Requests that come: when, how long their prompts are, and how much they want. Drawn, or read from a trace file.

The lengths are those of the Azure LLM inference traces (Patel et al., Splitwise, section III; CC-BY-4.0, on GitHub in
Azure/AzurePublicDataset). The file loads no torch and knows no engine.
"""

from __future__ import annotations

import csv
import math
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from random import Random

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
TRACES = {
    "azure-conversation": "AzureLLMInferenceTrace_conv.csv",
    "azure-code": "AzureLLMInferenceTrace_code.csv",
}


@dataclass(frozen=True)
class Arrival:
    """One request to come: seconds after the start, tokens of its prompt, tokens it will generate."""

    time_s: float
    prompt_tokens: int
    new_tokens: int

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.new_tokens < 1:
            raise ValueError(f"{self.prompt_tokens} prompt and {self.new_tokens} new tokens: give at least 1 of each")


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths: half are below the median, and the logarithm's standard deviation is `spread`."""

    prompt_median: float
    prompt_spread: float
    new_median: float
    new_spread: float

    def draw(self, random: Random) -> tuple[int, int]:
        """(prompt tokens, new tokens) of one request, drawn apart from each other; at least 1 each."""
        prompt = self.prompt_median * math.exp(random.gauss(0, self.prompt_spread))
        new = self.new_median * math.exp(random.gauss(0, self.new_spread))
        return max(1, round(prompt)), max(1, round(new))


@dataclass(frozen=True)
class Quantiles:
    """Lengths by the percentiles `PERCENTS` of a trace's, evenly between them; prompts and answers apart (they are hardly correlated there)."""

    prompts: tuple[int, ...]
    news: tuple[int, ...]

    def draw(self, random: Random) -> tuple[int, int]:
        """(prompt tokens, new tokens) of one request."""
        return _at(self.prompts, random.uniform(0, 100)), _at(self.news, random.uniform(0, 100))


def _at(values: Sequence[int], percent: float) -> int:
    right = min(max(1, bisect_right(PERCENTS, percent)), len(PERCENTS) - 1)
    share = (percent - PERCENTS[right - 1]) / (PERCENTS[right] - PERCENTS[right - 1])
    return round(values[right - 1] + share * (values[right] - values[right - 1]))


PERCENTS = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 100)
TRACED = {  # computed from the published traces
    "azure-conversation": Quantiles(
        (2, 29, 181, 207, 387, 403, 703, 1020, 1071, 1130, 1315, 2734, 4083, 4142, 14050),
        (7, 16, 41, 54, 77, 91, 103, 129, 177, 384, 400, 424, 451, 601, 1000),
    ),
    "azure-code": Quantiles(
        (3, 17, 75, 147, 385, 770, 1075, 1469, 1909, 2433, 3192, 5187, 7303, 7436, 7437),
        (6, 6, 6, 7, 8, 9, 11, 13, 16, 20, 29, 55, 90, 251, 1899),
    ),
}

# medians as published (Splitwise, section III); spreads of the logarithms computed from the published traces
PUBLISHED = {
    "azure-conversation": Lengths(1020, 0.985, 129, 0.859),
    "azure-code": Lengths(1469, 1.360, 13, 0.847),
}


def poisson(count: int, rate_per_s: float, lengths: Lengths, random: Random) -> list[Arrival]:
    """`count` requests whose gaps are exponential, `rate_per_s` of them in a second on average; inf: all at once."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count={count!r}: give a whole number of requests from 1")
    if not rate_per_s > 0:
        raise ValueError(f"rate_per_s={rate_per_s!r}: give requests per second above 0, or inf for all at once")
    time_s, arrivals = 0.0, []
    for _ in range(count):
        time_s += random.expovariate(rate_per_s) if math.isfinite(rate_per_s) else 0.0
        arrivals.append(Arrival(time_s, *lengths.draw(random)))
    return arrivals


def read_trace(path: str | Path) -> list[Arrival]:
    """The requests of an Azure trace, `time_s` counted from the first.

    Raises `ValueError` that names the line for whatever is not a time and two whole numbers from 0.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file") from None
    rows = list(csv.reader(text.splitlines()))
    if not rows or tuple(cell.strip() for cell in rows[0]) != COLUMNS:
        raise ValueError(f"{path}, line 1: the columns must be {','.join(COLUMNS)}")
    arrivals = [_arrival(path, line, row) for line, row in enumerate(rows[1:], 2) if row]
    if not arrivals:
        raise ValueError(f"{path} holds no requests")
    start = min(arrival.time_s for arrival in arrivals)
    return sorted((replace(arrival, time_s=arrival.time_s - start) for arrival in arrivals), key=lambda a: a.time_s)


def find_trace(name: str) -> Path | None:
    """Where a published trace lies: in the folder that MINILLM_DATA names, or in ../shared/data beside the course."""
    if name not in TRACES:
        raise ValueError(f"there is no trace {name!r}; choose one of {', '.join(TRACES)}")
    folders = [os.environ.get("MINILLM_DATA"), Path(__file__).parents[3] / "shared" / "data"]
    files = [Path(folder) / TRACES[name] for folder in folders if folder]
    return next((file for file in files if file.exists()), None)


def resample(arrivals: Sequence[Arrival], count: int, rate_per_s: float) -> list[Arrival]:
    """The first `count` requests of a trace with their gaps stretched to `rate_per_s` on average; inf: all at once."""
    if not rate_per_s > 0:
        raise ValueError(f"rate_per_s={rate_per_s!r}: give requests per second above 0, or inf for all at once")
    if not 1 <= count <= len(arrivals):
        raise ValueError(f"count={count!r}: give a whole number from 1 to the trace's {len(arrivals)} requests")
    chosen = list(arrivals[:count])
    span_s = chosen[-1].time_s - chosen[0].time_s
    factor = (len(chosen) - 1) / rate_per_s / span_s if span_s > 0 else 0.0
    return [replace(arrival, time_s=(arrival.time_s - chosen[0].time_s) * factor) for arrival in chosen]


def fit(arrivals: Sequence[Arrival], factor: float, longest: int) -> list[Arrival]:
    """All lengths times `factor`, then cut so that prompt and new tokens together are at most `longest`."""
    if not 0 < factor < math.inf:
        raise ValueError(f"factor={factor!r}: give a number above 0")
    fitted = []
    for arrival in arrivals:
        new = min(max(1, round(arrival.new_tokens * factor)), longest - 1)
        prompt = min(max(1, round(arrival.prompt_tokens * factor)), longest - new)
        fitted.append(Arrival(arrival.time_s, prompt, new))
    return fitted


def _arrival(path: Path, line: int, row: list[str]) -> Arrival:
    if len(row) != len(COLUMNS):
        raise ValueError(f"{path}, line {line}: {len(row)} values where {len(COLUMNS)} are expected")
    try:
        time_s = datetime.fromisoformat(_six_digits(row[0].strip())).timestamp()
    except ValueError:
        raise ValueError(f"{path}, line {line}: {row[0]!r} is not a time such as 2023-11-16 18:15:46.68") from None
    counts = []
    for name, cell in zip(COLUMNS[1:], row[1:]):
        if not cell.strip().isdecimal():
            raise ValueError(f"{path}, line {line}: {name} is {cell!r}; give a whole number from 0")
        counts.append(max(1, int(cell)))
    return Arrival(time_s, *counts)


def _six_digits(text: str) -> str:
    """A time with at most microseconds, which is all that `datetime` reads."""
    whole, dot, fraction = text.partition(".")
    return whole + dot + fraction[:6].ljust(6, "0") if dot else whole
