"""What an exercise is: a frame to fill, a specification that runs, cases from small to large, a published target.

`grade` looks at one attempt, case by case, and says one fact about the smallest that fails. Who starts processes for it,
and who shows what came out, is in `grading.py` and `magics.py`.
"""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from minillm.lesson.compare import first_difference, shorten, value_text
from minillm.ranks.places import line_of_error, remember_cells
from minillm.ranks.toy import run_toy
from minillm.ranks.toy_world import ToyRun

MOST_CHARACTERS = 170  # of a line
ALONE = "; the cell runs by itself: define in it what it uses (torch and math are there)"


class RuleError(ValueError):
    """An attempt broke a rule of its exercise; the verdict tells the rule, and no place in our code."""


@dataclass(frozen=True)
class Case:
    """One input: a value per rank, or the arguments of a function. `label` is how a verdict calls it."""

    label: str
    inputs: tuple[Any, ...]


@dataclass
class Outcome:
    """What one case gave: outputs to compare with the specification's, the work counted, and the toy's record if any."""

    outputs: list[Any]
    work: int = 0
    toy: ToyRun | None = None


@dataclass(frozen=True)
class Exercise:
    """An exercise on one device: `drive(function, case)` calls the learner's function as often as the case needs.

    `spec(case)` gives the expected outputs; `target(case)` how much of `unit` a good solution needs. `starter` and
    `solution` are whole cells that define `function`. `hints` come after the first and the third failure.
    """

    name: str
    function: str
    minutes: int
    spec: Callable[[Case], list[Any]]
    cases: tuple[Case, ...]
    starter: str
    solution: str
    hints: tuple[str, str]
    target: Callable[[Case], int] | None = None
    unit: str = ""
    names: tuple[str, ...] = ()  # what the places of the outputs are called
    drive: Callable[[Callable[..., Any], Case], Outcome] | None = None
    plain: bool = True  # the learner's function gets the case's inputs, and nothing else

    on_ranks = False

    def run(self, function: Callable[..., Any], case: Case, limit_s: float | None = None) -> Outcome:
        """One case."""
        if self.drive is not None:
            return self.drive(function, case)
        return Outcome([function(*copy.deepcopy(case.inputs))])  # an attempt may write into them

    def place(self, number: int) -> str:
        """What the n-th output is called in a verdict."""
        return self.names[number] if number < len(self.names) else ""


@dataclass(frozen=True)
class RanksExercise(Exercise):
    """An exercise on ranks: `function(comm, value)` runs on as many ranks as a case has inputs; the work is bytes sent, or
    what `measure` finds in the toy's record.

    `allowed` are the communicator's calls that a solution may use; `real` is the case for real ranks, not shown before.
    """

    allowed: tuple[str, ...] = ("send",)
    measure: Callable[[ToyRun], int] = lambda toy: toy.bytes
    real: Case = Case("", ())

    on_ranks = True

    def run(self, function: Callable[..., Any], case: Case, limit_s: float | None = None) -> Outcome:
        """One case, on the toy communicator."""
        toy = run_toy(function, copy.deepcopy(case.inputs), limit_s)  # an attempt may write into them
        return Outcome(toy.results, self.measure(toy), toy)

    def place(self, number: int) -> str:
        """The rank."""
        return f"rank {number}"


@dataclass
class Verdict:
    """What is told of an attempt. `outcome` and `case` are those of the case that is shown: the failing one, or the last."""

    solved: bool
    text: str
    case: Case | None = None
    outcome: Outcome | None = None
    expected: list[Any] = field(default_factory=list)
    wrong: tuple[int, tuple[int, ...]] | None = None  # output, and index within it
    printed: str = ""


def compile_cell(source: str, name: str) -> tuple[Any, str]:
    """The cell's code, or None and a line that says what is wrong with it."""
    try:
        return compile(ast.parse(source, name), name, "exec", dont_inherit=True), ""
    except (SyntaxError, ValueError) as error:
        number = getattr(error, "lineno", None)
        lines = source.splitlines()
        line = f": {lines[number - 1].strip()}" if number and number <= len(lines) else ""
        return None, f"line {number}: {error.args[0]}{line}" if number else str(error)


def define(exercise: Exercise, source: str, name: str) -> Callable[..., Any]:
    """Run a cell and return the function it defines. Raises `ValueError`, in one line, when that does not work."""
    remember_cells({name: source})  # so that errors and debuggers show its lines
    code, problem = compile_cell(source, name)
    if code is None:
        raise ValueError(problem)
    names: dict[str, Any] = {"torch": torch, "math": math, "__name__": "__main__"}
    try:
        exec(code, names)
    except (Exception, SystemExit) as error:
        raise ValueError(f"the cell fails: {error_text(error)}") from None
    if not callable(names.get(exercise.function)):
        raise ValueError(f"the cell does not define {exercise.function}(…)")
    return names[exercise.function]


