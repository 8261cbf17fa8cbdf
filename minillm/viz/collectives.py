"""Collectives in pictures: who has what before and after, what they cost as ranks or bytes grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from minillm.hardware.devices import Device, Link
from minillm.trace.collectives import ALGORITHMS, sent_share
from minillm.viz.ringboard import draw_cell
from minillm.viz.style import COMMUNICATION, DECODE, GUESS, INK, STYLE, WAITING, WIDTH, frame, new_figure
from minillm.viz.words import plain, plain_log

RANKS = 4
EXPLAINED = {"one-shot": "one-shot, an all-gather and then everybody adds"}
EACH = [[frozenset({rank})] * RANKS for rank in range(RANKS)]  # every rank has numbers of its own in every chunk
SUM, NOTHING = frozenset(range(RANKS)), frozenset[int]()
_Board = list[list[frozenset[int]]]
CHUNKS = {"all-to-all": [[rank] * RANKS for rank in range(RANKS)]}  # after it, rank r has everybody's chunk r


def results() -> dict[str, tuple[_Board, _Board]]:
    """Each collective's board before and after: rows of chunks, with the ranks whose numbers are in each."""
    own = [[frozenset({rank}) if chunk == rank else NOTHING for chunk in range(RANKS)] for rank in range(RANKS)]
    return {
        "broadcast": ([[frozenset({0})] * RANKS if rank == 0 else [NOTHING] * RANKS for rank in range(RANKS)], [[frozenset({0})] * RANKS] * RANKS),
        "all-gather": (own, [[frozenset({chunk}) for chunk in range(RANKS)]] * RANKS),
        "all-to-all": (EACH, [[frozenset({chunk}) for chunk in range(RANKS)]] * RANKS),
        "reduce-scatter": (EACH, [[SUM if chunk == rank else NOTHING for chunk in range(RANKS)] for rank in range(RANKS)]),
        "all-reduce": (EACH, [[SUM] * RANKS] * RANKS),
    }  # fmt: skip


