"""Exercises of lesson 06: a broadcast tree, an all-to-all, and a ring all-reduce that sends no byte too much."""

from __future__ import annotations

from typing import Any

import torch

from minillm.lesson.exercise import Case, RanksExercise
from minillm.ranks.toy_world import ToyRun


def rounds(toy: ToyRun) -> int:
    """How many rounds the messages take, if a rank is in one message at a time and each takes one round."""
    ends: dict[int, int] = {}
    for message in toy.messages:
        end = max(ends.get(message.source, 0), ends.get(message.target, 0)) + 1
        ends[message.source] = ends[message.target] = end
    return max(ends.values(), default=0)


def busiest(toy: ToyRun) -> int:
    """The bytes that the rank which sends most has sent."""
    sent = [0] * len(toy.results)
    for message in toy.messages:
        sent[message.source] += message.bytes
    return max(sent)


def _numbers(*numbers: float) -> Case:
    return Case(f"{len(numbers)} ranks with {', '.join(f'{number:g}' for number in numbers)}", numbers)


def _rows(ranks: int, first: int = 0) -> Case:
    rows = tuple([float(first + 10 * rank + to) for to in range(ranks)] for rank in range(ranks))
    return Case(f"{ranks} ranks", rows)


def _vectors(ranks: int, each: int, first: int = 1) -> Case:
    rows = tuple([float(first + rank * (number + 1)) for number in range(each * ranks)] for rank in range(ranks))
    return Case(f"{ranks} ranks with {each * ranks} numbers each", rows)


def tree_spec(case: Case) -> list[Any]:
    """Every rank returns rank 0's number."""
    return [case.inputs[0]] * len(case.inputs)


def exchange_spec(case: Case) -> list[Any]:
    """Rank r returns what every rank has for it, in rank order."""
    return list(torch.tensor(case.inputs).T)


def ring_spec(case: Case) -> list[Any]:
    """Every rank returns the sum."""
    return [torch.tensor(case.inputs).sum(0)] * len(case.inputs)


TREE = RanksExercise(
    name="06.tree",
    function="tree",
    minutes=5,
    spec=tree_spec,
    cases=(_numbers(10, 20), _numbers(7, 1, 30), _numbers(4, 50, 9, 12), _numbers(6, 5, 4, 3, 2, 1, 0, 9)),
    real=_numbers(23, 6, 17, 5),
    measure=rounds,
    target=lambda case: (len(case.inputs) - 1).bit_length(),
    unit="rounds",
    starter='''\
def tree(comm, number):
    """Rank 0's number for everybody. In a round every rank sends or receives one message at most."""
    held = torch.tensor([number])
    if comm.rank > 0:  # MEND (about 5 lines): down the line it takes size - 1 rounds
        comm.recv(held, source=comm.rank - 1)
    if comm.rank < comm.size - 1:
        comm.send(held, to=comm.rank + 1)
    return held.item()
''',
    solution='''\
def tree(comm, number):
    """In every round all who know it tell one more: 1, 2, 4, 8 …"""
    held, know = torch.tensor([number]), 1
    while know < comm.size:
        if comm.rank < know and comm.rank + know < comm.size:
            comm.send(held, to=comm.rank + know)
        elif know <= comm.rank < 2 * know:
            comm.recv(held, source=comm.rank - know)
        know *= 2
    return held.item()
''',
    hints=(
        "After the first round two ranks know the number. How many can know it after the second?",
        "When the first `know` ranks know it, rank r of them tells rank r + know. Then twice as many know it.",
    ),
)