def grade(exercise: Exercise, function: Callable[..., Any], limit_s: float | None = None) -> Verdict:
    """The verdict on one attempt: values first, then calls and targets, smallest case first."""
    outcomes: list[tuple[Case, Outcome]] = []
    verdict = Verdict(False, "there are no cases")
    for case in exercise.cases:
        verdict = _grade_values(exercise, function, case, limit_s)
        if not verdict.solved or verdict.outcome is None:
            return verdict
        outcomes.append((case, verdict.outcome))
    for case, outcome in outcomes:
        problem = _call_problem(exercise, outcome) or _work_problem(exercise, case, outcome)
        if problem:
            said = with_call(exercise, case, f"{case.label}: {problem}")
            return Verdict(False, said, case, outcome, exercise.spec(case))
    last = outcomes[-1][1]
    target = exercise.target(exercise.cases[-1]) if exercise.target else 0
    used = f"; the last took {last.work:,} {exercise.unit} (target {target:,})" if exercise.target else ""
    verdict.text = f"right in {len(exercise.cases)} cases{used}"
    return verdict


def _grade_values(exercise: Exercise, function: Callable[..., Any], case: Case, limit_s: float | None) -> Verdict:
    """Whether one case gives what the specification says."""
    try:
        outcome = exercise.run(function, case, limit_s)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        said = f"{case.label}: {error_text(error)}"
        return Verdict(False, said if isinstance(error, RuleError) else with_call(exercise, case, said), case)
    expected = exercise.spec(case)
    problem = _toy_problem(outcome.toy)
    found = None if problem else first_difference(expected, outcome.outputs)
    if found is not None:
        problem = difference_text(exercise, found)
    said = with_call(exercise, case, f"{case.label}: {problem}")
    return Verdict(not problem, said, case, outcome, expected, found[:2] if found else None)


def _call_problem(exercise: Exercise, outcome: Outcome) -> str:
    """A call that the exercise does without."""
    if outcome.toy is None or not isinstance(exercise, RanksExercise):
        return ""
    others = [message for message in outcome.toy.messages if message.operation not in exercise.allowed]
    if not others:
        return ""
    calls = " and ".join("send and recv" if call == "send" else call for call in exercise.allowed)
    return f"the results are right, but this is to be done with {calls} alone; {others[0].operation} was called"


def _work_problem(exercise: Exercise, case: Case, outcome: Outcome) -> str:
    """More work than the published target."""
    target = exercise.target(case) if exercise.target else outcome.work
    if outcome.work <= target:
        return ""
    times = f", {outcome.work / target:.1f}× as much" if target else ""
    return f"the results are right. It took {outcome.work:,} {exercise.unit}; the target is {target:,}{times}"


def error_text(error: BaseException) -> str:
    """An error in one line of some 200 characters, its line in the cell, and what helps against a missing name."""
    if isinstance(error, RuleError):
        return str(error)
    message = " ".join(f"{type(error).__name__}: {error}".split())
    where = line_of_error(error)
    where = "" if where.startswith("exercises/") else where  # ours, where the learner's function was called
    alone = ALONE if isinstance(error, NameError) else ""
    return shorten(message, 110) + (f" ({shorten(where, 80)})" if where else "") + alone


def _toy_problem(toy: ToyRun | None) -> str:
    """What stopped a run on ranks, in one line a rank."""
    if toy is None or toy.ended:
        return ""
    if toy.endless:
        rank, line = next(iter(toy.endless.items()))
        return f"rank {rank} did not come to an end and was stopped; it stood at {line}"
    if toy.errors:
        rank, text = next(iter(toy.errors.items()))
        return f"rank {rank} failed: {shorten(text, 240)}{ALONE if text.startswith('NameError') else ''}"
    lines = [f"  rank {rank} {what}" for rank, what in toy.waits.items()]
    lines += [f"  rank {rank} has returned" for rank in range(len(toy.results)) if rank not in toy.waits]
    return "nobody can go on:\n" + "\n".join(lines)


def with_call(exercise: Exercise, case: Case, said: str) -> str:
    """A verdict, with the call that the case makes, where it is one of plain numbers and lists and fits the line."""
    call = f"{exercise.function}({', '.join(map(repr, case.inputs))})"
    fits = exercise.plain and not exercise.on_ranks and len(said.splitlines()[-1]) + len(call) <= MOST_CHARACTERS
    return f"{said}, in {call}" if fits else said


def difference_text(exercise: Exercise, found: tuple[int, tuple[int, ...], Any, Any]) -> str:
    """Place, expected, got."""
    number, index, wanted, got = found
    place = exercise.place(number) + (f" at {list(index)}" if index else "")
    return f"{place}{': ' if place else ''}expected {value_text(wanted)}, got {value_text(got)}"
