"""Exercises of lesson 10: the router's weights, experts packed by load, and a dispatch that sends no token twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from minillm.lesson.exercise import Case, Exercise, Outcome, RanksExercise, RuleError
from minillm.policy.experts import balanced_packing

HERE = 2  # experts on a rank, in the dispatch
NUMBERS = (3.0, 5.0, 2.0, 7.0, 11.0, 4.0, 13.0, 6.0)  # what each expert multiplies by


def route_spec(case: Case) -> list[float]:
    """A softmax over the k best scores, zero for the others."""
    scores, k = case.inputs
    best = sorted(range(len(scores)), key=lambda expert: -scores[expert])[:k]
    powers = {expert: math.exp(scores[expert] - scores[best[0]]) for expert in best}
    return [powers.get(expert, 0.0) / sum(powers.values()) for expert in range(len(scores))]


def drive_route(function: Callable[..., Any], case: Case) -> Outcome:
    """Raises `RuleError` for what is no weight for each expert."""
    scores, k = case.inputs
    weights = function(list(scores), k)
    if not isinstance(weights, (list, tuple)) or len(weights) != len(scores):
        raise RuleError(f"return a list of {len(scores)} weights, one for each expert, not {weights!r:.60}")
    return Outcome(list(weights))


def drive_pack(function: Callable[..., Any], case: Case) -> Outcome:
    """The work is the fullest rank's load. Raises `RuleError` for shares that are none."""
    loads, ranks = case.inputs
    shares = function(list(loads), ranks)
    if not isinstance(shares, (list, tuple)) or len(shares) != ranks or not all(
        isinstance(each, (list, tuple)) for each in shares
    ):  # fmt: skip
        raise RuleError(f"return a list with the experts of each of the {ranks} ranks, not {shares!r:.60}")
    each = len(loads) // ranks
    for rank, share in enumerate(shares):
        if strange := [held for held in share if type(held) is not int or not 0 <= held < len(loads)]:
            raise RuleError(f"rank {rank} has {strange[0]!r:.40}; there are experts 0 to {len(loads) - 1}")
        if len(share) != each:
            raise RuleError(f"rank {rank} has {len(share)} experts; expected {each}, as many on each rank")
    for expert in range(len(loads)):
        if (count := sum(list(share).count(expert) for share in shares)) != 1:
            raise RuleError(f"expert {expert} is there {count} times; expected once")
    return Outcome([len(loads)], round(max(sum(loads[held] for held in share) for share in shares)))


def fullest_load(case: Case) -> int:
    """Of the course's own packing."""
    loads, ranks = case.inputs
    return round(max(sum(loads[each] for each in share) for share in balanced_packing(loads, ranks)))


def mixture_spec(case: Case) -> list[torch.Tensor]:
    """The sum of what its experts multiply by, times x, for each token."""
    return [
        torch.tensor([[sum(NUMBERS[expert] for expert in mine) * number for number in row] for row, mine in zip(rows, choices[rank])])
        for rank, (rows, choices, _) in enumerate(case.inputs)
    ]  # fmt: skip


