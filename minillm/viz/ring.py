"""A live view of something that goes from rank to rank."""

from __future__ import annotations

import math
from typing import Any

import ipywidgets

from minillm.viz.style import COMMUNICATION, FAINT, INK

_SIZE, _RADIUS, _DOT = 260, 92, 30


class RingView:
    """Ranks on a circle in a notebook; `show(rank, text)` lights one up, with what it holds now.

    Display it before the job starts, and give `view.on_event` to `Ranks.run(on_event=…)`: an event is the text.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.texts = [""] * world_size
        self.widget = ipywidgets.HTML(self._svg(None))

    def on_event(self, rank: int, event: Any) -> None:
        """Take an event of a rank: what it holds now."""
        self.texts[rank] = str(event)
        self.widget.value = self._svg(rank)

    def _svg(self, lit: int | None) -> str:
        dots = "".join(self._dot(rank, rank == lit) for rank in range(self.world_size))
        return f'<svg width="{_SIZE}" height="{_SIZE}" role="img" aria-label="ring of ranks" style="background:white">{dots}</svg>'

    def _dot(self, rank: int, lit: bool) -> str:
        angle = 2 * math.pi * rank / self.world_size - math.pi / 2
        x, y = _SIZE / 2 + _RADIUS * math.cos(angle), _SIZE / 2 + _RADIUS * math.sin(angle)
        fill, ink = (COMMUNICATION, "white") if lit else ("white", INK)
        label = self.texts[rank] or f"rank {rank}"
        return (
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="{_DOT}" fill="{fill}" stroke="{FAINT}" stroke-width="2"/>'
            f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle" fill="{ink}" font-size="13" '
            f'font-family="sans-serif" font-weight="bold">{label}</text>'
        )

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)
