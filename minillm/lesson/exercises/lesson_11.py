"""Exercises of lesson 11: the merge with an empty shard, who should travel, and a query that asks every rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from minillm.distkv.spread import answer_bytes, key_bytes
from minillm.lesson.exercise import Case, Exercise, Outcome, RanksExercise, RuleError

NOTHING = (-math.inf, 0.0, [0.0, 0.0])  # what a rank without keys says


def softmax_attention(scores: list[float], values: list[list[float]]) -> list[float]:
    """Σ exp(s − max) v / Σ exp(s − max): one query, all its keys in one place."""
    powers = [math.exp(score - max(scores)) for score in scores]
    return [sum(p * v[at] for p, v in zip(powers, values)) / sum(powers) for at in range(len(values[0]))]


def part_of(scores: list[float], values: list[list[float]]) -> tuple[float, float, list[float]]:
    """What a rank with these keys answers: the largest score m, l = Σ exp(s − m), and o = Σ exp(s − m) v."""
    if not scores:
        return NOTHING
    powers = [math.exp(score - max(scores)) for score in scores]
    return max(scores), sum(powers), [sum(p * v[at] for p, v in zip(powers, values)) for at in range(2)]


def merge_spec(case: Case) -> list[float]:
    """Of parts with l and o, weighted by exp(m − the largest m)."""
    (parts,) = case.inputs
    most = max(m for m, _, _ in parts)
    weights = [math.exp(m - most) for m, _, _ in parts]
    total = sum(w * powers for w, (_, powers, _) in zip(weights, parts))
    return [sum(w * o[at] for w, (_, _, o) in zip(weights, parts)) / total for at in range(2)]


def drive_merge(function: Callable[..., Any], case: Case) -> Outcome:
    """Raises `RuleError` for what is no pair of numbers."""
    given = [(most, total, list(o)) for most, total, o in case.inputs[0]]
    result = function(given)
    if not isinstance(result, (list, tuple)) or len(result) != 2:
        raise RuleError(f"return a list of 2 numbers, as o has, not {result!r:.60}")
    return Outcome(list(result))


def travel_spec(case: Case) -> list[int]:
    """The bytes of the cheaper of the two, in float32."""
    queries, keys, heads, kv_heads, head_dim = case.inputs
    return [min(queries * answer_bytes(heads, head_dim, 4), keys * key_bytes(kv_heads, head_dim, 4))]


def ask_spec(case: Case) -> list[Any]:
    """Rank 0's query attends to all keys; the others return nothing."""
    q = case.inputs[0][0]
    scores = [sum(a * b for a, b in zip(q, k)) / 2**0.5 for _, keys, _, _ in case.inputs for k in keys]
    values = [v for _, _, held, _ in case.inputs for v in held]
    return [torch.tensor(softmax_attention(scores, values)), *[None] * (len(case.inputs) - 1)]


def least_bytes(case: Case) -> int:
    """A query of two numbers to every other rank that has keys, and m, l and two numbers of o back."""
    return sum(4 * (2 + 4) for _, keys, _, _ in case.inputs[1:] if keys)


def _parts(label: str, *shards: list[tuple[float, list[float]]]) -> Case:
    return Case(label, ([part_of([s for s, _ in shard], [v for _, v in shard]) for shard in shards],))


def _document(label: str, *lengths: int, first: int = 1, query: tuple[float, float] = (1.5, -0.5)) -> Case:
    """So many keys on each rank. All ranks know how many there are, and only rank 0 has the query."""
    made = [[((7 * n + 3 * at) % 5 - 2.0) / 2 for at in range(4)] for n in range(first, first + sum(lengths))]
    begins = [sum(lengths[:rank]) for rank in range(len(lengths))]
    shards = [made[begin : begin + count] for begin, count in zip(begins, lengths)]
    inputs = [
        (list(query) if rank == 0 else None, [row[:2] for row in shard], [row[2:] for row in shard], list(lengths))
        for rank, shard in enumerate(shards)
    ]
    return Case(label, tuple(inputs))


TRAVEL = Exercise(
    name="11.travel",
    function="travel",
    minutes=5,
    spec=travel_spec,
    names=("bytes",),
    cases=(
        Case("one token decodes", (1, 1000, 9, 3, 64)),
        Case("a prompt asks one block", (1000, 16, 9, 3, 64)),
        Case("as many queries as keys, 3 KV heads", (512, 512, 9, 3, 64)),
        Case("as many queries as keys, all heads alike", (512, 512, 8, 8, 64)),
        Case("one KV head", (40, 300, 32, 1, 128)),
        Case("a few tokens, a long document", (16, 4096, 9, 3, 64)),
        Case("nearly as many bytes", (640, 1930, 9, 3, 64)),
        Case("a few more keys", (640, 2300, 9, 3, 64)),
    ),
    starter='''\
def travel(queries, keys, heads, kv_heads, head_dim):
    """The fewest bytes of a layer, in float32, when queries and the keys they need are on two ranks.

    Either the queries go there, and o, m, l of every head come back; or K and V of every key come here.
    """
    asking = queries * heads * head_dim * 4  # MEND (about 2 lines): what comes back? What is moved?
    moving = keys * heads * head_dim * 4
    return min(asking, moving)
''',
    solution='''\
def travel(queries, keys, heads, kv_heads, head_dim):
    """A query: head_dim numbers out and head_dim + 2 back, for each head. A key: K and V, for each KV head."""
    asking = queries * heads * (head_dim + head_dim + 2) * 4
    moving = keys * kv_heads * 2 * head_dim * 4
    return min(asking, moving)
''',
    hints=(
        "An answer is o (head_dim numbers), m and l, for each of the query's heads.",
        "K and V have kv_heads heads, fewer than the query has: that is what makes keys cheap to move.",
    ),
)

