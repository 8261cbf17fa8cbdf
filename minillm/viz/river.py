"""The token river: tokens on the left, ranks on the right, a ribbon from each token to every rank that has one of its experts;
and how long each rank computes, while the others wait for the fullest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from minillm.parallel.exchange import destinations
from minillm.policy.experts import Placement
from minillm.viz.style import COMMUNICATION, FAINT, INK, PREFILL, WAITING, frame, new_figure

GAP = 0.04  # of the height, between ranks
WORDS, BANK, BOX, BARS, END = 0.0, 0.44, 0.58, 0.62, 0.97  # across: ribbons, rank boxes, bars
MOST = 32  # tokens that can still be read


def draw_river(
    words: Sequence[str],
    chosen: Sequence[Sequence[int]],
    placement: Placement,
    finding: str,
    caption: str,
    most: int = 0,
) -> Figure:
    """`chosen` has the experts of every token, whose texts are `words`. Bars count products: a token's, by one expert; they have
    room for `most`, so that pictures can be compared.

    Raises `ValueError` for more tokens than can be read.
    """
    if not 0 < len(words) == len(chosen) <= MOST:
        raise ValueError(
            f"{len(words)} words and the choices of {len(chosen)} tokens: give as many of both, at most {MOST}"
        )
    goes_to = destinations(torch.tensor(chosen), placement).tolist()
    work = [sum(row.count(rank) for row in goes_to) for rank in range(len(placement.ranks))]
    figure, (axis,) = new_figure(1.6 + 0.19 * max(len(words), 16))
    boxes = _boxes(work)
    _ribbons(axis, goes_to, boxes, work.index(max(work)))
    height = 1 / len(words)
    for number, word in enumerate(words):
        text = word.strip() or word.replace(" ", "␣").replace("\n", "\\n")
        text = "(byte)" if "\ufffd" in text else text  # of a character that is several tokens
        axis.text(
            WORDS - 0.008, 1 - (number + 0.5) * height, text, ha="right", va="center", fontsize=9, family="monospace"
        )
    for rank, (low, high) in enumerate(boxes):
        _rank(axis, rank, placement.held(rank), low, high)
        _bar(axis, work, rank, (low + high) / 2, min(0.06, 0.55 / len(work)), (END - BARS) / max(*work, most))
    _scale(axis, work, (END - BARS) / max(*work, most))
    axis.set(xlim=(-0.13, 1.0), ylim=(-0.15, 1.08))
    axis.axis("off")
    return frame(figure, finding, caption)


def _boxes(work: Sequence[int]) -> list[tuple[float, float]]:
    """From where to where each rank reaches, the first one on top; as high as it has much to do."""
    room, at, boxes = 1 - GAP * (len(work) - 1), 1.0, []
    least = 0.045
    heights = np.array([max(least, room * each / sum(work)) for each in work])
    for height in heights * room / heights.sum():
        boxes.append((at - height, at))
        at -= height + GAP
    return boxes


def _ribbons(axis: Any, goes_to: Sequence[Sequence[int]], boxes: Sequence[tuple[float, float]], fullest: int) -> None:
    """One for each token and rank, however many of its experts are there."""
    ways = [sorted(set(row)) for row in goes_to]
    coming = [sum(rank in way for way in ways) for rank in range(len(boxes))]
    landed, height = [0] * len(boxes), 1 / len(ways)
    for number, way in enumerate(ways):
        top = 1 - (number + 0.1) * height
        for place, rank in enumerate(way):
            thick = 0.8 * height / len(way)
            low, high = boxes[rank]
            there = (high - low) / coming[rank]
            left = top - place * thick, top - (place + 1) * thick
            right = high - landed[rank] * there, high - (landed[rank] + 1) * there
            landed[rank] += 1
            _ribbon(axis, left, right, 0.75 if rank == fullest else 0.28)


def _ribbon(axis: Any, left: tuple[float, float], right: tuple[float, float], alpha: float) -> None:
    middle = (WORDS + BANK) / 2
    points = [
        (WORDS, left[0]), (middle, left[0]), (middle, right[0]), (BANK, right[0]), (BANK, right[1]), (middle, right[1]),
        (middle, left[1]), (WORDS, left[1]), (WORDS, left[0]),
    ]  # fmt: skip
    bend = [Path.CURVE4] * 3
    path = Path(points, [Path.MOVETO, *bend, Path.LINETO, *bend, Path.CLOSEPOLY])
    axis.add_patch(PathPatch(path, facecolor=COMMUNICATION, edgecolor="none", alpha=alpha))


def _rank(axis: Any, rank: int, experts: Sequence[int], low: float, high: float) -> None:
    axis.add_patch(Rectangle((BANK, low), BOX - BANK, high - low, facecolor="#f2f2f2", edgecolor=FAINT, linewidth=0.8))
    names = [str(expert) for expert in experts]
    if len(names) > 3 and list(experts) == list(range(experts[0], experts[-1] + 1)):
        names = [f"{experts[0]}–{experts[-1]}"]
    text = f"rank {rank}: {', '.join(names)}"
    axis.text((BANK + BOX) / 2, (low + high) / 2, _folded(text), ha="center", va="center", fontsize=8.5, color=INK)


def _folded(text: str, most: int = 20) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, most))


def _bar(axis: Any, work: Sequence[int], rank: int, middle: float, half: float, unit: float) -> None:
    """What a rank computes, then how long it waits for the fullest; a product is `unit` wide."""
    axis.add_patch(Rectangle((BARS, middle - half / 2), work[rank] * unit, half, facecolor=PREFILL))
    if work[rank] < max(work):
        axis.add_patch(
            Rectangle(
                (BARS + work[rank] * unit, middle - half / 2), (max(work) - work[rank]) * unit, half, facecolor="white",
                edgecolor=WAITING, hatch="////", linewidth=0.0,
            )
        )  # fmt: skip
    axis.text(BARS + 0.004, middle, str(work[rank]), ha="left", va="center", fontsize=9, color=INK)


def _scale(axis: Any, work: Sequence[int], unit: float) -> None:
    """The fullest rank's line, at which the layer ends for all, and the mean's, at which it could."""
    end, mean = BARS + max(work) * unit, BARS + sum(work) / len(work) * unit
    axis.plot([end, end], [-0.02, 1.0], color=INK, linewidth=1.4)
    side = "right" if end > BARS + 0.12 else "left"
    axis.text(end, 1.01, "the layer ends", ha=side, va="bottom", fontsize=9, color=INK)
    if max(work) > 1.02 * sum(work) / len(work):
        axis.plot([mean, mean], [-0.02, 1.0], color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        axis.text(mean, -0.03, "if all had as much", ha="center", va="top", fontsize=9, color=INK)
    axis.text(WORDS - 0.008, 1.01, "tokens", ha="right", va="bottom", fontsize=9, color=FAINT)
    axis.text(BOX, 1.01, "ranks: their experts", ha="right", va="bottom", fontsize=9, color=FAINT)
    axis.text(
        END, -0.085, "products of a token and an expert; hatched: waiting", ha="right", va="top", fontsize=9, color=FAINT
    )  # fmt: skip