def least_bytes(case: Case) -> int:
    """There and back, a token's numbers once for every other rank that has some of its experts."""
    rows, choices, _ = case.inputs[0]
    ways = sum(
        len({expert // HERE for expert in experts} - {rank})
        for rank, mine in enumerate(choices)
        for experts in mine
    )  # fmt: skip
    return 2 * 4 * len(rows[0]) * ways


def _scores(label: str, *scores: float, k: int = 2) -> Case:
    return Case(f"{label}, top {k}", (list(scores), k))


def _loads(ranks: int, *loads: int) -> Case:
    return Case(f"{len(loads)} experts on {ranks} ranks", (list(loads), ranks))


def _chosen(label: str, *choices: list[tuple[int, ...]], first: int = 1) -> Case:
    rows = [
        [[float(first + 10 * rank + token), 1.0] for token in range(len(mine))] for rank, mine in enumerate(choices)
    ]
    held = [
        {expert: NUMBERS[expert] for expert in range(HERE * rank, HERE * (rank + 1))} for rank in range(len(choices))
    ]
    return Case(label, tuple((mine, list(choices), here) for mine, here in zip(rows, held)))


ROUTE = Exercise(
    name="10.route",
    function="route",
    minutes=5,
    spec=route_spec,
    drive=drive_route,
    names=tuple(f"expert {number}" for number in range(16)),
    cases=(
        _scores("two experts", 1.0, 0.0, k=1),
        _scores("four experts", 2.0, 1.0, 0.0, -1.0),
        _scores("the best come last", -3.0, 0.0, 1.0, 0.5, 1.5, k=3),
        _scores("high scores", 1000.0, 998.0, 997.0),
        _scores("three are alike", 0.0, 1.0, 1.0, 1.0),
    ),
    starter='''\
def route(scores, k):
    """The weight of every expert for one token: a softmax over the k best scores, 0.0 for all others.

    Of scores that are alike, the first count as better.
    """
    powers = [math.exp(score) for score in scores]  # MEND (about 5 lines): this takes all experts
    return [power / sum(powers) for power in powers]
''',
    solution='''\
def route(scores, k):
    """Those below the k-th best get nothing; the best one is subtracted, so that no power is too large."""
    best = sorted(range(len(scores)), key=lambda expert: -scores[expert])[:k]
    powers = [math.exp(score - max(scores)) if expert in best else 0.0 for expert, score in enumerate(scores)]
    return [power / sum(powers) for power in powers]
''',
    hints=(
        "Which experts are the k best? Only their powers are in the sum.",
        "exp(score − max(scores)) gives the same shares, and no number that is too large.",
    ),
)

PACK = Exercise(
    name="10.pack",
    function="pack",
    minutes=10,
    spec=lambda case: [len(case.inputs[0])],
    drive=drive_pack,
    target=fullest_load,
    unit="tokens on the fullest rank",
    names=("experts placed",),
    cases=(
        _loads(2, 3, 1),
        _loads(2, 9, 7, 2, 0),
        _loads(3, 10, 9, 8, 3, 2, 1),
        _loads(2, 20, 1, 1, 1, 1, 1),
        _loads(4, 23, 22, 0, 1, 5, 4, 2, 4, 1, 0, 8, 4, 9, 3, 2, 8),
    ),
    starter='''\
def pack(loads, ranks):
    """The experts of each rank, as many on each (the number of experts is a multiple of ranks).

    loads[e] says how many tokens chose expert e. Target: the fullest rank has as little as the course's.
    """
    each = len(loads) // ranks
    return [list(range(rank * each, (rank + 1) * each)) for rank in range(ranks)]  # MEND (about 7 lines)
''',
    solution='''\
def pack(loads, ranks):
    """The heaviest first, each to the emptiest rank that has room."""
    shares, each = [[] for _ in range(ranks)], len(loads) // ranks
    for expert in sorted(range(len(loads)), key=lambda expert: -loads[expert]):
        room = [share for share in shares if len(share) < each]
        min(room, key=lambda share: sum(loads[held] for held in share)).append(expert)
    return shares
''',
    hints=(
        "Which expert is the hardest to place well? Place that one first.",
        "From the heaviest to the lightest: to the rank with the smallest sum so far, among those with room.",
    ),
)

DISPATCH = RanksExercise(
    name="10.dispatch",
    function="mixture",
    minutes=25,
    spec=mixture_spec,
    cases=(
        _chosen("2 ranks, each token with one expert", [(0,), (2,)], [(1,), (3,)]),
        _chosen("2 ranks, both experts on one of them", [(2, 3), (0, 1)], [(2, 3), (0, 2)]),
        _chosen("3 ranks, nobody asks rank 2", [(0, 1), (1, 2)], [(0, 3), (2, 3)], [(0, 2), (1, 0)]),
        _chosen(
            "4 ranks, 3 experts a token",
            [(0, 1, 6), (2, 5, 7)],
            [(0, 2, 3), (4, 6, 7)],
            [(4, 5, 0), (1, 2, 3)],
            [(6, 7, 5), (0, 1, 2)],
        ),
    ),
    real=_chosen(
        "4 ranks",
        [(1, 0, 7), (3, 6, 7)],
        [(5, 4, 2), (0, 1, 3)],
        [(2, 6, 3), (7, 5, 6)],
        [(1, 0, 2), (4, 5, 7)],
        first=3,
    ),
    allowed=("all_to_all", "all_gather", "all_reduce", "send"),
    target=least_bytes,
    unit="bytes of messages",
    starter='''\
def mixture(comm, given):
    """What this rank's tokens get from their experts: the sum of w[e] * x over a token's experts e.

    given = rows, choices, w: the numbers of this rank's tokens; for every rank and each of its tokens
    the experts it chose; and w[e] of the experts e that this rank holds, 2r and 2r + 1 on rank r.
    Target: a token goes once to each other rank that has some of its experts, and one answer comes back.
    """
    rows, choices, w = given
    x = torch.tensor(rows)
    everyone = comm.all_gather(x)  # MEND (about 14 lines): all ranks get all tokens, and all results
    total = torch.zeros_like(everyone)
    for number, experts in enumerate(experts for rank in choices for experts in rank):
        for expert in experts:
            if expert in w:
                total[number] += w[expert] * everyone[number]
    return comm.all_reduce(total).chunk(comm.size)[comm.rank]
''',
    solution='''\
def mixture(comm, given):
    """One all-to-all takes the tokens out, one brings the answers back."""
    rows, choices, w = given
    x = torch.tensor(rows)

    def asked(source, to):
        """The tokens of a rank that have experts on another one, and which."""
        there = [[e for e in experts if e // 2 == to] for experts in choices[source]]
        return [(token, held) for token, held in enumerate(there) if held]

    going = [asked(comm.rank, other) for other in range(comm.size)]
    coming = [asked(other, comm.rank) for other in range(comm.size)]
    send, recv = [len(each) for each in going], [len(each) for each in coming]
    tokens = torch.tensor([token for each in going for token, _ in each])
    factors = torch.tensor([sum(w[e] for e in held) for each in coming for _, held in each])
    came = comm.all_to_all(x[tokens], send, recv)
    back = comm.all_to_all(came * factors[:, None], recv, send)
    return torch.zeros_like(x).index_add_(0, tokens, back)
''',
    hints=(
        "Every rank knows all choices. For each other rank: which of your tokens have an expert there, and which of its tokens have one here?",
        "all_to_all(rows in rank order, how many to each rank, how many from each). Answers go back with the two lists exchanged; index_add_ adds them to their tokens.",
    ),
)

EXERCISES = (ROUTE, PACK, DISPATCH)
