"""One query that attends to keys on several ranks: each on its own scale, and then on the largest score's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.distkv.attention import Partial, merge_all, partial_attention
from minillm.viz.style import FAINT, GUESS, INK, KV_CACHE, frame, legend, new_figure


def parts_of(scores: Sequence[float], values: Sequence[float], lengths: Sequence[int]) -> list[Partial]:
    """What each rank says of its own keys: one query, one head, a number as value. Raises `ValueError` for lengths that are not all keys."""
    if sum(lengths) != len(scores):
        raise ValueError(f"{sum(lengths)} keys on the ranks, but there are {len(scores)}")
    q = torch.ones(1, 1, 1, dtype=torch.float64)  # so that a key is its score
    keys = torch.tensor(scores, dtype=torch.float64).split(list(lengths))
    held = torch.tensor(values, dtype=torch.float64).split(list(lengths))
    return [partial_attention(q, k.view(1, -1, 1), v.view(1, -1, 1)) for k, v in zip(keys, held)]


def draw_merge(scores: Sequence[float], values: Sequence[float], lengths: Sequence[int], caption: str) -> Figure:
    """A bar for each key: pale what it counts on its rank, full what it counts among all. Below, its value, and what each rank says; at the right,
    what becomes of it, and the mean of the ranks' own answers.
    """
    parts = parts_of(scores, values, lengths)
    most = max(scores)
    merged = merge_all(parts).finish().item()
    mean = sum(part.finish().item() for part in parts if part.l.item()) / sum(part.l.item() > 0 for part in parts)
    figure, (axis,) = new_figure(3.7)
    at = 0.0
    for rank, (part, count) in enumerate(zip(parts, lengths)):
        width = max(count, 2)
        begin = sum(lengths[:rank])
        for n in range(count):
            score, x = scores[begin + n], at + n + (width - count) / 2
            mine = float(torch.tensor(score - part.m.item()).exp())
            among_all = float(torch.tensor(score - most).exp())
            axis.bar(x, mine, width=0.8, facecolor="#d9efe7", edgecolor=KV_CACHE, linewidth=0.8)
            axis.bar(x, among_all, width=0.8, color=KV_CACHE)
            axis.text(x, -0.03, f"{values[begin + n]:g}", ha="center", va="top", fontsize=9.5, color=INK)
        middle = at + (width - 1) / 2
        m, total, o = (each.item() for each in (part.m, part.l, part.o))
        said = f"m {m:.1f}".replace("-", "−") + f"\nl {total:.2f}\no {o:.2f}" if count else "m −∞\nl 0\no 0"
        axis.text(middle, -0.15, f"rank {rank}", ha="center", va="top", fontsize=10, weight="bold", color=INK)
        axis.text(middle, -0.27, said, ha="center", va="top", fontsize=9.5, color=INK, linespacing=1.35)
        at += width + 1.0
    axis.text(-1.15, -0.03, "value", ha="right", va="top", fontsize=9.5, color=INK)
    axis.text(at + 0.2, 0.92, f"merged: {merged:.3f}", fontsize=11, weight="bold", color=KV_CACHE, va="center")
    if sum(count > 0 for count in lengths) > 1:
        axis.text(at + 0.2, 0.70, f"mean of the ranks'\nown answers: {mean:.3f}", fontsize=10, color=GUESS, va="center")
    axis.text(
        at + 0.2,
        0.30,
        "Σ o · e^(m − M)\n―――――――\nΣ l · e^(m − M)\nM: the largest m",
        fontsize=10,
        color=FAINT,
        va="center",
    )
    axis.set(xlim=(-1.0, at + 6.5), ylim=(-0.72, 1.12), xticks=[], yticks=[0.5, 1], ylabel="weight of a key")
    axis.spines["left"].set_bounds(0, 1)
    axis.spines["bottom"].set_visible(False)
    axis.yaxis.set_label_coords(-0.045, 0.68)
    legend(
        axis,
        [Patch(facecolor="#d9efe7", edgecolor=KV_CACHE), Patch(color=KV_CACHE)],
        ["on its rank: e^(s − m)", "among all: e^(s − M)"],
    )
    return frame(figure, _finding(lengths, merged, mean), caption)


def _finding(lengths: Sequence[int], merged: float, mean: float) -> str:
    asked = sum(count > 0 for count in lengths)
    if asked == 1:
        return "All keys on one rank: its own scale is everybody's"
    empty = ", and an empty one changes nothing" if asked < len(lengths) else ""
    if abs(mean - merged) < 0.05:
        return f"Here the mean of the answers is not far off; the merge is exact{empty}"
    return f"The merge puts all ranks on one scale{empty}"
