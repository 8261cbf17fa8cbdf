"""The learner's guess of a number, or among known misconceptions, asked before the measurement and shown again on it.

The measurement is in the widget's state as soon as its cell has run, but the browser shows it only when the guess is
fixed or skipped. Guesses stay on the learner's disk, beside the lesson; the course's last page draws them all.
"""

from __future__ import annotations

import json
import math
import os
from base64 import b64encode
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import traitlets
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from minillm.viz.style import FAINT, GUESS, INK, frame, new_figure, png, stacked
from minillm.viz.widget import InteractivePicture, script
from minillm.viz.words import plain, round_ticks

FILE = ".guesses.json"


class Predict(InteractivePicture):
    """Asks; `reveal(truth)` in a later cell shows the same widget again, with the measurement once a guess is fixed.

    `Predict("01.ratio", "How many times …?", unit="×", low=1, high=1000)` asks for a number on a logarithmic axis;
    `Predict("01.bound", "What limits …?", choices=("…", "…"))` for one of up to six statements. `name` is what the guess
    is kept under: lesson and word. Raises `ValueError` for an axis or choices that cannot be.
    """

    _esm = script("predict")
    question = traitlets.Unicode().tag(sync=True)
    unit = traitlets.Unicode().tag(sync=True)
    low = traitlets.Float(1.0).tag(sync=True)
    high = traitlets.Float(1000.0).tag(sync=True)
    choices: Any = traitlets.List().tag(sync=True)
    guess = traitlets.Float(None, allow_none=True).tag(sync=True)
    locked = traitlets.Bool(False).tag(sync=True)
    skipped = traitlets.Bool(False).tag(sync=True)
    truth = traitlets.Float(None, allow_none=True).tag(sync=True)
    why = traitlets.Unicode().tag(sync=True)
    how = traitlets.Unicode("measured").tag(sync=True)
    picture = traitlets.Unicode().tag(sync=True)  # a PNG in base64, shown with the truth

    def __init__(
        self, name: str, question: str, unit: str = "", low: float = 1.0, high: float = 1000.0, choices: Sequence[str] = ()
    ) -> None:  # fmt: skip
        if not choices and not 0 < low < high:
            raise ValueError(f"low={low}, high={high}: give two numbers above 0, the lower first")
        if len(choices) == 1 or len(choices) > 6:
            raise ValueError(f"{len(choices)} choices: give two to six")
        super().__init__()
        self.name = name
        self.question, self.unit, self.low, self.high, self.choices = question, unit, low, high, list(choices)
        self._draw: Callable[[float | None], Figure] | None = None
        self.observe(self._fixed, names=["locked"])

    def reveal(
        self,
        truth: float,
        why: str = "",
        draw: Callable[[float | None], Figure] | Figure | None = None,
        how: str = "measured",
    ) -> Predict:
        """The measurement (or the number of the right choice). Returns the widget: end the cell with it.

        `why` is a sentence, `draw` a figure or a function of the guess that draws one; they appear with the truth. `how` the
        truth was found is said before it: "measured", "replayed", "planned".
        Raises `ValueError` for what is no number above 0, or no choice.
        """
        truth = float(truth)
        if self.choices and truth not in range(len(self.choices)):
            raise ValueError(f"the right choice {truth:g} is not one of 0 … {len(self.choices) - 1}")
        if not self.choices and not (truth > 0 and math.isfinite(truth)):
            raise ValueError(f"the measurement {truth} cannot stand on a logarithmic axis: give a number above 0")
        self.why, self.how = why, how
        self._fixed_picture = isinstance(draw, Figure)  # which does not show the guess
        self._draw = (lambda guess: draw) if isinstance(draw, Figure) else draw
        self._redraw()
        self.truth = truth
        if self.locked:
            self._keep()
        return self

    @property
    def value(self) -> float | None:
        """The guess, once it is fixed."""
        return self.guess if self.locked else None

    def png(self) -> bytes:
        """The question as asked, or, after `reveal`, with its answer: what readers without a kernel see."""
        if self.truth is None or self._draw is None:
            return png(self._still())
        picture = png(self._draw(self.value))
        return stacked(png(self._still()), picture) if self.choices or self._fixed_picture else picture

    def _fixed(self, change: Any) -> None:
        self._redraw()
        self._keep()

    def _redraw(self) -> None:
        if self._draw is not None:
            self.picture = b64encode(png(self._draw(self.value))).decode()

    def _keep(self) -> None:
        keep_guess(self.name, {"question": self.question, "unit": self.unit, "choices": self.choices, "guess": self.value, "truth": self.truth})  # fmt: skip

    def _still(self) -> Figure:
        if self.choices:
            return self._still_choices()
        figure, (axis,) = new_figure(1.5)
        axis.set(xscale="log", xlim=(self.low, self.high), ylim=(0, 1), yticks=[])
        axis.spines["left"].set_visible(False)
        ticks = round_ticks(self.low, self.high)
        axis.set_xticks(ticks, [f"{plain(tick)} {self.unit}" for tick in ticks])
        axis.xaxis.set_minor_formatter(NullFormatter())
        if self.truth is not None:
            place = min(max(self.truth, self.low), self.high)
            axis.vlines(place, 0, 0.7, color=INK, linewidth=4)
            axis.text(place, 0.75, f"{self.how} {plain(self.truth)} {self.unit}", ha="center", color=INK)
        if self.value is not None:
            axis.vlines(self.value, 0, 0.5, color=GUESS, linewidth=2, linestyle="--")
            axis.text(self.value, 0.52, f"your guess {plain(self.value)}", ha="center", color=GUESS)
        return frame(figure, self.question, self.why or "run the notebook to make a guess on this axis")

    def _still_choices(self) -> Figure:
        figure, (axis,) = new_figure(0.9 + 0.34 * len(self.choices))
        axis.axis("off")
        for number, words in enumerate(self.choices):
            right = self.truth == number
            mark = "   ✓" if right else ""
            axis.text(
                0.0, 1 - (number + 0.5) / len(self.choices), f"({'abcdef'[number]}) {words}{mark}", va="center",
                color=INK if right or self.truth is None else FAINT, weight="bold" if right else "normal", transform=axis.transAxes,
            )  # fmt: skip
        return frame(figure, self.question, self.why or "run the notebook to choose")


def keep_guess(name: str, values: dict[str, Any], folder: Path | None = None) -> None:
    """Write one guess beside the lesson, with those already there; a file that cannot be read or written is no error."""
    path = (folder or Path.cwd()) / FILE
    scratch = path.with_name(f"{FILE}.{os.getpid()}")
    try:
        kept = collected_guesses(path.parent)
        scratch.write_text(json.dumps({**kept, name: values}, indent=1), encoding="utf-8")
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)


def collected_guesses(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """All guesses that were fixed so far, by name; empty when there are none."""
    try:
        kept = json.loads(((folder or Path.cwd()) / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
