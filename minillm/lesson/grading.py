"""Looks at attempts, each in a process of its own, so that an endless loop or a crash ends there and not in the notebook.

First the toy communicator, then, for exercises on ranks, real ranks. The notebook itself runs an attempt only after it
was found right.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import pkgutil
import re
import threading
from typing import Any

import torch

import minillm.lesson.exercises as exercises
from minillm.lesson.compare import first_difference, shorten, value_text
from minillm.lesson.exercise import Exercise, RanksExercise, Verdict, define, difference_text, grade
from minillm.ranks.errors import Fault, RankError
from minillm.ranks.membership import context
from minillm.ranks.places import remember_cells
from minillm.ranks.pool import Ranks

TOY_LIMIT_S = 3.0  # for one case
LIMIT_S = 8.0  # for an attempt on the toy; and again on real ranks
REAL_TIMEOUT_S = 3.0
PRINTED_LINES, LINE_CHARACTERS = 40, 400


def find_exercise(name: str) -> Exercise:
    """An exercise by its name, such as "00.total". Raises `ValueError` that lists the names."""
    found = all_exercises()
    if name not in found:
        raise ValueError(f"there is no exercise {name!r}; there are {', '.join(found)}")
    return found[name]


def all_exercises() -> dict[str, Exercise]:
    """Every exercise of the course, by name."""
    modules = sorted(info.name for info in pkgutil.iter_modules(exercises.__path__))
    loaded = [importlib.import_module(f"{exercises.__name__}.{name}") for name in modules]
    return {exercise.name: exercise for module in loaded for exercise in module.EXERCISES}


def judge(exercise: Exercise, source: str) -> Verdict:
    """The verdict on a cell: on the toy in a process of its own, then on real ranks. Takes at most about 20 s."""
    filename = f"<exercise {exercise.name}>"
    remember_cells({filename: source})
    with Ranks(1, device="cpu", timeout_s=LIMIT_S) as apart:
        try:
            verdict = apart.run(_judge_here, exercise.name, source, filename, limit_s=LIMIT_S)[0]
        except RankError as error:
            return Verdict(False, _ended(error))
    if verdict.solved and isinstance(exercise, RanksExercise):
        return _on_real_ranks(exercise, source, filename, verdict)
    return verdict


def try_here(exercise: Exercise, source: str) -> Verdict:
    """The verdict on a cell in this process, on the toy, without time limits: a debugger may stop in it."""
    try:
        return grade(exercise, define(exercise, source, f"<exercise {exercise.name}>"))
    except ValueError as error:
        return Verdict(False, str(error))


class Printed(io.TextIOBase):
    """Keeps what an attempt prints, at most 40 lines, each with the toy rank that printed it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.rest: dict[str, str] = {}  # thread -> its unfinished line
        self.left_out = 0

    def write(self, text: str) -> int:
        name = threading.current_thread().name
        *lines, self.rest[name] = (self.rest.get(name, "") + text[:LINE_CHARACTERS]).split("\n")
        for line in lines:
            self._keep(name, line)
        return len(text)

    def _keep(self, name: str, line: str) -> None:
        if len(self.lines) < PRINTED_LINES:
            self.lines.append(f"{name}: {line}" if name.startswith("rank ") else line)
        else:
            self.left_out += 1

    def text(self) -> str:
        """All of it, with what was left out."""
        for name, line in self.rest.items():
            if line:
                self._keep(name, line)
        return "\n".join([*self.lines, *([f"… and {self.left_out:,} lines more"] if self.left_out else [])])


def _judge_here(name: str, source: str, filename: str) -> Verdict:
    """Runs in the process apart."""
    exercise, printed = find_exercise(name), Printed()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            verdict = grade(exercise, define(exercise, source, filename), TOY_LIMIT_S)
        except ValueError as error:
            verdict = Verdict(False, str(error))
    verdict.printed = printed.text()
    if verdict.outcome is not None:  # what cannot be sent, or is no result at all, goes as words
        verdict.outcome.outputs = [_plain(value) for value in verdict.outcome.outputs]
        if verdict.outcome.toy is not None:
            verdict.outcome.toy.results = verdict.outcome.outputs
    return verdict


def _plain(value: Any) -> Any:
    return value if type(value) in (int, float, bool, torch.Tensor, type(None)) else value_text(value)


def _on_real_ranks(exercise: RanksExercise, source: str, filename: str, verdict: Verdict) -> Verdict:
    """Numbers that were not shown, on processes that talk over the machine's own transport."""
    inputs = exercise.real.inputs
    with Ranks(len(inputs), device="cpu", timeout_s=REAL_TIMEOUT_S) as ranks:
        try:
            outputs = ranks.run(_one_rank, exercise.name, source, filename, inputs, limit_s=LIMIT_S)
        except RankError as error:
            return Verdict(False, f"right on the toy, but on {len(inputs)} real ranks: {_short(error)}")
    found = first_difference(exercise.spec(exercise.real), outputs)
    if found is not None:
        return Verdict(
            False, f"right on the toy, but on {exercise.real.label}, real ones, {difference_text(exercise, found)}"
        )
    verdict.text += f"; and on {len(inputs)} real ranks"
    return verdict


def _one_rank(name: str, source: str, filename: str, inputs: tuple[Any, ...]) -> Any:
    here = context()
    with contextlib.redirect_stdout(Printed()), contextlib.redirect_stderr(Printed()):  # shown by the toy already
        return _plain(define(find_exercise(name), source, filename)(here.comm(), inputs[here.rank]))


def _ended(error: RankError) -> str:
    """What a process that did not answer was doing."""
    place = next(iter(error.verdict.places.values()), "")
    line = re.search(r"line \d+: .*|line \d+", place)
    at = f"; it stood at {line[0]}" if line else ""
    if error.fault is Fault.LATE:
        return f"the cell did not come to an end within {LIMIT_S:g} s and was stopped{at}"
    return f"the cell's process ended: {_short(error)}"


def _short(error: RankError) -> str:
    return "\n".join(shorten(line, 160) for line in str(error).split("\n\n")[0].splitlines()[:8])
