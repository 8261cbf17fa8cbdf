"""Prefill and decode apart, by formula: how much of a cache's move is seen, over the link; and how many instances should do which."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.disagg.sizing import Rates, cache_bytes, decode_s, prefill_s, seen_s
from minillm.hardware.devices import Device, Link
from minillm.model.config import ModelConfig
from minillm.model.cost import cache_room_bytes
from minillm.policy.options import TRANSFERS
from minillm.viz.style import COMMUNICATION, DECODE, FAINT, INK, PREFILL, frame, legend, new_figure
from minillm.viz.words import bytes_text, plain, plain_log

GBITS = [2 ** (step / 2) for step in range(-2, 19)]  # 0.5 to 362 Gbit/s
COLOURS = dict(zip(TRANSFERS, (COMMUNICATION, "#9c4477", "#5c1f44")))  # of communication, darker as more is hidden
WIDTHS = {"whole": (4.2, "-"), "chunk": (2.4, "--"), "layer": (2.4, "-")}
BEHIND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0}
NAMES = {"whole": "whole, afterwards", "chunk": "chunk by chunk", "layer": "layer by layer"}


def draw_stall(config: ModelConfig, device: Device, dtype: str, tokens: int, gbits: float, caption: str) -> Figure:
    """Milliseconds from the first token until the cache is there, over the link's bandwidth; a line for each way to move it.

    Raises `ValueError` for weights that do not fit the device.
    """
    cache_room_bytes(config, device, dtype)
    figure, (axis,) = new_figure(3.7)
    wire = lambda rate: Link("", rate * 1e9 / 8, 30e-6, "")  # noqa: E731
    read, step = prefill_s(config, device, dtype, tokens), decode_s(config, device, dtype, 16, tokens)
    ends: list[tuple[float, str]] = []
    for way in TRANSFERS:
        seen = [1e3 * seen_s(config, device, wire(rate), dtype, tokens, way) for rate in GBITS]
        wide, dashes = WIDTHS[way]  # lines that coincide are both seen
        axis.plot(GBITS, seen, color=COLOURS[way], linewidth=wide, linestyle=dashes)
        ends.append((seen[-1], way))
    axis.hlines(1e3 * step, GBITS[0], GBITS[-1], color=FAINT, linewidth=1.1, linestyle=":")
    said = f"a decode step of 16 requests: {plain(1e3 * step)} ms"
    axis.annotate(
        said,
        (GBITS[0], 1e3 * step),
        xytext=(6, 4),
        textcoords="offset points",
        fontsize=9.5,
        color=FAINT,
        bbox=BEHIND,
        zorder=5,
    )
    now = {way: 1e3 * seen_s(config, device, wire(gbits), dtype, tokens, way) for way in TRANSFERS}
    axis.axvline(gbits, color=INK, linewidth=1.1, linestyle=":")
    for way, ms in now.items():
        axis.plot([gbits], [ms], "o", color=COLOURS[way], markersize=7, zorder=4)
    axis.set(xscale="log", yscale="log", xlabel="link (Gbit/s)", ylabel="ms until decode can begin")
    at = None
    for value, way in sorted(ends):  # names at the lines' ends, apart from each other
        at = value if at is None else max(value, 2.1 * at)
        axis.text(GBITS[-1] * 1.1, at, NAMES[way], color=COLOURS[way], va="center", fontsize=10, weight="bold")
    axis.set_xlim(GBITS[0], GBITS[-1] * 7)
    axis.set_xticks([each for each in (0.5, 1, 2, 5, 10, 25, 50, 100, 200) if each >= GBITS[0]])
    for side in "xy":
        plain_log(axis, side)
    axis.minorticks_off()
    size = bytes_text(cache_bytes(config, dtype, tokens))
    return frame(
        figure, _finding(now, step, gbits), f"{caption} · {size} of K and V, {plain(1e3 * read)} ms to read the prompt"
    )


def _finding(ms: dict[str, float], step: float, gbits: float) -> str:
    whole, layer = ms["whole"] / 1e3 / step, ms["layer"] / 1e3 / step
    if whole < 1:
        return f"{plain(gbits)} Gbit/s: any way is hidden behind a decode step"
    if layer < 1:
        return f"{plain(gbits)} Gbit/s: layer by layer is hidden, whole costs {plain(whole)} decode steps"
    return f"{plain(gbits)} Gbit/s: too slow, even layer by layer costs {plain(layer)} decode steps"


def draw_ratio(rates: Rates, instances: int, caption: str) -> Figure:
    """Requests/s over how many of the instances read prompts: what each kind lets through, the best split, and all doing both."""
    figure, (axis,) = new_figure(3.7)
    places = range(1, instances)
    reading = [n * rates.prefill for n in places]
    decoding = [(instances - n) * rates.decode for n in places]
    through = [rates.split(n, instances - n) for n in places]
    best, together = rates.best(instances), instances * rates.both
    axis.bar(places, through, width=0.62, color=["#e3e3e3" if n != best else INK for n in places])
    lines = [axis.plot(places, reading, "o-", color=PREFILL, linewidth=2.2)[0]]
    lines += axis.plot(places, decoding, "o-", color=DECODE, linewidth=2.2)
    axis.axhline(together, color=INK, linestyle=":", linewidth=1.3)
    most = max(together, through[best - 1])
    top = min(1.1 * max(reading + decoding + [together]), 5 * most)
    for values, colour, name in ((reading, PREFILL, "prefill"), (decoding, DECODE, "decode")):
        if min(values) > top:
            said = f"{name} lets through {plain(min(values))} and more"
            axis.annotate(said, (instances / 2, 0.86 * top), ha="center", fontsize=10, color=colour, bbox=BEHIND)
    axis.set(ylim=(0, top), xlim=(0.4, instances + 1.0), xlabel="readers : decoders", ylabel="requests/s")
    axis.annotate(
        f"all do both: {plain(together)}" if together else "all do both: not within the goal", (instances + 1.0, together), xytext=(0, 4), textcoords="offset points", ha="right",
        fontsize=10, bbox=BEHIND,
    )  # fmt: skip
    legend(axis, [*lines, Patch(color=INK)], ["prefill lets through", "decode lets through", "the best split"])
    axis.set_xticks(list(places), [f"{n}:{instances - n}" for n in places])
    said = f"{best}:{instances - best} serves {plain(through[best - 1])} requests/s"
    if together:
        said += f", {plain(through[best - 1] / together)} times what all together do"
    else:
        said += "; together, steps with prompts in them break the goal"
    return frame(figure, said, caption)
