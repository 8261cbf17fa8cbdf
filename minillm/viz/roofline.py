"""The roofline: how fast work can go at most, by its operations per byte of memory traffic (Williams et al., 2009)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from minillm.hardware.devices import Device
from minillm.trace.trace import Kind, Trace
from minillm.viz.style import FAINT, INK, frame, new_figure
from minillm.viz.words import KIND_COLOURS, caption_of, plain, plain_log


@dataclass(frozen=True)
class Dot:
    """Work on a roofline: `intensity` in operations per byte, `flops_per_s` as measured or as a roof allows."""

    label: str
    intensity: float
    flops_per_s: float
    colour: str


def measured_dots(trace: Trace) -> list[Dot]:
    """A dot per kind and batch of a trace's spans: the median of what they reached."""
    groups: dict[tuple[Kind, int], list[Any]] = {}
    for span in trace.spans:
        if span.flops and span.memory_bytes and span.duration_s > 0:
            size = span.tokens if span.kind is Kind.PREFILL else len(span.request_ids)
            groups.setdefault((span.kind, size), []).append(span)
    dots = []
    for (kind, size), spans in groups.items():
        intensity = median(span.flops / span.memory_bytes for span in spans)
        reached = median(span.flops / span.duration_s for span in spans)
        what = f"{size} tokens" if kind is Kind.PREFILL else f"batch {size}"
        dots.append(Dot(f"{kind.value}, {what}", intensity, reached, KIND_COLOURS[kind]))
    return dots


def draw_roofline(
    device: Device,
    dtype: str,
    dots: Sequence[Dot],
    finding: str,
    caption: str | None = None,
    trace: Trace | None = None,
    shares: bool = True,
) -> Figure:
    """The roof of one device and dots under it, both axes logarithmic, rates in GFLOP/s or TFLOP/s.

    With `shares` every dot says how much it reaches of what the roof allows at its intensity.
    """
    figure, (axis,) = new_figure(4.4)
    unit = 1e12 if device.flops_per_s(dtype) >= 1e13 else 1e9
    peak, ridge = device.flops_per_s(dtype), device.ridge(dtype)
    low = min([0.2, *(dot.intensity / 2 for dot in dots)])
    high = max([16 * ridge, *(dot.intensity * 8 for dot in dots)])
    floor = min([low * device.bytes_per_s, *(dot.flops_per_s for dot in dots)]) / 3.5
    axis.plot([low, ridge, high], [low * device.bytes_per_s / unit, peak / unit, peak / unit], color=INK, linewidth=2)
    axis.vlines(ridge, floor / unit, peak / unit, color=FAINT, linestyle=":", linewidth=1.2)
    axis.text(high / 1.05, peak / unit * 1.12, f"computes at most {_rate(peak)}", ha="right", va="bottom", color=INK)
    before: Dot | None = None
    for dot in sorted(dots, key=lambda dot: dot.intensity):
        axis.plot(dot.intensity, dot.flops_per_s / unit, "o", color=dot.colour, markersize=10, zorder=3)
        share = dot.flops_per_s / min(peak, dot.intensity * device.bytes_per_s)
        left = dot.intensity > (low * high**4) ** 0.2  # near the right edge, the words go to the dot's left
        axis.annotate(
            f"{dot.label}\n{share:.0%} of what the roof allows" if shares else dot.label, (dot.intensity, dot.flops_per_s / unit),
            xytext=(-9 if left else 9, 6 if _near(before, dot) else -3), textcoords="offset points",
            va="bottom" if _near(before, dot) else "top", ha="right" if left else "left",
            fontsize=9.5, color=INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
        before = dot
    axis.set(
        xscale="log", yscale="log", xlim=(low, high), ylim=(floor / unit, peak / unit * 3),
        xlabel="operations per byte of memory traffic", ylabel="TFLOP/s" if unit == 1e12 else "GFLOP/s",
    )  # fmt: skip
    plain_log(axis)
    _name_slope(axis, device, low, ridge, unit)
    ridge_text = f"ridge: {plain(ridge)} operations per byte"
    axis.text(ridge * 0.95, floor / unit * 1.2, ridge_text, ha="right", color=FAINT, fontsize=9.5)
    said = caption_of(trace, f"roof: {device.name}") if trace is not None else f"roof: {device.name}, {device.source}"
    return frame(figure, finding, said if caption is None else caption)


def _near(before: Dot | None, dot: Dot) -> bool:
    """Whether two dots would write over each other's words."""
    if before is None:
        return False
    rates = sorted((before.flops_per_s, dot.flops_per_s))
    return dot.intensity < 4 * before.intensity and rates[1] < 2 * rates[0]


def _name_slope(axis: Any, device: Device, low: float, ridge: float, unit: float) -> None:
    """Write along the sloping part what it is."""
    place = (low * ridge) ** 0.5
    axis.text(
        place, place * device.bytes_per_s / unit * 1.5, f"memory gives at most {plain(device.bytes_per_s / 1e9)} GB/s",
        ha="center", va="bottom", rotation=_angle(axis), rotation_mode="anchor", color=INK,
    )  # fmt: skip


def _angle(axis: Any) -> float:
    """The slope of a line of slope 1 as drawn, in degrees."""
    import math

    (x0, x1), (y0, y1) = axis.get_xlim(), axis.get_ylim()
    width, height = 7.9, 3.4  # inches that the axes take of the figure
    return math.degrees(math.atan2(height / math.log(y1 / y0), width / math.log(x1 / x0)))


def _rate(flops_per_s: float) -> str:
    return f"{plain(flops_per_s / 1e12)} TFLOP/s" if flops_per_s >= 1e12 else f"{plain(flops_per_s / 1e9)} GFLOP/s"
