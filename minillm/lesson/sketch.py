"""A curve that the learner draws before the run, in the widget that later shows the formula's and the run's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import traitlets
from matplotlib.figure import Figure

from minillm.lesson.predict import keep_guess
from minillm.viz.style import DECODE, GUESS, INK, frame, new_figure, png
from minillm.viz.widget import InteractivePicture, script
from minillm.viz.words import plain


class Sketch(InteractivePicture):
    """`Sketch("05.bubble", "question", [1, 2, 4], "micro-batches", "%", 0, 100)`: a dot for each place, dragged up or down.

    `reveal` adds what is true: a line first, then dots. Nothing of it shows before the drawing is fixed or skipped.
    """

    _esm = script("sketch")
    name = traitlets.Unicode().tag(sync=True)
    question = traitlets.Unicode().tag(sync=True)
    places: Any = traitlets.List().tag(sync=True)
    place_label = traitlets.Unicode().tag(sync=True)
    unit = traitlets.Unicode().tag(sync=True)
    low = traitlets.Float().tag(sync=True)
    high = traitlets.Float().tag(sync=True)
    guess: Any = traitlets.List().tag(sync=True)
    touched: Any = traitlets.List().tag(sync=True)  # the dots that were moved
    locked = traitlets.Bool(False).tag(sync=True)
    skipped = traitlets.Bool(False).tag(sync=True)
    truths: Any = traitlets.Dict().tag(sync=True)  # name -> a value for each place
    why = traitlets.Unicode().tag(sync=True)
    caption = traitlets.Unicode().tag(sync=True)

    def __init__(
        self, name: str, question: str, places: Sequence[float], place_label: str, unit: str, low: float, high: float
    ) -> None:  # fmt: skip
        if len(places) < 2 or not low < high:
            raise ValueError("give two places or more, and a lower and an upper end")
        super().__init__()
        self.name, self.question, self.place_label, self.unit = name, question, place_label, unit
        self.places, self.low, self.high = list(places), low, high
        self.guess = [(low + high) / 2] * len(places)
        self.observe(lambda change: self._keep(), names=["locked"])

    def reveal(self, truths: Mapping[str, Sequence[float]], why: str = "", caption: str = "") -> Sketch:
        """What is true at each place: the first is drawn as a line, the others as dots. Returns the widget.

        `why` is a sentence; `caption` names clock, device and model.

        Raises `ValueError` for another number of values than places.
        """
        for name, values in truths.items():
            if len(values) != len(self.places):
                raise ValueError(f"{name!r} has {len(values)} values for {len(self.places)} places")
        self.why, self.caption = why, caption
        self.truths = {name: [float(value) for value in values] for name, values in truths.items()}
        self._keep()
        return self

    @property
    def value(self) -> list[float] | None:
        """The drawing, once it is fixed."""
        return list(self.guess) if self.locked else None

    def png(self) -> bytes:
        """The empty axes or, after `reveal`, what is true."""
        return png(self.figure())

    def figure(self) -> Figure:
        """The same as a still picture."""
        figure, (axis,) = new_figure(3.2)
        for number, (name, values) in enumerate(self.truths.items()):
            style = {"marker": "o", "linestyle": "none", "color": DECODE} if number else {"color": INK, "linewidth": 2}
            axis.plot(range(len(values)), values, label=name, **style)
        if self.value is not None:
            axis.plot(range(len(self.places)), self.value, "--", color=GUESS, label="your drawing")
        axis.set(
            xlabel=self.place_label, ylabel=self.unit, ylim=(self.low, self.high), xlim=(-0.2, len(self.places) - 0.8)
        )
        axis.set_xticks(range(len(self.places)), [plain(place) for place in self.places])
        if self.truths or self.value is not None:
            axis.legend(loc="best")
        axis.grid(color="#ececec", linewidth=0.8)
        return frame(figure, self.question, self.caption or self.why or "run the notebook to draw it here")

    def _keep(self) -> None:
        if self.locked and self.truths:
            truth = next(iter(self.truths.values()))
            kept = {"question": self.question, "unit": self.unit, "choices": [], "places": self.places}
            keep_guess(self.name, {**kept, "guess": self.value, "truth": truth})