def draw_collectives(finding: str) -> Figure:
    """A column for each collective: before above, after below."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
        axes = figure.subplots(2, len(results()))
    for column, (name, boards) in enumerate(results().items()):
        for row, board in enumerate(boards):
            axis = axes[row, column]
            for rank in range(RANKS):
                for chunk in range(RANKS):
                    draw_cell(axis, chunk, rank, board[rank][chunk], RANKS)
                    if board[rank][chunk]:
                        number = CHUNKS[name][rank][chunk] if row and name in CHUNKS else chunk
                        axis.text(
                            chunk + 0.45, rank + 0.43, str(number), ha="center", va="center", fontsize=8.5,
                            bbox={"boxstyle": "circle,pad=0.12", "facecolor": "white", "edgecolor": "none"},
                        )  # fmt: skip
            axis.set(xlim=(-0.05, RANKS), ylim=(RANKS, -0.05), xticks=[])
            axis.set_yticks(
                [rank + 0.42 for rank in range(RANKS)],
                [f"rank {rank}" for rank in range(RANKS)] if column == 0 else [""] * RANKS,
                fontsize=8.5,
            )
            axis.tick_params(length=0)
            for side in axis.spines.values():
                side.set_visible(False)
            axis.set_title(name if row == 0 else "", fontsize=10.5, weight="bold", loc="left")
        if column == 0:
            axes[0, 0].set_ylabel("before")
            axes[1, 0].set_ylabel("after")
    return frame(
        figure,
        finding,
        "a row is a rank's memory, a number a chunk, a colour a rank whose numbers are in; several colours: their sum",
    )


def draw_growth(finding: str, guess: float | None = None, at: int = 64) -> Figure:
    """What the busiest rank sends as there are more ranks, by the ring and by one-shot, where everybody sends all to everybody."""
    counts = [2, 4, 8, 16, 32, 64]
    figure, (axis,) = new_figure(3.2)
    for name, colour in (("ring", COMMUNICATION), ("one-shot", WAITING)):
        values = [sent_share(name, count) for count in counts]
        axis.plot(counts, values, "o-", color=colour, linewidth=2)
        axis.annotate(f" {name}: {plain(values[-1])} ×", (counts[-1], values[-1]), va="center", color=INK)
    if guess is not None:
        axis.plot([at], [guess], "_", color=GUESS, markersize=22, markeredgewidth=2.5)
        axis.annotate(f"your guess {plain(guess)} ×", (at * 0.8, guess), ha="right", va="center", color=GUESS)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="ranks",
        ylabel="sent, in times its numbers",
        xlim=(1.8, 190),
        ylim=(0.8, 100),
    )
    axis.set_xticks(counts)
    plain_log(axis)
    axis.set_xticks([], minor=True)
    axis.grid(color="#ececec", linewidth=0.8)
    return frame(figure, finding, "counted · what the busiest rank sends, in times the numbers that it has")


def draw_fit(points: Mapping[str, Mapping[int, float]], fits: Mapping[str, Link], finding: str, caption: str) -> Figure:
    """Measured seconds for each number of bytes, and the fitted α + bytes · β as a line, one colour for each way."""
    figure, (axis,) = new_figure(3.6)
    for (name, seconds), colour in zip(points.items(), (DECODE, COMMUNICATION)):
        sizes, link = list(seconds), fits[name]
        axis.plot(sizes, [seconds[size] * 1e6 for size in sizes], "o", color=colour)
        fine = [sizes[0] * (sizes[-1] / sizes[0]) ** (step / 60) for step in range(61)]
        axis.plot(fine, [link.time_s(size) * 1e6 for size in fine], "-", color=colour, linewidth=1.6)
        text = f"{name}: α = {plain(link.latency_s * 1e6)} µs, 1 / β = {plain(link.bytes_per_s / 1e9)} GB/s"
        place = sizes[0] * 1.05, link.time_s(sizes[0]) * 1e6
        axis.annotate(text, place, xytext=(0, -17), textcoords="offset points", color=colour)
    axis.set(xscale="log", yscale="log", xlabel="bytes in the message", ylabel="µs for an all-reduce")
    plain_log(axis)
    axis.grid(color="#ececec", linewidth=0.8)
    axis.margins(x=0.03, y=0.16)
    return frame(figure, finding, caption)


def draw_algorithms(count: int, link: Link, device: Device, hidden: int, weights: int, caption: str) -> Figure:
    """Seconds of one sum of tokens x hidden numbers of two bytes, by each algorithm, as there are more tokens; and what a layer of
    so many `weights`, cut over the ranks, computes meanwhile on a device.
    """
    tokens = [1, 4, 16, 64, 256, 1024, 4096]
    figure, (axis,) = new_figure(3.7)
    curves = {
        name: [cost(count, 2 * hidden * each, link) * 1e6 for each in tokens] for name, cost in ALGORITHMS.items()
    }
    rate, kind = device.flops_per_s("float16"), 2 * weights / count
    layer = [max(kind * each / rate, kind / device.bytes_per_s) * 1e6 for each in tokens]
    for (name, values), style in zip(curves.items(), ("-", "--", ":")):
        axis.plot(
            tokens, values, style, color=COMMUNICATION, linewidth=2.2, label=f"one sum: {EXPLAINED.get(name, name)}"
        )
    axis.plot(tokens, layer, color=DECODE, linewidth=2.2, label="a block's products, on each rank")
    axis.set(xscale="log", yscale="log", xlabel="tokens in the step", ylabel="µs")
    axis.set_xticks(tokens)
    plain_log(axis)
    axis.set_xticks([], minor=True)
    axis.grid(color="#ececec", linewidth=0.8)
    axis.legend(loc="upper left")
    return frame(figure, _winner(curves, layer, tokens), caption)


def _winner(curves: Mapping[str, Sequence[float]], layer: Sequence[float], tokens: Sequence[int]) -> str:
    best = [min(curves, key=lambda name: curves[name][place]) for place in (0, -1)]
    ratio = [min(values[place] for values in curves.values()) / layer[place] for place in (0, -1)]
    said = f"One token: {best[0]}" + (f"; {tokens[-1]:,}: {best[1]}" if best[0] != best[1] else ", and for many")
    return f"{said}. The sum takes {_two_digits(ratio[0])} and {_two_digits(ratio[1])} times as long as the work"


def _two_digits(number: float) -> str:
    return plain(float(f"{number:.2g}"))
