"""Two small tensors side by side, the first wrong element outlined."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minillm.viz.style import CULPRIT, INK, frame, new_figure
from minillm.viz.words import plain

MOST_COLUMNS, MOST_ROWS = 10, 8


def draw_difference(expected: torch.Tensor, got: torch.Tensor, index: tuple[int, ...], finding: str) -> Figure:
    """`expected` and `got` [columns] or [rows, columns] as tables; at most 8 rows and 10 columns are drawn."""
    tables = [tensor.reshape(-1, tensor.shape[-1])[:MOST_ROWS, :MOST_COLUMNS] for tensor in (expected, got)]
    rows, columns = tables[0].shape
    figure, axes = new_figure(1.2 + 0.36 * rows, [1.0, 1.0])
    low, high = float(tables[0].min()), float(tables[0].max())
    for axis, table, name in zip(axes, tables, ("expected", "got")):
        axis.imshow(
            table.float().numpy(), cmap="Greys", vmin=low - (high - low), vmax=high + 2 * (high - low), aspect="auto"
        )
        for row in range(rows):
            for column in range(columns):
                axis.text(
                    column,
                    row,
                    plain(round(float(table[row, column]), 2)),
                    ha="center",
                    va="center",
                    fontsize=9,
                    color=INK,
                )
        axis.set_title(name, fontsize=10.5, color=INK)
        axis.set(xticks=[], yticks=[])
    row, column = divmod(int(np.ravel_multi_index(index, tuple(expected.shape))), expected.shape[-1])
    inside = row < rows and column < columns
    if inside:
        axes[1].add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=CULPRIT, linewidth=2.5))
    said = (
        "outlined: the first element that differs"
        if inside
        else f"the first element that differs is {list(index)}, outside this part"
    )
    return frame(figure, finding, said)
