"""Exercises of lesson 09: where a rank stands, a token through a hybrid of four ranks, two goals with the fewest devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from minillm.hardware.devices import find_device, find_link
from minillm.lesson.exercise import Case, Exercise, Outcome, RanksExercise, RuleError
from minillm.model.config import ModelConfig
from minillm.model.shapes import SHAPES
from minillm.parallel.hybrid import fitting
from minillm.parallel.layout import Layout
from minillm.parallel.plan import Hosts, Load

WIDTH = 4  # of a hidden state
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


def place_spec(case: Case) -> list[int]:
    """Replica, stage and slice."""
    rank, dp, pp, tp = case.inputs
    here = Layout(dp=dp, pp=pp, tp=tp).coordinates(rank)
    return [here["dp"], here["pp"], here["tp"]]


def token_spec(case: Case) -> list[torch.Tensor]:
    """Each stage's result, on both of its ranks."""
    x, results = case.inputs[0][0], []
    for stage in range(len(case.inputs) // 2):
        x = x @ case.inputs[2 * stage][1] + x @ case.inputs[2 * stage + 1][1]
        results += [x, x]
    return results


def token_bytes(case: Case) -> int:
    """A sum is two messages, and each rank but the last stage's sends one on."""
    stages = len(case.inputs) // 2
    return 4 * WIDTH * (2 * stages + 2 * (stages - 1))


def _drive_place(function: Callable[..., Any], case: Case) -> Outcome:
    """Three numbers. Raises `RuleError` for anything else."""
    place = function(*case.inputs)
    if not isinstance(place, (tuple, list)) or len(place) != 3:
        raise RuleError(f"return (replica, stage, slice); got {place!r}"[:150])
    return Outcome(list(place))


def _drive_fewest(function: Callable[..., Any], case: Case) -> Outcome:
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
    best = _fewest(case)[0]
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


def _place(rank: int, dp: int, pp: int, tp: int) -> Case:
    layout = Layout(dp=dp, pp=pp, tp=tp)
    return Case(f"rank {rank} of {layout}", (rank, dp, pp, tp))


def _token(stages: int, seed: int) -> Case:
    """Small whole numbers, so that every order of adding gives the same."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 4, (WIDTH,), generator=generator).float()
    halves = [torch.randint(-2, 3, (WIDTH, WIDTH), generator=generator).float() for _ in range(2 * stages)]
    given = tuple((x if rank < 2 else None, half) for rank, half in enumerate(halves))
    return Case(f"pp={stages},tp=2", given)


def _goals(
    label: str, model: str, device: str, per_host: int, inside: str, between: str, requests: int, goals_ms: tuple[float, float]
) -> Case:  # fmt: skip
    hosts = Hosts(find_device(device), per_host, find_link(inside), find_link(between))
    dtype = "float16" if device == "T4" else "bfloat16"
    question = Question(SHAPES[model], dtype, hosts, requests, 1000)
    return Case(label, (question, goals_ms[0] / 1e3, goals_ms[1] / 1e3))


def _to_the_dot(label: str, case: Case, dp: int, pp: int, tp: int) -> Case:
    """The same question, with goals that a layout meets and nothing more."""
    first_s, next_s, _ = case.inputs[0].plan(dp, pp, tp)
    return Case(label, (case.inputs[0], first_s, next_s))


def _fewest(case: Case) -> tuple[Layout | None, int]:
    question, ttft_s, tpot_s = case.inputs
    return fewest_layout(question.plan, question.model, ttft_s, tpot_s)


PLACE = Exercise(
    name="09.place",
    function="place",
    minutes=5,
    spec=place_spec,
    drive=_drive_place,
    names=("replica", "stage", "slice"),
    cases=(
        _place(1, 1, 1, 2),
        _place(2, 1, 2, 2),
        _place(5, 2, 2, 2),
        _place(3, 2, 2, 1),
        _place(11, 2, 3, 2),
        _place(13, 4, 1, 4),
    ),
    starter='''\
def place(rank, dp, pp, tp):
    """(replica, stage, slice) of a rank. Slices count fastest, then stages, then replicas."""
    return 0, 0, rank  # MEND (about 3 lines)
''',
    solution='''\
def place(rank, dp, pp, tp):
    """From the axis that counts fastest to the slowest."""
    rest, slice = divmod(rank, tp)
    replica, stage = divmod(rest, pp)
    return replica, stage, slice
''',
    hints=(
        "Like hours, minutes and seconds: what is left over counts for the next larger one.",
        "divmod(rank, tp) gives what is left over, and the slice. Then the same with pp.",
    ),
)

TOKEN = RanksExercise(
    name="09.token",
    function="token",
    minutes=10,
    spec=token_spec,
    cases=(_token(1, 1), _token(2, 2), _token(3, 3)),
    real=_token(2, 5),
    target=token_bytes,
    unit="bytes sent",
    starter='''\
def token(comm, given):
    """A token through stages of two ranks each, rank = 2 · stage + slice. Return what your stage gave.

    Both ranks of a stage have its input x [4], and a half of its weights, [4, 4]: x @ half is a
    summand of the stage's result. Both ranks of stage 0 are given x; each of the others gets its own
    from a rank of the stage before. comm.send(tensor, to), comm.recv(torch.zeros(4), source).
    Target: 16 bytes a message, two for each sum, and one from each rank to the next stage.
    """
    x, half = given
    if x is None:  # MEND (about 12 lines): nobody hears of anybody
        x = torch.zeros(4)
    return x @ half
''',
    solution='''\
def token(comm, given):
    """Receive, compute, add up with the neighbour, pass on."""
    x, half = given
    stage, slice = divmod(comm.rank, 2)
    if stage > 0:
        x = comm.recv(torch.zeros(4), comm.rank - 2)
    mine, theirs = x @ half, torch.zeros(4)
    if slice == 0:
        comm.send(mine, comm.rank + 1)
        comm.recv(theirs, comm.rank + 1)
    else:
        comm.recv(theirs, comm.rank - 1)
        comm.send(mine, comm.rank - 1)
    result = mine + theirs
    if comm.rank + 2 < comm.size:
        comm.send(result, comm.rank + 2)
    return result
''',
    hints=(
        "Who is your neighbour along tp, and who is in the next stage? rank ± 1, and rank + 2.",
        "Two ranks that both send first wait for each other: slice 0 sends first, slice 1 receives first. Then add, and send on.",
    ),
)

FEWEST = Exercise(
    name="09.fewest",
    function="fewest",
    minutes=25,
    spec=lambda case: [found.world_size if (found := _fewest(case)[0]) else 0],
    drive=_drive_fewest,
    plain=False,
    target=lambda case: _fewest(case)[1],
    unit="layouts planned",
    names=("devices (0: none)",),
    cases=(
        _goals("8B on H100s, 1 request: 100 and 20 ms", "Llama-3.1-8B", "H100", 8, "NVLink 4", "400 Gbit/s", 1, (100, 20)),
        _goals("8B on T4s, 1 request: 900 and 60 ms", "Llama-3.1-8B", "T4", 4, "PCIe 3 x16", "25 Gbit/s", 1, (900, 60)),
        _goals("8B on H100s, 1 request: 14 and 3 ms", "Llama-3.1-8B", "H100", 8, "NVLink 4", "400 Gbit/s", 1, (14, 3)),
        _goals("70B on H100s, 16 requests: 640 and 25 ms", "Llama-3.1-70B", "H100", 8, "NVLink 4", "25 Gbit/s", 16, (640, 25)),
        _goals("70B on H100s, 4 a host, 16 requests: 400 and 13 ms", "Llama-3.1-70B", "H100", 4, "NVLink 4", "25 Gbit/s", 16, (400, 13)),
        _goals("405B on H200s, 4 requests: 400 and 30 ms", "Llama-3.1-405B", "H200", 8, "NVLink 4", "25 Gbit/s", 4, (400, 30)),
        _goals("405B on H100s, 4 requests: 900 and 40 ms", "Llama-3.1-405B", "H100", 8, "NVLink 4", "25 Gbit/s", 4, (900, 40)),
        _to_the_dot("goals that tp=4 meets to the dot", _goals("", "Llama-3.1-8B", "H100", 8, "NVLink 4", "400 Gbit/s", 1, (1, 1)), 1, 1, 4),
        _goals("8B on H100s, 1 request: 1 and 1 ms", "Llama-3.1-8B", "H100", 8, "NVLink 4", "400 Gbit/s", 1, (1, 1)),
    ),
    starter='''\
def fewest(plan, counts, ttft_s, tpot_s):
    """(dp, pp, tp) with the fewest devices that meets both goals, at most ttft_s and at most tpot_s.

    Of several with as few, the one with the soonest first tokens; None where nothing meets them.

    plan(dp, pp, tp) returns (seconds to all first tokens, seconds for each next one, whether it fits
    into memory). counts are the numbers of devices that can be had, rising; all of them are used,
    dp · pp · tp. Target: plan nothing larger than needed.
    """
    for tp in counts:  # MEND (about 10 lines): there are other axes
        first_s, next_s, fits = plan(1, 1, tp)
        if fits and next_s <= tpot_s:
            return 1, 1, tp
    return None
''',
    solution='''\
def fewest(plan, counts, ttft_s, tpot_s):
    """All layouts of a number of devices, from the fewest up."""
    for count in counts:
        best = None
        for dp in range(1, count + 1):
            for pp in range(1, count // dp + 1):
                tp = count // (dp * pp)
                if dp * pp * tp != count:
                    continue
                first_s, next_s, fits = plan(dp, pp, tp)
                if fits and first_s <= ttft_s and next_s <= tpot_s and (best is None or first_s < best[0]):
                    best = first_s, (dp, pp, tp)
        if best is not None:
            return best[1]
    return None
''',
    hints=(
        "For each count, which (dp, pp, tp) have that product? Look at all of them before you take more devices.",
        "for dp in 1 … count, for pp in 1 … count // dp, tp = count // (dp * pp) if the product is right. Both goals and memory.",
    ),
)  # fmt: skip

EXERCISES = (PLACE, TOKEN, FEWEST)
