"""A live view of something that goes from rank to rank."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from typing import Any

import ipywidgets

from minillm.viz.circle import RADIUS, between, clear_axis, draw_arrow, draw_rank, spot_of
from minillm.viz.style import COMMUNICATION, FAINT, INK, frame, new_figure, png

_SIZE, _SCALE = 300, 95  # pixels: the drawing's edge, and the ring's radius


class RingView(ipywidgets.HTML):
    """Ranks on a circle; an event of a rank lights it up, and shows what it holds now.

    Display it before the job starts, and give `view.on_event` to `Ranks.run(on_event=…)`. Without a kernel a PNG of the
    ring stands in its place.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self.texts = [""] * world_size
        self.value = self._svg(None)

    def on_event(self, rank: int, event: Any) -> None:
        """Take an event of a rank: what it holds now."""
        self.texts[rank] = str(event)
        self.value = self._svg(rank)

    def _svg(self, lit: int | None) -> str:
        parts = "".join(self._arrow(rank) + self._circle(rank, rank == lit) for rank in range(self.world_size))
        return f'<svg width="{_SIZE}" height="{_SIZE}" role="img" aria-label="ring of ranks" style="background:white">{parts}</svg>'

    def _circle(self, rank: int, lit: bool) -> str:
        x, y = _pixels(spot_of(rank, self.world_size))
        fill, ink = (COMMUNICATION, "white") if lit else ("white", INK)
        font = 'text-anchor="middle" font-family="sans-serif"'
        return (
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="{RADIUS * _SCALE:.0f}" fill="{fill}" stroke="{FAINT}" stroke-width="2"/>'
            f'<text x="{x:.0f}" y="{y + 6:.0f}" {font} font-size="17" font-weight="bold" fill="{ink}">{escape(self.texts[rank])}</text>'
            f'<text x="{x:.0f}" y="{y - RADIUS * _SCALE - 6:.0f}" {font} font-size="12" fill="{INK}">rank {rank}</text>'
        )

    def _arrow(self, rank: int) -> str:
        """From a rank to its right neighbour."""
        if self.world_size == 1:
            return ""
        start, end = spot_of(rank, self.world_size), spot_of((rank + 1) % self.world_size, self.world_size)
        (x1, y1), (x2, y2) = map(_pixels, between(start, end))
        color = FAINT
        head = f'<marker id="head{rank}" orient="auto" markerWidth="8" markerHeight="8" refX="6" refY="3"><path d="M0,0 L7,3 L0,6 z" fill="{color}"/></marker>'
        line = f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" stroke="{color}" stroke-width="2" marker-end="url(#head{rank})"/>'
        return head + line

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        data["text/plain"] = f"RingView({self.world_size})"
        data["image/png"] = b64encode(self._png()).decode()
        return bundle

    def _png(self) -> bytes:
        figure, (axis, _) = new_figure(2.9, [1.0, 2.0])
        for rank in range(self.world_size):
            spot = spot_of(rank, self.world_size)
            draw_arrow(axis, spot, spot_of((rank + 1) % self.world_size, self.world_size))
            draw_rank(axis, spot, str(rank))
        for each in figure.axes:
            clear_axis(each)
        return png(
            frame(figure, "A ring: each rank sends to its right neighbour", "run the cell to see a number go round")
        )


def _pixels(spot: tuple[float, float]) -> tuple[float, float]:
    return _SIZE / 2 + spot[0] * _SCALE, _SIZE / 2 + 8 - spot[1] * _SCALE
