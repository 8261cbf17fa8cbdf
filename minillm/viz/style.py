"""The look of every picture: colours that always mean the same, and the frame of finding above and caption below.

Okabe-Ito colours, safe for colour-blind eyes; figures are drawn on white, so that they read on a dark page too.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

PREFILL, DECODE, COMMUNICATION, WAITING = "#E69F00", "#0072B2", "#CC79A7", "#D9D9D9"
WEIGHTS, KV_CACHE, ACTIVATIONS, GUESS = "#56B4E9", "#009E73", "#F0E442", "#D55E00"
CULPRIT = GUESS
INK, FAINT = "#3b3b3b", "#7a7a7a"
WIDTH = 9.6  # inches: a notebook's column at 100 dots per inch

STYLE: Any = {
    "figure.dpi": 100, "savefig.dpi": 160, "savefig.bbox": "tight", "savefig.facecolor": "white", "font.size": 10.5,
    "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#9a9a9a",
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "legend.handlelength": 1.0, "legend.fontsize": 9.5, "hatch.linewidth": 1.2,
}  # fmt: skip


def new_figure(height: float, columns: list[float] | None = None) -> tuple[Figure, list[Any]]:
    """A figure of notebook width with one row of axes, their widths in the ratio of `columns`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(1, len(columns or [1]), width_ratios=columns or [1], squeeze=False)
    return figure, list(axes[0])


def frame(figure: Figure, finding: str, caption: str) -> Figure:
    """The finding, a sentence, above; clock, device, link and model below; both flush with the left edge."""
    figure.suptitle(finding, x=0.0, ha="left", fontsize=12.5, weight="bold", color=INK)
    caption = "\n".join(textwrap.wrap(caption, 150)) or caption
    figure.supxlabel(caption, x=0.0, ha="left", fontsize=8.8, color=FAINT)
    return figure


def legend(axis: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """One line of colours and what they mean, above the axes at the right, over nothing."""
    axis.legend(
        handles, names, ncols=max(1, len(names)), loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1,
        frameon=False, fontsize=9.5, handlelength=1.0,
    )  # fmt: skip


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="png")
    return file.getvalue()


def stacked(*pictures: bytes) -> bytes:
    """PNG files, one under the other, as one."""
    images = [Image.open(io.BytesIO(each)).convert("RGB") for each in pictures]
    whole = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    for number, image in enumerate(images):
        whole.paste(image, (0, sum(above.height for above in images[:number])))
    file = io.BytesIO()
    whole.save(file, format="png")
    return file.getvalue()


def show(figure: Figure) -> None:
    """Display a figure in a notebook as a PNG."""
    from IPython import display

    display.display(display.Image(png(figure), width=960))
