"""Looks at attempts, each in a process of its own, so that an endless loop or a crash ends there and not in the notebook.

First the toy communicator, then, for exercises on ranks, real ranks. Nothing of the learner's code runs in the kernel.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import torch

import minillm.lesson.exercises as exercises
from minillm.lesson.exercise import Exercise, Verdict, define, first_difference, grade
from minillm.ranks.errors import RankError
from minillm.ranks.membership import context
from minillm.ranks.places import remember_cells
from minillm.ranks.pool import Ranks

TOY_LIMIT_S = 3.0  # for one case
LIMIT_S = 8.0  # for an attempt on the toy; and again on real ranks
REAL_TIMEOUT_S = 3.0


def find_exercise(name: str) -> Exercise:
    """An exercise by its name, such as "00.ring". Raises `ValueError` that lists the names."""
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
    with Ranks(1, device="cpu", timeout_s=LIMIT_S) as apart:
        try:
            verdict = apart.run(_judge_here, exercise.name, source, filename, limit_s=LIMIT_S)[0]
        except RankError as error:
            return Verdict(False, _ended(error))
    if verdict.solved and exercise.on_ranks:
        return _on_real_ranks(exercise, source, filename, verdict)
    return verdict


def try_here(exercise: Exercise, function: Callable[..., Any]) -> Verdict:
    """The verdict on a function in this process, on the toy, without time limits: a debugger may stop in it."""
    return grade(exercise, function)


def _judge_here(name: str, source: str, filename: str) -> Verdict:
    """Runs in the process apart."""
    exercise = find_exercise(name)
    remember_cells({filename: source})
    try:
        function = define(exercise, source, filename)
    except ValueError as error:
        return Verdict(False, str(error))
    except Exception as error:
        return Verdict(False, f"the cell fails: {type(error).__name__}: {error}")
    return grade(exercise, function, TOY_LIMIT_S)


def _on_real_ranks(exercise: Exercise, source: str, filename: str, verdict: Verdict) -> Verdict:
    """The largest case again, on processes that talk over the machine's own transport."""
    case = verdict.case
    assert case is not None
    with Ranks(len(case.inputs), device="cpu", timeout_s=REAL_TIMEOUT_S) as ranks:
        try:
            outputs = ranks.run(_one_rank, exercise.name, source, filename, case.inputs, limit_s=LIMIT_S)
        except RankError as error:
            return Verdict(
                False, f"right on the toy, but on {len(case.inputs)} real ranks: {_short(error)}", case, verdict.outcome
            )
    found = first_difference(verdict.expected, outputs)
    if found is not None:
        number, _, wanted, got = found
        text = f"right on the toy, but on real ranks, {exercise.place(number)}: expected {wanted}, got {got}"
        return Verdict(False, text, case, verdict.outcome)
    verdict.text += f"; and on {len(case.inputs)} real ranks"
    return verdict


def _one_rank(name: str, source: str, filename: str, inputs: tuple[Any, ...]) -> Any:
    remember_cells({filename: source})
    here = context()
    torch.set_num_threads(1)
    return define(find_exercise(name), source, filename)(here.comm(), inputs[here.rank])


def _ended(error: RankError) -> str:
    """What a process that did not answer was doing."""
    place = next(iter(error.verdict.places.values()), "")
    line = re.search(r"line \d+: .*|line \d+", place)
    at = f"; it stood at {line[0]}" if line else ""
    if "limit" in str(error):
        return f"the cell did not come to an end within {LIMIT_S:g} s and was stopped{at}"
    return f"the cell's process ended: {_short(error)}"


def _short(error: RankError) -> str:
    return "\n".join(str(error).split("\n\n")[0].splitlines()[:8])
