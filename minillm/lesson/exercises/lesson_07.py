"""Exercises of lesson 07: a sharded arg-max, two products cut so that one sum is enough, 3 KV heads on 2 ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from minillm.lesson.exercise import Case, Exercise, Outcome, RanksExercise, RuleError
from minillm.model.config import ModelConfig
from minillm.parallel.layout import Layout
from minillm.parallel.shards import Shard
from minillm.ranks.toy_world import ToyRun

WIDTH = 4  # of x in the MLP
WORDS = 5  # of each rank in the arg-max


class Stored:
    """A weight in a checkpoint, of which a rank reads parts, until its memory is full."""

    def __init__(self, name: str, weight: torch.Tensor, room: int) -> None:
        self.name, self.shape, self.room, self.held = name, tuple(weight.shape), room, 0
        self._weight = weight

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """[rows, stop - start]. Raises `MemoryError` for more than there is room for."""
        return self._read(self._weight[:, start:stop])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, columns]. Raises `MemoryError` for more than there is room for."""
        return self._read(self._weight[start:stop])

    def _read(self, part: torch.Tensor) -> torch.Tensor:
        self.held += part.numel()
        if self.held > self.room:
            raise MemoryError(f"{self.name}: {self.held} numbers read; this rank has room for {self.room}")
        return part.clone()


def given_away(toy: ToyRun) -> int:
    """The bytes that the rank which gives most puts into collectives, or sends. (Rank 0 of the toy carries the others'
    collectives, which is not counted.)
    """
    given = [0] * len(toy.results)
    for message in toy.messages:
        if message.source > 0 or message.operation == "send":
            given[message.source] += message.bytes
    return max(given)


def argmax_spec(case: Case) -> list[int]:
    """The likeliest of all words, on every rank."""
    whole = [value for row in case.inputs for value in row]
    return [whole.index(max(whole))] * len(case.inputs)


def mlp_spec(case: Case) -> list[torch.Tensor]:
    """relu(x up) down, on every rank."""
    x, up, down = case.inputs[0]
    return [torch.relu(x @ up._weight) @ down._weight] * len(case.inputs)


def shard_heads(query_heads: int, kv_heads: int, ranks: int) -> list[Shard]:
    """The engine's own shards of such a model."""
    config = ModelConfig("llama", 2, query_heads, 1, 1, query_heads, kv_heads, 1, 1)
    return [Shard(config, Layout(tp=ranks), rank) for rank in range(ranks)]


def heads_spec(case: Case) -> list[int]:
    """Every query head, once."""
    return list(range(case.inputs[0]))


def fewest_heads(case: Case) -> int:
    """The query heads of the busiest rank, at best."""
    return max(len(shard.heads) for shard in shard_heads(*case.inputs))


