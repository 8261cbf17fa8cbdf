"""Where an exercise is worked on in a notebook: `%%exercise NAME`, its verdict and picture, hints, and the solution."""

from __future__ import annotations

import contextlib
import pdb
import sys
from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure

from minillm.lesson.compare import first_difference, value_text
from minillm.lesson.exercise import Exercise, Verdict, define
from minillm.lesson.grading import Printed, find_exercise, judge, try_here
from minillm.viz.difference import draw_difference
from minillm.viz.messages import draw_messages


class Desk:
    """Takes attempts, counts failures, and gives the notebook a function that works: the learner's, or the reference.

    Failures are counted per exercise, for hints after the first and the third; running the untouched frame is none.
    """

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.namespace = namespace
        self.failures: dict[str, int] = {}

    def submit(self, name: str, source: str, here: bool = False) -> tuple[str, Figure | None]:
        """Judge a cell; returns what to say and what to draw. With `here`, on toy ranks in this process, for a debugger.

        Raises `ValueError` for an exercise that there is not.
        """
        exercise = find_exercise(name)
        with _pdb_at_breakpoints() if here else contextlib.nullcontext():
            verdict = try_here(exercise, source) if here else judge(exercise, source)
        used, file = (source, "exercise") if verdict.solved else (exercise.solution, "solution")
        with contextlib.redirect_stdout(Printed()):  # what the cell prints was shown with the verdict
            self.namespace[exercise.function] = define(exercise, used, f"<{file} {name}>")
        said = self._words(exercise, verdict, source)
        return (f"{verdict.printed}\n{said}" if verdict.printed else said), picture_of(exercise, verdict)

    def _words(self, exercise: Exercise, verdict: Verdict, source: str) -> str:
        if verdict.solved:
            return f"solved: {verdict.text}"
        lines = [f"not solved yet. {verdict.text}"]
        if verdict.case is not None and source.strip() != exercise.starter.strip():  # it ran, and was tried
            failures = self.failures[exercise.name] = self.failures.get(exercise.name, 0) + 1
            lines += [f"hint: {hint}" for after, hint in zip((1, 3), exercise.hints) if failures >= after]
        lines.append(
            f'(about {exercise.minutes} minutes. solution("{exercise.name}") shows a solution, any time; the lesson uses that one '
            "until yours is right.)"
        )
        return "\n".join(lines)


@contextlib.contextmanager
def _pdb_at_breakpoints() -> Iterator[None]:
    """Let `breakpoint()` open pdb: a Jupyter kernel sends it to a debugger that may not be there."""
    before, sys.breakpointhook = sys.breakpointhook, lambda *_, **__: pdb.Pdb(nosigint=True).set_trace(sys._getframe(1))
    try:
        yield
    finally:
        sys.breakpointhook = before


def picture_of(exercise: Exercise, verdict: Verdict) -> Figure | None:
    """The learner's own run: its messages, or the tensor in which something is wrong."""
    outcome = verdict.outcome
    if outcome is None:
        return None
    if outcome.toy is not None:
        finding = "Your messages arrive" if verdict.solved else f"Your run with {len(outcome.outputs)} ranks"
        if outcome.toy.waits:
            all_wait = len(outcome.toy.waits) == len(outcome.outputs)
            finding = "Nobody can go on: " + ("each waits for another" if all_wait else "the others are gone")
        wrong = {
            n: value_text(e) for n, e in enumerate(verdict.expected) if first_difference([e], [outcome.toy.results[n]])
        }
        shown = [value_text(result) for result in outcome.toy.results]
        return draw_messages(outcome.toy, finding, shown, wrong)
    if verdict.wrong is not None and verdict.wrong[1]:
        number, index = verdict.wrong
        where = exercise.place(number)
        return draw_difference(
            verdict.expected[number],
            outcome.outputs[number],
            index,
            f"Your result of {where}" if where else "Your result",
        )
    return None


def whose(function: Any) -> str:
    """Whose a function of an exercise is by now: "yours", or "the course's" until the exercise is solved."""
    methods = vars(function).values() if isinstance(function, type) else [function]
    code = next(method.__code__ for method in methods if hasattr(method, "__code__"))
    return "yours" if code.co_filename.startswith("<exercise ") else "the course's"


def solution(name: str) -> Any:
    """Show a solution of an exercise; any time. Raises `ValueError` for an exercise that there is not."""
    from IPython.display import Code

    return Code(find_exercise(name).solution, language="python")
