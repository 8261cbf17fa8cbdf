"""A picture with controls: whoever turns them sees it drawn again, by a function of their values."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from typing import Any

import traitlets
from matplotlib.figure import Figure

from minillm.viz.style import png
from minillm.viz.widget import InteractivePicture, script


class WhatIf(InteractivePicture):
    """`WhatIf(draw, "question", ranks=[2, 3, 4], absent=["nobody", "rank 1"])` calls `draw(ranks=2, absent="nobody")` first.

    The first value of a control is where it stands at first. Numbers become a slider, other values a list, and a text alone,
    `words="But soft"`, a line to write in; spaces in a control's label are underscores in its name. `draw` returns a `Figure`;
    a `ValueError` from it is what stands there instead.
    """

    _esm = script("strip", "whatif")
    question = traitlets.Unicode().tag(sync=True)
    controls: Any = traitlets.Dict().tag(sync=True)
    first: Any = traitlets.Dict().tag(sync=True)
    asked: Any = traitlets.Dict().tag(sync=True)  # {"number": …, "values": …}: what the browser wants drawn
    picture = traitlets.Unicode().tag(sync=True)
    problem = traitlets.Unicode().tag(sync=True)
    strip: Any = traitlets.Dict().tag(sync=True)  # of a `CutStrip`
    drawn = traitlets.Int(0).tag(sync=True)  # counts pictures, so that the browser knows when one is done

    def __init__(self, draw: Callable[..., Figure], question: str, **controls: Sequence[Any] | str) -> None:
        super().__init__()
        if not controls or not all(controls.values()):
            raise ValueError("give at least one control, each with a list of values")
        self._draw = draw
        self.question = question
        self._names = {name.replace("_", " "): name for name in controls}
        self.first = {label: _first(controls[name]) for label, name in self._names.items()} | self._more()
        self.controls = {label: _in_order(controls[name]) for label, name in self._names.items()}
        self._redraw({"new": {"values": self.first}})
        self.observe(self._redraw, names=["asked"])

    def _more(self) -> dict[str, Any]:
        """Values beside those of the controls, at first."""
        return {}

    def png(self) -> bytes:
        """The picture for the first value of every control."""
        return png(self._figure(self.first))

    def _figure(self, values: dict[str, Any]) -> Figure:
        return self._draw(**{self._names.get(label, label): value for label, value in values.items()})

    def _redraw(self, change: Any) -> None:
        """Draw what was asked for; a failure is told, and never leaves the browser waiting."""
        try:
            self.picture = b64encode(png(self._figure(change["new"]["values"]))).decode()
            self.problem = ""
        except Exception as error:
            self.picture = ""  # the last one would be of other values
            self.problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        finally:
            self.drawn += 1


class CutStrip(WhatIf):
    """Cuts to drag through a strip of layers: calls `draw(sizes=[8, 8, 7, 7], …)` with how many layers each stage has.

    `ends` are the names of what comes before the first layer and after the last.
    """

    def __init__(
        self, draw: Callable[..., Figure], question: str, sizes: Sequence[int], ends: tuple[str, str], **controls: Sequence[Any]
    ) -> None:  # fmt: skip
        self._sizes = list(sizes)
        super().__init__(draw, question, **controls)
        self.strip = {"sizes": self._sizes, "ends": list(ends)}

    def _more(self) -> dict[str, Any]:
        return {"sizes": self._sizes}


def _first(choices: Sequence[Any] | str) -> Any:
    return choices if isinstance(choices, str) else choices[0]


def _in_order(choices: Sequence[Any] | str) -> list[Any] | str:
    """Numbers rise along a slider; other values stay as given."""
    if isinstance(choices, str):
        return choices
    numbers = all(isinstance(choice, (int, float)) for choice in choices)
    return sorted(choices) if numbers else list(choices)
