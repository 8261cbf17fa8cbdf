"""The ring board: an all-reduce as a game. Ranks by chunks, coloured by whose numbers are in; the learner clicks the sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import traitlets
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minillm.viz.style import (
    ACTIVATIONS,
    COMMUNICATION,
    DECODE,
    FAINT,
    INK,
    KV_CACHE,
    PREFILL,
    WEIGHTS,
    frame,
    new_figure,
    png,
)
from minillm.viz.widget import InteractivePicture, script

COLOURS = (PREFILL, DECODE, KV_CACHE, COMMUNICATION, WEIGHTS, ACTIVATIONS)
Move = tuple[int, int, int]  # from a rank, to a rank, a chunk


def ring_moves(ranks: int) -> list[Move]:
    """The ring's all-reduce, step by step: n - 1 steps in which chunks are added up, n - 1 in which sums go round."""
    adding = [(rank, (rank + 1) % ranks, (rank - step) % ranks) for step in range(ranks - 1) for rank in range(ranks)]
    telling = [
        (rank, (rank + 1) % ranks, (rank + 1 - step) % ranks) for step in range(ranks - 1) for rank in range(ranks)
    ]
    return adding + telling


def play(ranks: int, moves: Sequence[Move]) -> tuple[list[list[frozenset[int]]], list[int]]:
    """Whose numbers are in each rank's chunks after these sends, and how many chunks each rank has sent.

    What comes is added to what is there, or takes its place when it holds all of it. Raises `ValueError` for a send after
    which a number would count twice, or that brings nothing.
    """
    held = [[frozenset({rank})] * ranks for rank in range(ranks)]
    sent = [0] * ranks
    for source, target, chunk in moves:
        coming, there = held[source][chunk], held[target][chunk]
        if coming <= there:
            raise ValueError(f"rank {target} has all of it already")
        if coming & there and not there <= coming:
            raise ValueError(f"rank {min(coming & there)}'s numbers would count twice")
        held[target][chunk] = coming | there
        sent[source] += 1
    return held, sent


class RingBoard(InteractivePicture):
    """`RingBoard(4)`: click a chunk of one rank, then the same chunk of another. `moves` are the sends so far.

    The goal: every rank has every sum, and nobody has sent more than 2 (n - 1) / n of its numbers.
    """

    _esm = script("ringboard")
    ranks = traitlets.Int().tag(sync=True)
    colours: Any = traitlets.List().tag(sync=True)
    moves: Any = traitlets.List().tag(sync=True)

    def __init__(self, ranks: int = 4) -> None:
        if not 2 <= ranks <= len(COLOURS):
            raise ValueError(f"ranks={ranks}: give 2 to {len(COLOURS)}")
        super().__init__()
        self.ranks, self.colours = ranks, list(COLOURS[:ranks])

    def png(self) -> bytes:
        """The ring's own way in three pictures: at first, half way, in the end."""
        return png(self.figure())

    def figure(self) -> Figure:
        """The same as a figure."""
        n, moves = self.ranks, ring_moves(self.ranks)
        figure, axes = new_figure(0.9 + 0.42 * n, [1.0, 1.0, 1.0])
        stops = (0, n * (n - 1), 2 * n * (n - 1))
        for axis, stop, name in zip(
            axes,
            stops,
            ("each has its own numbers", f"{n - 1} steps later: a sum each", f"{2 * (n - 1)} steps: all sums"),
        ):
            held, sent = play(n, moves[:stop])
            for rank in range(n):
                for chunk in range(n):
                    draw_cell(axis, chunk, rank, held[rank][chunk], n)
            axis.set(xlim=(-0.05, n), ylim=(n, -0.05))
            axis.set_xticks([chunk + 0.45 for chunk in range(n)], [f"chunk {chunk}" for chunk in range(n)], fontsize=8)
            axis.set_yticks([rank + 0.42 for rank in range(n)], [f"rank {rank}" for rank in range(n)], fontsize=8)
            axis.tick_params(length=0)
            for side in axis.spines.values():
                side.set_visible(False)
            axis.set_title(f"{name}\nsent by each: {sent[0] / n:.2g} of its numbers", fontsize=9, loc="left")
        finding = f"A ring adds up and tells everybody, and each rank sends {2 * (n - 1) / n:.2g} times its numbers"
        return frame(
            figure,
            finding,
            "counted · a colour is a rank whose numbers are in · run the notebook to send them yourself",
        )


def draw_cell(axis: Any, chunk: int, rank: int, whose: frozenset[int], ranks: int) -> None:
    """A chunk: a stripe for each rank whose numbers are in, and a frame when all are."""
    width = 0.9 / ranks
    for other in sorted(whose):
        axis.add_patch(Rectangle((chunk + other * width, rank), width, 0.84, color=COLOURS[other], linewidth=0))
    whole = len(whose) == ranks
    axis.add_patch(
        Rectangle(
            (chunk, rank), 0.9, 0.84, fill=False, edgecolor=INK if whole else FAINT, linewidth=1.8 if whole else 0.6
        )
    )