def drive_heads(function: Callable[..., Any], case: Case) -> Outcome:
    """The query heads that are computed; the work is the busiest rank's. Raises `RuleError` for what no rank could do."""
    query_heads, kv_heads, ranks = case.inputs
    parts = function(query_heads, kv_heads, ranks)
    if not isinstance(parts, (list, tuple)) or len(parts) != ranks or not all(_is_part(part) for part in parts):
        raise RuleError(f"return {ranks} pairs, one for each rank: ([its KV heads], [its query heads])")
    group = query_heads // kv_heads
    most = 1 if ranks > kv_heads else kv_heads
    cached: list[int] = []
    for rank, (keys, queries) in enumerate(parts):
        alone = [query for query in queries if query // group not in keys]
        if alone:
            raise RuleError(
                f"rank {rank} computes query head {alone[0]}, which needs KV head {alone[0] // group}; "
                f"it caches {list(keys)}"
            )
        if not queries:
            raise RuleError(f"rank {rank} computes no query head")
        if len(keys) > most:
            raise RuleError(f"rank {rank} caches {len(keys)} KV heads; with more ranks than KV heads, one each")
        cached += keys
    twice = sorted({head for head in cached if cached.count(head) > 1})
    if ranks <= kv_heads and twice:
        raise RuleError(f"KV head {twice[0]} is cached more than once, and {ranks} ranks can do without")
    computed = [query for _, queries in parts for query in queries]
    wrong = [(query, computed.count(query)) for query in range(query_heads) if computed.count(query) != 1]
    if wrong:
        raise RuleError(f"query head {wrong[0][0]} is computed {wrong[0][1]} times; once is right")
    return Outcome(sorted(computed), max(len(queries) for _, queries in parts))


def _is_part(part: object) -> bool:
    return isinstance(part, (list, tuple)) and len(part) == 2 and all(isinstance(each, (list, tuple)) for each in part)


def _logits(ranks: int, seed: int) -> Case:
    """Words whose logits all differ."""
    order = torch.randperm(WORDS * ranks, generator=torch.Generator().manual_seed(seed)) - 4
    return Case(f"{ranks} ranks with {WORDS} words each", tuple(row.float().tolist() for row in order.view(ranks, -1)))


def _layer(ranks: int, wide: int, seed: int) -> Case:
    """Small whole numbers, so that every order of adding gives the same."""
    generator = torch.Generator().manual_seed(seed)
    x, up, down = (
        torch.randint(-3, 4, shape, generator=generator).float()
        for shape in ((WIDTH,), (WIDTH, wide), (wide, WIDTH))
    )  # fmt: skip
    room = WIDTH * wide // ranks
    given = tuple((x, Stored("up", up, room), Stored("down", down, room)) for _ in range(ranks))
    return Case(f"{ranks} ranks, wide = {wide}", given)


def _heads(query_heads: int, kv_heads: int, ranks: int) -> Case:
    return Case(
        f"{query_heads} query and {kv_heads} KV heads on {ranks} rank{'s' * (ranks > 1)}",
        (query_heads, kv_heads, ranks),
    )


ARGMAX = RanksExercise(
    name="07.argmax",
    function="argmax",
    minutes=5,
    spec=argmax_spec,
    cases=(_logits(2, 1), _logits(3, 4), _logits(4, 7)),
    real=_logits(4, 11),
    allowed=("send", "all_gather"),
    measure=given_away,
    target=lambda case: 8,
    unit="bytes from each rank",
    starter='''\
def argmax(comm, logits):
    """The number of the likeliest of all words, on every rank.

    Rank r has the logits of words 5 r to 5 r + 4. comm.all_gather(tensor of [1, n]) returns
    [size, n]. Target: two numbers from each rank.
    """
    whole = comm.all_gather(torch.tensor([logits]))  # MEND (about 4 lines): nobody needs all of them
    return int(whole.argmax())
''',
    solution='''\
def argmax(comm, logits):
    """Each rank tells how good its best word is, and which it is."""
    mine = torch.tensor(logits)
    place = int(mine.argmax())
    best = comm.all_gather(torch.tensor([[mine[place], len(logits) * comm.rank + place]]))
    return int(best[best[:, 0].argmax(), 1])
''',
    hints=(
        "Only a rank's best word can be the best of all. What must the others know of it?",
        "Gather [[value, word]], where word counts from rank 0's first one; then take the word of the row with the largest value.",
    ),
)

MLP = RanksExercise(
    name="07.mlp",
    function="mlp",
    minutes=10,
    spec=mlp_spec,
    cases=(_layer(2, 4, 10), _layer(2, 8, 16), _layer(4, 8, 3)),
    real=_layer(4, 12, 7),
    allowed=("send", "all_reduce", "all_gather", "broadcast"),
    measure=given_away,
    target=lambda case: 4 * WIDTH,
    unit="bytes from each rank",
    starter='''\
def mlp(comm, given):
    """relu(x @ up) @ down, whole, on every rank. x [4], up [4, wide], down [wide, 4]; size divides wide.

    A rank has room for 1 / size of `up` and of `down`. `up.columns(0, 2)` reads columns 0 and 1,
    `up.rows(0, 2)` rows 0 and 1. Target: one all_reduce of 4 numbers.
    """
    x, up, down = given
    wide = up.shape[1]
    middle = torch.relu(x @ up.columns(0, wide))  # MEND (about 5 lines): all of it
    return middle @ down.rows(0, wide)
''',
    solution='''\
def mlp(comm, given):
    """Columns of the first: numbers that this rank has whole. Rows of the second: they need no others."""
    x, up, down = given
    each = up.shape[1] // comm.size
    start, stop = each * comm.rank, each * (comm.rank + 1)
    middle = torch.relu(x @ up.columns(start, stop))
    return comm.all_reduce(middle @ down.rows(start, stop))
''',
    hints=(
        "relu needs whole numbers, not summands. Which cut of `up` gives a rank some numbers of the middle whole?",
        "Rank r takes columns each · r to each · (r + 1) of up, and the same rows of down: a summand of every result. Then one all_reduce.",
    ),
)

HEADS = Exercise(
    name="07.heads",
    function="heads",
    minutes=25,
    spec=heads_spec,
    drive=drive_heads,
    cases=(
        _heads(4, 2, 1),
        _heads(4, 4, 2),
        _heads(9, 3, 2),
        _heads(16, 8, 3),
        _heads(8, 2, 4),
        _heads(9, 3, 4),
        _heads(9, 3, 6),
        _heads(14, 2, 5),
    ),
    target=fewest_heads,
    unit="query heads on the busiest rank",
    starter='''\
def heads(query_heads, kv_heads, ranks):
    """For each rank ([its KV heads], [its query heads]).

    Each KV head serves a group of neighbouring query heads. Every query head is computed once, on
    a rank that caches its KV head. No KV head is cached twice, unless there are more ranks than KV
    heads: then a rank caches one, and the ranks that cache the same one share its group.
    Target: the busiest rank has as few query heads as can be.
    """
    group = query_heads // kv_heads
    parts = [([], []) for _ in range(ranks)]
    for head in range(kv_heads):  # MEND (about 10 lines): the first rank takes everything
        parts[0][0].append(head)
        parts[0][1].extend(range(group * head, group * (head + 1)))
    return parts
''',
    solution='''\
def heads(query_heads, kv_heads, ranks):
    """Deal KV heads to ranks or, where there are more ranks, ranks to KV heads."""
    group = query_heads // kv_heads
    parts = [([], []) for _ in range(ranks)]
    if ranks <= kv_heads:
        for head in range(kv_heads):
            keys, queries = parts[head * ranks // kv_heads]
            keys.append(head)
            queries.extend(range(group * head, group * (head + 1)))
        return parts
    for head in range(kv_heads):
        sharing = [rank for rank in range(ranks) if rank % kv_heads == head]
        for rank in sharing:
            parts[rank][0].append(head)
        for place in range(group):
            parts[sharing[place % len(sharing)]][1].append(group * head + place)
    return parts
''',
    hints=(
        "Two cases: fewer ranks than KV heads (whole groups go to ranks), and more (a group is dealt to several ranks).",
        "More ranks than KV heads: rank r caches head r % kv_heads. List the ranks that share a head, and give its query heads to them in turn.",
    ),
)

EXERCISES = (ARGMAX, MLP, HEADS)
