"""How often each expert of each layer was chosen, as a map: a mixture that is used evenly would be of one colour."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from minillm.viz.style import INK, PREFILL, frame, new_figure

COLOURS = LinearSegmentedColormap.from_list("choices", ["#ffffff", "#f6dcae", PREFILL, "#7a4f00"])
MOST = 4.0  # times the even share: where colours end


def draw_choices(pairs: torch.Tensor, finding: str, caption: str) -> Figure:
    """`pairs` [layers, experts] of (token, expert), as a `Tally` has them; colours are in times of an even share."""
    counts = pairs.double().numpy()
    layers, experts = counts.shape
    shares = counts * experts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, (axis,) = new_figure(1.5 + min(4.5, 0.42 * layers))
    image = axis.imshow(shares, cmap=COLOURS, vmin=0, vmax=MOST, aspect="auto")
    if layers * experts <= 128:
        for layer, expert in np.ndindex(layers, experts):
            share = shares[layer, expert]
            colour = "white" if share > 0.75 * MOST else INK
            axis.text(expert, layer, f"{share:.1f}", ha="center", va="center", fontsize=9, color=colour)
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    axis.set_xticks(range(0, experts, 1 if experts <= 32 else 8))
    axis.set_yticks(range(0, layers, 1 if layers <= 12 else 5))
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(image, ax=axis, pad=0.015, aspect=14, ticks=range(int(MOST) + 1), extend="max")
    bar.set_label("times an even share", fontsize=9)
    bar.outline.set_visible(False)
    return frame(figure, finding, caption)
