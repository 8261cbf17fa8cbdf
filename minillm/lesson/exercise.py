"""What an exercise is: a frame to fill, a specification that runs, cases from small to large, a published target.

`grade` looks at one attempt, case by case, and says one fact about the smallest that fails. Who starts processes for it,
and who shows what came out, is in `grading.py` and `magics.py`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from minillm.ranks.toy import ToyRun, run_toy

ALONE = "; the cell runs by itself: define in it what it uses (torch and math are there)"
CLOSE = 1e-4  # relative, for float32 sums in another order


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
    names: tuple[str, ...] = ()  # what the places of the outputs are called; "rank 0", "rank 1" … on ranks
    drive: Callable[[Callable[..., Any], Case], Outcome] | None = None

    on_ranks = False

    def run(self, function: Callable[..., Any], case: Case, limit_s: float | None = None) -> Outcome:
        """One case."""
        if self.drive is not None:
            return self.drive(function, case)
        return Outcome([function(*case.inputs)])

    def place(self, number: int) -> str:
        """What the n-th output is called in a verdict."""
        return self.names[number] if number < len(self.names) else ""


@dataclass(frozen=True)
class RanksExercise(Exercise):
    """An exercise on ranks: `function(comm, value)` runs on as many ranks as a case has inputs; the work is bytes sent."""

    on_ranks = True

    def run(self, function: Callable[..., Any], case: Case, limit_s: float | None = None) -> Outcome:
        """One case, on the toy communicator."""
        toy = run_toy(function, case.inputs, limit_s)
        return Outcome(toy.results, toy.bytes, toy)

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


def compile_cell(source: str, name: str) -> tuple[Any, str]:
    """The cell's code, or None and a line that says what is wrong with it."""
    try:
        return compile(ast.parse(source, name), name, "exec"), ""
    except SyntaxError as error:
        line = source.splitlines()[error.lineno - 1].strip() if error.lineno and source.strip() else ""
        return None, f"line {error.lineno}: {error.msg}: {line}"


def define(exercise: Exercise, source: str, name: str) -> Callable[..., Any]:
    """Run a cell and return the function it defines. Raises `ValueError` when it does not define it."""
    code, problem = compile_cell(source, name)
    if code is None:
        raise ValueError(problem)
    names: dict[str, Any] = {"torch": torch, "math": math, "__name__": "__main__"}
    exec(code, names)
    if not callable(names.get(exercise.function)):
        raise ValueError(f"the cell does not define {exercise.function}(…)")
    return names[exercise.function]


def grade(exercise: Exercise, function: Callable[..., Any], limit_s: float | None = None) -> Verdict:
    """The verdict on one attempt: values first, then targets, smallest case first."""
    last = Verdict(False, "")
    for case in exercise.cases:
        try:
            outcome = exercise.run(function, case, limit_s)
        except Exception as error:
            return Verdict(
                False,
                f"{case.label}: {type(error).__name__}: {error}{ALONE if isinstance(error, NameError) else ''}",
                case,
            )
        expected = exercise.spec(case)
        problem = _toy_problem(outcome.toy) or _value_problem(exercise, expected, outcome)
        last = Verdict(not problem, problem, case, outcome, expected)
        if problem:
            found = first_difference(expected, outcome.outputs) if outcome.toy is None or outcome.toy.ended else None
            last.wrong = found[:2] if found else None
            last.text = f"{case.label}: {problem}"
            return last
    for case in exercise.cases if exercise.target else ():
        assert exercise.target is not None
        work, target = exercise.run(function, case, limit_s).work, exercise.target(case)
        if work > target:
            times = f", {work / target:.1f}× as much" if target else ""
            last.solved = False
            last.text = f"{case.label}: the results are right, but it took {work:,} {exercise.unit}; the target is {target:,}{times}"
            return last
    used = f", with {last.outcome.work:,} {exercise.unit}, the target" if exercise.target and last.outcome else ""
    last.text = f"right in {len(exercise.cases)} cases, up to {exercise.cases[-1].label}{used}"
    return last


def _toy_problem(toy: ToyRun | None) -> str:
    """What stopped a run on ranks, in one line a rank."""
    if toy is None or toy.ended:
        return ""
    if toy.endless:
        rank, line = next(iter(toy.endless.items()))
        return f"rank {rank} did not come to an end and was stopped; it stood at {line}"
    if toy.errors:
        rank, text = next(iter(toy.errors.items()))
        return f"rank {rank} failed: {text}{ALONE if text.startswith('NameError') else ''}"
    lines = [f"  rank {rank} {what}" for rank, what in toy.waits.items()]
    lines += [f"  rank {rank} has returned" for rank in range(len(toy.results)) if rank not in toy.waits]
    return "nobody can go on:\n" + "\n".join(lines)


def _value_problem(exercise: Exercise, expected: list[Any], outcome: Outcome) -> str:
    found = first_difference(expected, outcome.outputs)
    if found is None:
        return ""
    number, index, wanted, got = found
    at = f" at {list(index)}" if index else ""
    place = exercise.place(number)
    return (
        f"{place}{at}: expected {_text(wanted)}, got {_text(got)}"
        if place or at
        else f"expected {_text(wanted)}, got {_text(got)}"
    )


def first_difference(expected: Sequence[Any], got: Sequence[Any]) -> tuple[int, tuple[int, ...], Any, Any] | None:
    """The first output that differs, and where in it: (output, index, expected, got); None when all agree."""
    for number, wanted in enumerate(expected):
        have = got[number] if number < len(got) else None
        if isinstance(wanted, torch.Tensor):
            if not isinstance(have, torch.Tensor) or have.shape != wanted.shape:
                return number, (), f"a tensor {list(wanted.shape)}", _kind(have)
            off = ~torch.isclose(have.to(wanted.dtype), wanted, rtol=CLOSE, atol=CLOSE)
            if off.any():
                index = tuple(off.nonzero()[0].tolist())
                return number, index, wanted[index].item(), have[index].item()
        elif not _same(wanted, have):
            return number, (), wanted, have
    return None


def _same(wanted: Any, have: Any) -> bool:
    if isinstance(have, torch.Tensor) and have.numel() == 1:
        have = have.item()
    if isinstance(wanted, (int, float)) and isinstance(have, (int, float)):
        return math.isclose(wanted, have, rel_tol=CLOSE, abs_tol=1e-9)
    return bool(wanted == have)


def _kind(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.6g}" if not value.is_integer() or abs(value) >= 1e15 else f"{int(value):,}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return text if len(text) <= 60 else text[:59] + "…"
