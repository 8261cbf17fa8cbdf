"""Where the keys and values of one request lie on four ranks, as each way to split a model cuts them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.viz.style import FAINT, INK, frame, new_figure

SHADES = ["#00583f", "#009E73", "#7fcfb9", "#d3efe6"]  # of the KV cache's green, a rank each
LAYERS, HEADS, TOKENS, BLOCK, RANKS = 4, 4, 16, 2, 4
CUTS: list[tuple[str, str, str, Callable[[int, int, int], int]]] = [
    ("pp=4", "by layer", "no finer than the layers", lambda layer, head, token: layer * RANKS // LAYERS),
    ("tp=4", "by KV head", "no finer than the KV heads", lambda layer, head, token: head * RANKS // HEADS),
    ("dp=4, also with ep=4", "not at all", "a request is on one rank", lambda layer, head, token: 0),
    ("cp=4", "by position", "block by block, in turn", lambda layer, head, token: token // BLOCK % RANKS),
]


def draw_whereabouts(finding: str, caption: str) -> Figure:
    """A panel for each way: tokens to the right, KV heads within layers downwards; colours are ranks."""
    figure, axes = new_figure(3.3, [1.0] * len(CUTS))
    for number, (axis, (name, how, end, rank_of)) in enumerate(zip(axes, CUTS)):
        owners = [
            [rank_of(layer, head, token) for token in range(TOKENS)] for layer in range(LAYERS) for head in range(HEADS)
        ]
        axis.imshow(np.array(owners), cmap=ListedColormap(SHADES), vmin=0, vmax=RANKS - 1, aspect="auto")
        for layer in range(1, LAYERS):
            axis.axhline(layer * HEADS - 0.5, color="white", linewidth=2.5)
        axis.set_title(f"{name}\n{how}", fontsize=10.5, color=INK)
        axis.set_xlabel(f"tokens →\n{end}", fontsize=9.5)
        axis.set_xticks([])
        axis.set_yticks([])
        if number == 0:
            axis.set_yticks([layer * HEADS + 1.5 for layer in range(LAYERS)], [f"layer {n}" for n in range(LAYERS)])
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    figure.legend(
        [Patch(facecolor=shade, edgecolor=FAINT) for shade in SHADES], [f"rank {n}" for n in range(RANKS)], ncols=RANKS,
        loc="upper right", bbox_to_anchor=(1.0, 0.99), borderaxespad=0.0, frameon=False, fontsize=9.5,
    )  # fmt: skip
    return frame(figure, f"{finding}\n", caption)
