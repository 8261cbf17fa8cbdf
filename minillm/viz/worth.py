"""Does borrowing pay? How many times the tokens/s an instance gives with another's idle memory, over the links between them."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from minillm.distkv.worth import Worth
from minillm.viz.style import COMMUNICATION, INK, KV_CACHE, frame, new_figure
from minillm.viz.words import plain


def draw_worth(worths: Mapping[str, Worth], caption: str) -> Figure:
    """A bar for each link, those on which it pays green, with the time of a decode step."""
    figure, (axis,) = new_figure(1.1 + 0.31 * len(worths))
    for place, worth in enumerate(worths.values()):
        axis.barh(place, worth.gain, height=0.68, color=KV_CACHE if worth.gain > 1 else COMMUNICATION)
        said = f"{plain(worth.gain)} ×, {plain(1e3 * worth.together_s)} ms a step"
        axis.text(
            worth.gain + 0.03,
            place,
            said,
            va="center",
            fontsize=10,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    axis.axvline(1.0, color=INK, linewidth=1.1, linestyle=":")
    axis.set_yticks(range(len(worths)), list(worths))
    most = max(1.2, *(each.gain for each in worths.values()))
    axis.set(xlim=(0, 1.35 * most), ylim=(len(worths) - 0.4, -0.6))
    axis.set_xlabel("tokens/s, as a multiple of those without borrowing")
    axis.tick_params(axis="y", length=0)
    return frame(figure, _finding(worths), caption)


def _finding(worths: Mapping[str, Worth]) -> str:
    some = next(iter(worths.values()))
    alone = f"{plain(1e3 * some.alone_s)} ms a step"
    rise = f"1 request, {alone}, becomes {some.together:,}"
    if some.alone > 1:
        rise = f"{some.alone:,} requests, {alone}, become {some.together:,}"
    losing = [name for name, worth in worths.items() if worth.gain <= 1]
    if not losing:
        return f"{rise}: it pays on every link"
    if len(losing) == len(worths):
        return f"{rise}: it pays on none of these links"
    return f"{rise}: it pays down to {[name for name in worths if name not in losing][-1]}"