MERGE = Exercise(
    name="11.merge",
    function="merge",
    minutes=10,
    spec=merge_spec,
    drive=drive_merge,
    names=("number 0", "number 1"),
    cases=(
        _parts("two ranks alike", [(0.0, [1.0, 0.0])], [(0.0, [0.0, 1.0])]),
        _parts("one has more keys", [(0.0, [1.0, 0.0]), (0.0, [1.0, 0.0]), (0.0, [1.0, 0.0])], [(0.0, [0.0, 1.0])]),
        _parts("one has the better key", [(3.0, [1.0, 0.0]), (0.0, [1.0, 2.0])], [(1.0, [0.0, 4.0])]),
        _parts("the second is empty", [(1.0, [1.0, 2.0])], [], [(2.0, [3.0, 4.0]), (0.5, [0.0, 1.0])]),
        _parts("the first is empty", [], [(-1.0, [5.0, 6.0])]),
        _parts("high scores", [(1000.0, [1.0, 0.0])], [(998.0, [0.0, 1.0])], []),
        _parts("low scores", [(-1000.0, [1.0, 0.0])], [(-1001.0, [0.0, 1.0])]),
    ),
    starter='''\
def merge(parts):
    """What attention to all keys gives, from what each rank said of its own.

    A part is (m, l, o): m the largest score there, l = sum of exp(s - m), o = [sum of exp(s - m) * v].
    A rank without keys says (-math.inf, 0.0, [0.0, 0.0]).
    """
    answers = [[number / l for number in o] for m, l, o in parts]  # MEND (about 5 lines)
    return [sum(answer[at] for answer in answers) / len(answers) for at in range(2)]
''',
    solution='''\
def merge(parts):
    """Every part is put on the scale of the largest m; then l and o are sums."""
    most = max(m for m, l, o in parts)
    weights = [math.exp(m - most) for m, l, o in parts]
    total = sum(weight * l for weight, (m, l, o) in zip(weights, parts))
    return [sum(weight * o[at] for weight, (m, l, o) in zip(weights, parts)) / total for at in range(2)]
''',
    hints=(
        "l and o of different ranks are on different scales: each took off its own m. Which scale do all fit on?",
        "Multiply each rank's l and o by exp(m − the largest m), add up, and divide once, at the end. exp(−inf) is 0.",
    ),
)

ASK = RanksExercise(
    name="11.ask",
    function="ask",
    minutes=25,
    spec=ask_spec,
    cases=(
        _document("2 ranks, 3 keys each", 3, 3),
        _document("3 ranks, 4, 1 and 2 keys", 4, 1, 2),
        _document("4 ranks, none on rank 2", 2, 3, 0, 4),
        _document("3 ranks, none on rank 0", 0, 2, 3),
        _document("2 ranks, scores of hundreds", 3, 4, query=(301.0, -98.0)),
    ),
    real=_document("4 ranks, none on rank 1", 5, 0, 3, 6, first=4),
    allowed=("send",),
    target=least_bytes,
    unit="bytes of messages",
    starter='''\
def ask(comm, given):
    """Rank 0's query attends to the keys of all ranks. It returns a tensor of 2 numbers, others None.

    given = q, keys, values, lengths: q is None but on rank 0; keys, values (rows of 2): this rank's;
    lengths[r] is how many rank r has. A score is q · k / √2. Target: the bytes of asking who has keys.
    """
    q, keys, values, lengths = given  # MEND (about 16 lines): all keys and values come to rank 0
    if comm.rank > 0:
        comm.send(torch.tensor(keys + values).view(-1, 2), to=0)
        return None
    rows = [torch.tensor(keys + values).view(-1, 2)]
    for other in range(1, comm.size):
        rows.append(comm.recv(torch.empty(2 * lengths[other], 2), source=other))
    k = torch.cat([each[: len(each) // 2] for each in rows])
    v = torch.cat([each[len(each) // 2 :] for each in rows])
    return torch.softmax(k @ torch.tensor(q) / 2**0.5, 0) @ v
''',
    solution='''\
def ask(comm, given):
    """The query goes out, o, m and l come back, and are merged on the scale of the largest m."""
    q, keys, values, lengths = given
    others = [rank for rank in range(1, comm.size) if lengths[rank]]

    def part(q):
        """o, m and l of this rank's keys, as one tensor of 4 numbers."""
        if not keys:
            return torch.tensor([0.0, 0.0, -math.inf, 0.0])
        scores = torch.tensor(keys) @ q / 2**0.5
        powers = torch.exp(scores - scores.max())
        return torch.cat((powers @ torch.tensor(values), torch.stack((scores.max(), powers.sum()))))

    if comm.rank > 0:
        if keys:
            comm.send(part(comm.recv(torch.empty(2), source=0)), to=0)
        return None
    q = torch.tensor(q)
    for other in others:
        comm.send(q, to=other)
    said = torch.stack([part(q), *[comm.recv(torch.empty(4), source=other) for other in others]])
    weights = torch.exp(said[:, 2] - said[:, 2].max())
    return (weights @ said[:, :2]) / (weights @ said[:, 3])
''',
    hints=(
        "Rank 0 sends q (2 numbers) to each rank with keys, and gets 4 numbers back: o, m and l.",
        "Let every rank make one tensor (o, m, l) of its own keys; rank 0 stacks them, weights them with exp(m − the largest m), and divides Σ o by Σ l.",
    ),
)

EXERCISES = (TRAVEL, MERGE, ASK)
