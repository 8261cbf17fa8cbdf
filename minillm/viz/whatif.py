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

    The first value of a control is where it stands at first. Numbers become a slider, other values a list; spaces in a control's label are underscores in its name. `draw` returns
    a `Figure`; a `ValueError` from it is shown as text, and the last picture stays.
    """

    _esm = script("whatif")
    question = traitlets.Unicode().tag(sync=True)
    controls: Any = traitlets.Dict().tag(sync=True)
    values: Any = traitlets.Dict().tag(sync=True)
    picture = traitlets.Unicode().tag(sync=True)
    problem = traitlets.Unicode().tag(sync=True)
    drawn = traitlets.Int(0).tag(sync=True)  # counts pictures, so that the browser knows when one is done

    def __init__(self, draw: Callable[..., Figure], question: str, **controls: Sequence[Any]) -> None:
        super().__init__()
        if not controls or not all(controls.values()):
            raise ValueError("give at least one control, each with a list of values")
        self._draw = draw
        self.question = question
        self.controls = {name.replace("_", " "): list(choices) for name, choices in controls.items()}
        self.values = {name: choices[0] for name, choices in self.controls.items()}
        self.controls = {name: sorted(each) if _numbers(each) else each for name, each in self.controls.items()}
        self._first = {name: choices[0] for name, choices in controls.items()}
        self._redraw()
        self.observe(self._redraw, names=["values"])

    def png(self) -> bytes:
        """The picture for the first value of every control."""
        return png(self._draw(**self._first))

    def _redraw(self, change: Any = None) -> None:
        try:
            self.picture = b64encode(png(self._draw(**{name.replace(" ", "_"): value for name, value in self.values.items()}))).decode()  # fmt: skip
            self.problem = ""
        except ValueError as error:
            self.problem = str(error)
        self.drawn += 1


def _numbers(choices: Sequence[Any]) -> bool:
    return all(isinstance(choice, (int, float)) for choice in choices)