EXCHANGE = RanksExercise(
    name="06.exchange",
    function="exchange",
    minutes=10,
    spec=exchange_spec,
    cases=(_rows(2), _rows(3), _rows(4)),
    real=_rows(4, first=3),
    target=lambda case: 4 * len(case.inputs) * (len(case.inputs) - 1),
    unit="bytes of messages",
    starter='''\
def exchange(comm, row):
    """An all-to-all: row[r] is for rank r. Returns what all ranks have for this one, in rank order."""
    row, result = torch.tensor(row), torch.empty(comm.size)
    result[comm.rank] = row[comm.rank]
    for other in range(comm.size):
        if other != comm.rank:
            whole = torch.empty(comm.size)
            if comm.rank < other:
                comm.send(row, to=other)  # MEND: not the whole row
                comm.recv(whole, source=other)
            else:
                comm.recv(whole, source=other)
                comm.send(row, to=other)
            result[other] = whole[comm.rank]
    return result
''',
    solution='''\
def exchange(comm, row):
    """To each other rank its number alone; of two ranks the lower one sends first."""
    row, result = torch.tensor(row), torch.empty(comm.size)
    result[comm.rank] = row[comm.rank]
    for other in range(comm.size):
        if other == comm.rank:
            continue
        if comm.rank < other:
            comm.send(row[other : other + 1], to=other)
            comm.recv(result[other : other + 1], source=other)
        else:
            comm.recv(result[other : other + 1], source=other)
            comm.send(row[other : other + 1], to=other)
    return result
''',
    hints=(
        "How many of the numbers that you send to a rank does it keep?",
        "row[other : other + 1] is a tensor of one number; result[other : other + 1] is the place for one.",
    ),
)

RING = RanksExercise(
    name="06.ring",
    function="ring",
    minutes=25,
    spec=ring_spec,
    cases=(_vectors(2, 1), _vectors(3, 1), _vectors(4, 2)),
    real=_vectors(4, 3, first=2),
    measure=busiest,
    target=lambda case: 4 * 2 * (len(case.inputs) - 1) * len(case.inputs[0]) // len(case.inputs),
    unit="bytes from the busiest rank",
    starter='''\
def ring(comm, numbers):
    """The sum of all ranks' numbers, on every rank. The length of `numbers` is a multiple of the size.

    Target: no rank sends more than 2 (n - 1) / n times its numbers.
    """
    total = torch.tensor(numbers)
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size

    def shift(tensor):
        """Give a tensor to the right; returns what comes from the left."""
        received = torch.empty_like(tensor)
        if comm.rank == 0:
            comm.recv(received, source=left)
            comm.send(tensor, to=right)
        else:
            comm.send(tensor, to=right)
            comm.recv(received, source=left)
        return received

    passing = total.clone()
    for step in range(comm.size - 1):  # MEND (about 8 lines): all numbers go all the way round
        passing = shift(passing)
        total += passing
    return total
''',
    solution='''\
def ring(comm, numbers):
    """First add up, a chunk a step; then hand the sums round."""
    chunks = list(torch.tensor(numbers).chunk(comm.size))
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size

    def shift(tensor):
        """Give a tensor to the right; returns what comes from the left."""
        received = torch.empty_like(tensor)
        if comm.rank == 0:
            comm.recv(received, source=left)
            comm.send(tensor, to=right)
        else:
            comm.send(tensor, to=right)
            comm.recv(received, source=left)
        return received

    for step in range(comm.size - 1):
        coming = (comm.rank - step - 1) % comm.size
        chunks[coming] = chunks[coming] + shift(chunks[(comm.rank - step) % comm.size])
    for step in range(comm.size - 1):
        coming = (comm.rank - step) % comm.size
        chunks[coming] = shift(chunks[(comm.rank - step + 1) % comm.size])
    return torch.cat(chunks)
''',
    hints=(
        "Cut the numbers into as many chunks as there are ranks, as on the ring board, and send one chunk a step.",
        "Step s of the first half: send chunk (rank - s), and add what comes to chunk (rank - s - 1). Second half: send chunk (rank - s + 1), and what comes is chunk (rank - s), whole. All modulo the size.",
    ),
)

EXERCISES = (TREE, EXCHANGE, RING)
