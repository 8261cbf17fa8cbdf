"""How pictures speak: captions, units and plain numbers, the same everywhere."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any

from minillm.trace.trace import Category, Kind, Trace
from minillm.viz.style import ACTIVATIONS, COMMUNICATION, DECODE, KV_CACHE, PREFILL, WAITING, WEIGHTS

KIND_COLOURS = {Kind.PREFILL: PREFILL, Kind.DECODE: DECODE, Kind.COMMUNICATION: COMMUNICATION, Kind.WAITING: WAITING}
CATEGORY_COLOURS = {Category.WEIGHTS: WEIGHTS, Category.KV_CACHE: KV_CACHE, Category.ACTIVATIONS: ACTIVATIONS}
_DEVICES = {"cpu": "CPU, one thread a rank", "cuda": "GPU"}


def caption_of(trace: Trace, *more: str) -> str:
    """Clock · device · model · layout · what else the picture's author says, such as the load."""
    about = trace.about
    device = _DEVICES.get(about.get("device", ""), about.get("device", ""))
    model = f"{_short(about.get('model', ''))} {about.get('dtype', '')}".strip()
    ranks = f"{about['ranks']} on {about['cores']} cores" if "ranks" in about else ""
    parts = [trace.clock.value, device, ranks, about.get("link", ""), model, about.get("layout", ""), *more]
    return " · ".join(part for part in parts if part)


def _short(model: str) -> str:
    """Hub owner and converted file's format are not what a reader looks for."""
    return model.rsplit("/", 1)[-1].removesuffix("-1").removesuffix("-Instruct")


def time_unit(longest_s: float) -> tuple[float, str]:
    """What to multiply seconds by, and the unit's name."""
    if longest_s < 2e-3:
        return 1e6, "µs"
    return (1e3, "ms") if longest_s < 2.0 else (1.0, "s")


def byte_unit(most: float) -> tuple[float, str]:
    """What to divide bytes by, and the unit's name; powers of 1000, as on every axis of the course."""
    for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if most >= 2 * size:
            return size, name
    return 1.0, "bytes"


def bytes_text(count: float) -> str:
    """1.2 GB, 34 MB, 120 bytes."""
    size, name = byte_unit(2 * count)
    return f"{plain(count / size)} {name}"


def plain(number: float) -> str:
    """Three digits that a reader can say: 1,230, 45.6, 0.0789."""
    if number == 0:
        return "0"
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}"


def plain_log(axis: Any, which: str = "both") -> None:
    """Plain numbers on logarithmic axes: 0.1, 1, 10, 1,000 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for name in ("x", "y") if which == "both" else (which,):
        side = getattr(axis, f"{name}axis")
        side.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
        side.set_minor_formatter(NullFormatter())


def round_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within the limits of an axis; beyond three decades only the powers."""
    steps = (1, 2, 5) if high < 1000 * low else (1,)
    return [step * 10.0**power for power in range(-9, 15) for step in steps if low <= step * 10.0**power <= high]


def batch_letters(trace: Trace) -> dict[tuple[int, ...], str]:
    """A letter for each batch of requests that goes through several ranks, in order; none for a single one or over 26."""
    batches = dict.fromkeys(
        span.request_ids for span in sorted(trace.spans, key=lambda span: span.start_s) if span.request_ids
    )
    if len(trace.ranks) < 2 or not 2 <= len(batches) <= len(ascii_uppercase):
        return {}
    return dict(zip(batches, ascii_uppercase))
