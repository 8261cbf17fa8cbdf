"""Two goals to be met with the fewest devices: the question of lesson 09's last exercise, its answer, and what is said of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minillm.hardware.devices import find_device, find_link
from minillm.lesson.exercise import Case, Outcome, RuleError
from minillm.model.config import ModelConfig
from minillm.model.shapes import SHAPES
from minillm.parallel.hybrid import fitting
from minillm.parallel.layout import Layout
from minillm.parallel.plan import Hosts, Load

MOST = (1, 2, 4, 8, 16)  # devices that can be had

Plan = Callable[[int, int, int], tuple[float, float, bool]]


class Question:
    """What `fewest` is asked for: two goals, in seconds, and what any layout takes."""

    def __init__(self, model: ModelConfig, dtype: str, hosts: Hosts, requests: int, prompt: int) -> None:
        self.model, self.dtype, self.hosts = model, dtype, hosts
        self.prefill, self.decode = Load(requests, prompt, 0), Load(requests, 1, prompt)
        self._known: dict[Layout, tuple[float, float, bool]] = {}

    def plan(self, dp: int, pp: int, tp: int) -> tuple[float, float, bool]:
        """Seconds to all first tokens, seconds for each next one, and whether it fits. Raises `ValueError` for what cannot be."""
        layout = Layout(dp=dp, pp=pp, tp=tp)
        layout.check(self.model)
        if layout not in self._known:
            loads = (self.prefill, self.decode)
            first, later = (self.hosts.step_time(layout, self.model, self.dtype, load) for load in loads)
            self._known[layout] = first.total_s, later.total_s, first.fits and later.fits
        return self._known[layout]


def fewest_layout(plan: Plan, model: ModelConfig, ttft_s: float, tpot_s: float) -> tuple[Layout | None, int]:
    """The layout with the fewest devices that meets both goals, the soonest of these; and how many were planned for it."""
    planned = 0
    for count in MOST:
        meeting = []
        for layout in fitting(model, count):
            planned += 1
            first_s, next_s, fits = plan(layout.dp, layout.pp, layout.tp)
            if fits and first_s <= ttft_s and next_s <= tpot_s:
                meeting.append((first_s, layout))
        if meeting:
            return min(meeting, key=lambda each: each[0])[1], planned
    return None, planned


def drive_fewest(function: Callable[..., Any], case: Case) -> Outcome:
    """The number of devices of what was chosen. Raises `RuleError` for a layout that misses a goal."""
    question, ttft_s, tpot_s = case.inputs
    seen: list[tuple[int, int, int]] = []

    def plan(dp: int, pp: int, tp: int) -> tuple[float, float, bool]:
        seen.append((dp, pp, tp))
        found: tuple[float, float, bool] = question.plan(dp, pp, tp)
        return found

    chosen = function(plan, list(MOST), ttft_s, tpot_s)
    if chosen is None:
        return Outcome([0], len(set(seen)))
    if not isinstance(chosen, (tuple, list)) or len(chosen) != 3 or not all(type(each) is int for each in chosen):
        raise RuleError(f"return (dp, pp, tp), or None; got {chosen!r}"[:150])
    try:
        layout, found = Layout(dp=chosen[0], pp=chosen[1], tp=chosen[2]), question.plan(*chosen)
    except ValueError as error:
        raise RuleError(str(error)) from None
    _check_goals(layout, found, ttft_s, tpot_s)
    best = fewest_of(case)[0]
    if best and best.world_size == layout.world_size:
        soonest_s = question.plan(best.dp, best.pp, best.tp)[0]
        if found[0] > soonest_s * 1.000001:
            raise RuleError(
                f"with {_name(layout)} first tokens take {found[0] * 1e3:.1f} ms; {_name(best)} takes as many devices, and "
                f"{soonest_s * 1e3:.1f} ms"
            )
    return Outcome([layout.world_size], len(set(seen)))


def _check_goals(layout: Layout, found: tuple[float, float, bool], ttft_s: float, tpot_s: float) -> None:
    first_s, next_s, fits = found
    name = _name(layout)
    if layout.world_size not in MOST:
        raise RuleError(f"{name} takes {layout.world_size} devices; there are {', '.join(map(str, MOST))} to be had")
    if not fits:
        raise RuleError(f"{name} does not fit into memory")
    for what, time_s, goal_s in (("first tokens take", first_s, ttft_s), ("a token takes", next_s, tpot_s)):
        if time_s > goal_s:
            raise RuleError(f"with {name} {what} {time_s * 1e3:.1f} ms; the goal is {goal_s * 1e3:.1f}")


def _name(layout: Layout) -> str:
    return str(layout) or "one device"


def goals_case(
    label: str, model: str, device: str, per_host: int, inside: str, between: str, requests: int, goals_ms: tuple[float, float]
) -> Case:  # fmt: skip
    """Prompts of 1,000 tokens on hosts of so many devices, and what first and next tokens may take."""
    hosts = Hosts(find_device(device), per_host, find_link(inside), find_link(between))
    dtype = "float16" if device == "T4" else "bfloat16"
    question = Question(SHAPES[model], dtype, hosts, requests, 1000)
    return Case(label, (question, goals_ms[0] / 1e3, goals_ms[1] / 1e3))


def to_the_dot(label: str, case: Case, dp: int, pp: int, tp: int) -> Case:
    """The same question, with goals that a layout meets and nothing more."""
    first_s, next_s, _ = case.inputs[0].plan(dp, pp, tp)
    return Case(label, (case.inputs[0], first_s, next_s))


def fewest_of(case: Case) -> tuple[Layout | None, int]:
    """The course's own answer."""
    question, ttft_s, tpot_s = case.inputs
    return fewest_layout(question.plan, question.model, ttft_s, tpot_s)
