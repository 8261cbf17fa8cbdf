"""Exercises of lesson 09: where a rank stands, a token through a hybrid of four ranks, two goals with the fewest devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from minillm.lesson.exercise import Case, Exercise, Outcome, RanksExercise, RuleError
from minillm.lesson.goals import drive_fewest, fewest_of, goals_case, to_the_dot
from minillm.parallel.layout import Layout

WIDTH = 4  # of a hidden state


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
    spec=lambda case: [found.world_size if (found := fewest_of(case)[0]) else 0],
    drive=drive_fewest,
    plain=False,
    target=lambda case: fewest_of(case)[1],
    unit="layouts planned",
    names=("devices (0: none)",),
    cases=(
        goals_case("8B on H100s, 1 request: 100 and 20 ms", "Llama-3.1-8B", "H100", 8, "NVLink 4", "400 Gbit/s", 1, (100, 20)),
        goals_case("8B on T4s, 1 request: 900 and 60 ms", "Llama-3.1-8B", "T4", 4, "PCIe 3 x16", "25 Gbit/s", 1, (900, 60)),
        goals_case("8B on H100s, 1 request: 14 and 3 ms", "Llama-3.1-8B", "H100", 8, "NVLink 4", "400 Gbit/s", 1, (14, 3)),
        goals_case("70B on H100s, 16 requests: 640 and 25 ms", "Llama-3.1-70B", "H100", 8, "NVLink 4", "25 Gbit/s", 16, (640, 25)),
        goals_case("70B on H100s, 4 a host, 16 requests: 400 and 13 ms", "Llama-3.1-70B", "H100", 4, "NVLink 4", "25 Gbit/s", 16, (400, 13)),
        goals_case("405B on H200s, 4 requests: 400 and 30 ms", "Llama-3.1-405B", "H200", 8, "NVLink 4", "25 Gbit/s", 4, (400, 30)),
        goals_case("405B on H100s, 4 requests: 900 and 40 ms", "Llama-3.1-405B", "H100", 8, "NVLink 4", "25 Gbit/s", 4, (900, 40)),
        to_the_dot("goals that tp=4 meets to the dot", goals_case("", "Llama-3.1-8B", "H100", 8, "NVLink 4", "400 Gbit/s", 1, (1, 1)), 1, 1, 4),
        goals_case("8B on H100s, 1 request: 1 and 1 ms", "Llama-3.1-8B", "H100", 8, "NVLink 4", "400 Gbit/s", 1, (1, 1)),
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
