"""Two products, each cut by columns or by rows over ranks: what every rank holds, and what must be sent between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from minillm.parallel.layout import share
from minillm.trace.collectives import ring_share
from minillm.viz.style import ACTIVATIONS, COMMUNICATION, FAINT, INK, WEIGHTS, frame, legend, new_figure
from minillm.viz.words import bytes_text

Cut = Literal["columns", "rows"]
HIDDEN, WIDE = 4, 8  # numbers in the picture
LANE = WIDE + 3.2


@dataclass(frozen=True)
class Sending:
    """A collective after a product, over so many numbers of the whole."""

    name: str
    numbers: int

    def sent(self, ranks: int) -> float:
        """Numbers that each rank sends, by a ring."""
        return self.numbers * ring_share(self.name.replace("-", "_"), ranks)


def sendings(first: Cut, second: Cut, hidden: int, wide: int) -> tuple[Sending | None, Sending]:
    """What x [hidden] · W [hidden, wide], a function of each number, · V [wide, hidden] need in the middle and at the end, if
    all ranks have x before and shall have y after.
    """
    if first == "columns":  # each rank has some numbers of the middle whole
        middle = None if second == "rows" else Sending("all-gather", wide)
    else:  # each has a summand of all of them, and no function may be taken of a summand
        middle = Sending("reduce-scatter" if second == "rows" else "all-reduce", wide)
    return middle, Sending("all-reduce" if second == "rows" else "all-gather", hidden)


def sent_numbers(first: Cut, second: Cut, ranks: int, hidden: int, wide: int) -> float:
    """What each rank sends for one token, in numbers."""
    return sum(each.sent(ranks) for each in sendings(first, second, hidden, wide) if each)


def draw_block(
    first: Cut, second: Cut, ranks: int = 2, hidden: int = 576, wide: int = 1536, model: str = "SmolLM2"
) -> Figure:  # fmt: skip
    """A lane for each rank: x · its part of W = the middle, f(middle) · its part of V = y, and pink where ranks must send. Drawn
    with 4 and 8 numbers; the title counts for a model's `hidden` and `wide`.
    """
    figure, (axis,) = new_figure(1.0 + (1.7 if ranks == 2 else 1.15) * ranks)
    for rank in range(ranks):
        _draw_lane(axis, first, second, rank, ranks, (ranks - 1 - rank) * LANE, named=rank == 0)
    top = ranks * LANE - 2.6
    for sending, left in zip(sendings(first, second, hidden, wide), (22.7, 43.9)):
        if sending is None:
            axis.text(left + 0.9, top / 2, "nothing is sent", rotation=90, ha="center", va="center", color=FAINT)
            continue
        axis.add_patch(Rectangle((left, -0.4), 1.8, top + 0.4, color=COMMUNICATION, linewidth=0))
        axis.text(
            left + 0.85, top / 2, f"{sending.name} of {sending.numbers:,} numbers",
            rotation=90, ha="center", va="center", color="white", fontsize=9.5, weight="bold",
        )  # fmt: skip
    axis.set(xlim=(-2.2, 51), ylim=(-0.8, top + 2.2), xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set_visible(False)
    legend(
        axis,
        [Patch(color=WEIGHTS), Patch(color=ACTIVATIONS), _patch(0, 0, True, True), Patch(color=COMMUNICATION)],
        ["its part of a weight", "numbers it has", "a summand of each number", "sent"],
    )
    caption = (
        f"counted · {ranks} ranks · drawn with {HIDDEN} and {WIDE} numbers; {model}'s MLP has {hidden:,} and {wide:,}"
    )
    return frame(figure, _finding(first, second, ranks, hidden, wide), f"{caption} · float32 · sent by a ring")


def _finding(first: Cut, second: Cut, ranks: int, hidden: int, wide: int) -> str:
    count = sum(each is not None for each in sendings(first, second, hidden, wide))
    sent = sent_numbers(first, second, ranks, hidden, wide)
    least = sent_numbers("columns", "rows", ranks, hidden, wide)
    said = f"First by {first}, then by {second}: {'one sum' if count == 1 else 'two collectives'}"
    return f"{said}, {bytes_text(4 * sent)} a token" + (f" instead of {bytes_text(4 * least)}" if count > 1 else "")


def _draw_lane(axis: Any, first: Cut, second: Cut, rank: int, ranks: int, base: float, named: bool) -> None:
    """What one rank holds, from x to y."""
    narrow, wide = share(HIDDEN, ranks, rank), share(WIDE, ranks, rank)
    all_narrow, all_wide = range(HIDDEN), range(WIDE)
    x = narrow if first == "rows" else all_narrow
    made = all_wide if first == "rows" else wide
    used = wide if second == "rows" else all_wide
    result = all_narrow if second == "rows" else narrow
    parts = (  # left edge, rows, columns, those held, colour, whether summands, name
        (0.0, 1, HIDDEN, range(1), x, ACTIVATIONS, False, "x"),
        (5.0, HIDDEN, WIDE, x, made, WEIGHTS, False, "W"),
        (14.2, 1, WIDE, range(1), made, ACTIVATIONS, first == "rows", "x · W"),
        (25.0, 1, WIDE, range(1), used, ACTIVATIONS, False, "f(x · W)"),
        (34.2, WIDE, HIDDEN, used, result, WEIGHTS, False, "V"),
        (39.4, 1, HIDDEN, range(1), result, ACTIVATIONS, second == "rows", "f(x · W) · V"),
        (46.2, 1, HIDDEN, range(1), all_narrow, ACTIVATIONS, False, "y"),
    )
    there = {"x": all_narrow, "f(x · W)": all_wide if first == "rows" and second == "columns" else used}
    axis.text(-1.5, base + WIDE / 2, f"rank {rank}", rotation=90, ha="center", va="center", color=INK, fontsize=10)
    for left, rows, columns, held_rows, held_columns, colour, summands, name in parts:
        bottom = base + (WIDE - rows) / 2
        for row in range(rows):
            for column in range(columns):
                held = row in held_rows and column in held_columns
                patch = _patch(left + column, bottom + rows - 1 - row, held, summands, colour)
                if name in ("x", "f(x · W)") and not held and column in there[name]:
                    patch.set_facecolor("#fbf8c9")  # here, and not used
                axis.add_patch(patch)
        if named:
            axis.text(left + columns / 2, base + WIDE + 0.5, name, ha="center", va="bottom", color=INK, fontsize=10)
    for left, sign in ((4.5, "·"), (13.6, "="), (33.6, "·"), (38.8, "=")):
        axis.text(left, base + WIDE / 2, sign, ha="center", va="center", color=INK, fontsize=12)


def _patch(left: float, bottom: float, held: bool, summands: bool, colour: str = ACTIVATIONS) -> Rectangle:
    """One number: coloured if the rank has it, hatched if it has a summand of it."""
    if held and summands:
        return Rectangle((left, bottom), 1, 1, facecolor="white", edgecolor="#c9bc20", hatch="//////", linewidth=0.6)
    return Rectangle((left, bottom), 1, 1, facecolor=colour if held else "white", edgecolor=FAINT, linewidth=0.5)
