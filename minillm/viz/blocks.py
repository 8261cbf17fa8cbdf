"""The block map: every block of a KV cache as a cell, live and step by step; and its still form."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import traitlets
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from minillm.engine.engine import Engine
from minillm.engine.request import Request, with_twins
from minillm.llm import LLM
from minillm.policy.scheduler import Scheduler
from minillm.viz.style import INK, KV_CACHE, STYLE, WIDTH, frame, legend, png
from minillm.viz.widget import InteractivePicture, script

FREE, KEPT = "#f4f4f4", "#d9efe7"
REFRESH_S = 0.1  # ten pictures a second at most
Cell = tuple[int, int, float]  # first holder (-1: nobody), holders, share of its places that is filled


def look(scheduler: Scheduler) -> list[Cell]:
    """Every block of the pool, in order."""
    pool = scheduler.pool
    owner, filled = [-1] * pool.num_blocks, [0.0] * pool.num_blocks
    for request in scheduler.running:
        for place, block in enumerate(request.table.blocks if request.table else ()):
            share = (request.computed - place * pool.block_size) / pool.block_size
            filled[block] = max(filled[block], min(1.0, max(0.0, share)))
            owner[block] = request.request_id if owner[block] < 0 else owner[block]
    for block in pool.kept:
        filled[block] = 1.0
    return list(zip(owner, pool.references, filled))


def split(cells: Sequence[Cell], parts: int) -> list[Cell]:
    """Each block as `parts` smaller ones, to compare pools of different block sizes place by place."""
    return [
        (owner, holders, min(1.0, max(0.0, filled * parts - part)))
        for owner, holders, filled in cells
        for part in range(parts)
    ]


def fullest(looks: Sequence[list[Cell]]) -> list[Cell]:
    """The look at which most blocks were held, and of those the one at which most was filled."""
    return max(looks, key=lambda cells: [sum(n > 0 for _, n, _ in cells), sum(f for _, _, f in cells)], default=[])


class BlockMap(InteractivePicture):
    """Blocks in the browser: `watch(scheduler)` after each step makes it grow by one picture; a slider goes through them.

    In a notebook without kernel stands the step in which most blocks were held.
    """

    _esm = script("blocks")
    finding = traitlets.Unicode().tag(sync=True)
    caption = traitlets.Unicode().tag(sync=True)
    columns = traitlets.Int(32).tag(sync=True)
    steps: Any = traitlets.List().tag(sync=True)
    at = traitlets.Int(-1).tag(sync=True)  # the step to stand at when all have been seen

    def __init__(self, finding: str, caption: str = "", columns: int = 32) -> None:
        super().__init__()
        self.finding, self.caption, self.columns = finding, caption, columns
        self._seen: list[list[Cell]] = []
        self._shown_s = 0.0

    def watch(self, scheduler: Scheduler) -> None:
        """Take a picture of the pool; the browser follows at most ten times a second."""
        self._seen.append(look(scheduler))
        if time.monotonic() - self._shown_s > REFRESH_S:
            self._show()

    def finish(self) -> None:
        """All has been seen: stand at the fullest step."""
        self._show()
        self.at = self._seen.index(fullest(self._seen)) if self._seen else -1

    def _show(self) -> None:
        self._shown_s = time.monotonic()
        self.steps = [[list(cell) for cell in cells] for cells in self._seen]

    def png(self) -> bytes:
        """The fullest step."""
        return png(
            draw_blocks({"": fullest(self._seen)}, self.finding, self.caption or "run the cell to see it", self.columns)
        )


def watch(llm: LLM, requests: Sequence[Request], block_map: BlockMap | None = None) -> list[Cell]:
    """Run prepared requests to their end; returns the fullest look at the cache. A block map is shown as it fills."""
    from IPython.display import display

    looks = []
    shown: Any = display(block_map, display_id=True) if block_map is not None else None
    engine = llm.engine
    assert isinstance(engine, Engine), "the blocks of other ranks cannot be looked at"
    llm.new_trace()
    llm.submit(requests)
    while any(request.finish_reason is None for request in with_twins(requests)):
        llm.step()
        looks.append(look(engine.scheduler))
        if block_map is not None:
            block_map.watch(engine.scheduler)
    if block_map is not None:
        block_map.finish()
        shown.update(block_map)
    return fullest(looks)


def draw_blocks(pools: Mapping[str, Sequence[Cell]], finding: str, caption: str, columns: int = 32) -> Figure:
    """One grid per pool, with the share of held places that is filled in its title."""
    rows = [max(1, math.ceil(len(cells) / columns)) for cells in pools.values()]
    with mpl.rc_context(STYLE):
        size = WIDTH / columns
        figure = Figure(figsize=(WIDTH, 0.9 + sum(rows) * size + 0.4 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axis, (name, cells) in zip(axes, pools.items()):
        axis.set(
            xlim=(0, columns), ylim=(max(1, math.ceil(len(cells) / columns)), 0), aspect="equal", xticks=[], yticks=[]
        )
        axis.axis("off")
        for number, cell in enumerate(cells):
            _draw_cell(axis, number % columns, number // columns, cell, columns)
        held = [filled for _, holders, filled in cells if holders]
        share = sum(held) / len(held) if held else 0.0
        said = f"{len(held)} of {len(cells)} blocks held"
        if len(pools) > 1:  # of different sizes, perhaps: what they share is memory
            said = f"{name}: {len(held) / max(1, len(cells)):.0%} of the memory held"
        axis.set_title(f"{said}, {share:.0%} of that filled", loc="left", fontsize=10)
    every = [cell for cells in pools.values() for cell in cells]
    handles = {"filled": Patch(color=KV_CACHE, alpha=0.45), "held, empty": Patch(facecolor="white", edgecolor=KV_CACHE)}
    if any(holders > 1 for _, holders, _ in every):
        handles["shared"] = Patch(color=KV_CACHE)
    if any(filled and not holders for _, holders, filled in every):
        handles["kept for whoever begins alike"] = Patch(color=KEPT)
    legend(axes[0], list(handles.values()), list(handles))
    return frame(figure, finding, caption)


def _draw_cell(axis: Any, x: float, y: float, cell: Cell, columns: int) -> None:
    owner, holders, filled = cell
    place, side = (x + 0.06, y + 0.06), 0.88
    if not holders:
        axis.add_patch(
            Rectangle(place, side, side, facecolor=KEPT if filled else FREE, edgecolor="#dddddd", linewidth=0.6)
        )
        return
    low = (place[0], place[1] + side * (1 - filled))
    axis.add_patch(Rectangle(low, side, side * filled, color=KV_CACHE, alpha=1 if holders > 1 else 0.45, linewidth=0))
    axis.add_patch(Rectangle(place, side, side, facecolor="none", edgecolor=KV_CACHE, linewidth=1))
    text = f"×{holders}" if holders > 1 else str(owner)
    axis.text(
        x + 0.5,
        y + 0.52,
        text,
        ha="center",
        va="center",
        fontsize=min(9, 250 / columns),
        color="white" if holders > 1 else INK,
    )
