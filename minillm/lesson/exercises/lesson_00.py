"""Exercises of lesson 00: messages between ranks, in an order in which nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minillm.lesson.exercise import Case, RanksExercise

NUMBER_BYTES = 4  # one float32


def _case(*numbers: float) -> Case:
    return Case(f"{len(numbers)} ranks with {', '.join(f'{number:g}' for number in numbers)}", numbers)


CASES = (_case(10.0, 20.0), _case(7.0, 1.0, 30.0), _case(4.0, 50.0, 9.0, 12.0))
REAL = _case(23.0, 6.0, 17.0, 5.0)


def shift_spec(case: Case) -> list[float]:
    """Every rank returns its left neighbour's number; rank 0's left neighbour is the last rank."""
    numbers = case.inputs
    return [numbers[rank - 1] for rank in range(len(numbers))]


def tell_spec(case: Case) -> list[float]:
    """Every rank returns rank 0's number."""
    return [case.inputs[0]] * len(case.inputs)


def total_spec(case: Case) -> list[float]:
    """Every rank returns the sum of all numbers."""
    return [sum(case.inputs)] * len(case.inputs)


def _exercise(messages: Callable[[int], int], **fields: Any) -> RanksExercise:
    """An exercise on the cases of this lesson; `messages` of one number each are enough for so many ranks."""
    return RanksExercise(
        cases=CASES,
        real=REAL,
        target=lambda case: NUMBER_BYTES * messages(len(case.inputs)),
        unit="bytes of messages",
        **fields,
    )


SHIFT = _exercise(
    name="00.shift",
    function="shift",
    minutes=5,
    spec=shift_spec,
    messages=lambda ranks: ranks,
    starter='''\
def shift(comm, number):
    """Give your number to the right neighbour; return the left neighbour's."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    received = torch.zeros(1)
    comm.send(torch.tensor([number]), to=right)
    comm.recv(received, source=left)
    return received.item()
''',
    solution='''\
def shift(comm, number):
    """Rank 0 receives first, so the last rank can send, and everybody after it."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    received = torch.zeros(1)
    if comm.rank == 0:
        comm.recv(received, source=left)
    comm.send(torch.tensor([number]), to=right)
    if comm.rank != 0:
        comm.recv(received, source=left)
    return received.item()
''',
    hints=(
        "A send returns only when the other side receives. If all ranks send first, who receives?",
        "Let one rank do it the other way round: rank 0 receives first and sends afterwards.",
    ),
)

TELL = _exercise(
    name="00.tell",
    function="tell",
    minutes=10,
    spec=tell_spec,
    messages=lambda ranks: ranks - 1,
    starter='''\
def tell(comm, number):
    """Rank 0's number, on every rank, with send and recv alone: a broadcast."""
    held = torch.tensor([number])
    # FILL IN (about 5 lines)
    return held.item()
''',
    solution='''\
def tell(comm, number):
    """Down the line: receive from the left, pass on to the right."""
    held = torch.tensor([number])
    if comm.rank > 0:
        comm.recv(held, source=comm.rank - 1)
    if comm.rank < comm.size - 1:
        comm.send(held, to=comm.rank + 1)
    return held.item()
''',
    hints=(
        "Rank 0 need not speak to everybody: who has heard the number can pass it on.",
        "Receive from rank - 1 unless you are rank 0; then send to rank + 1 unless you are the last.",
    ),
)

TOTAL = _exercise(
    name="00.total",
    function="total",
    minutes=25,
    spec=total_spec,
    messages=lambda ranks: 2 * (ranks - 1),
    starter='''\
def total(comm, number):
    """The sum of all ranks' numbers, on every rank, with send and recv alone."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    held = torch.zeros(1)
    comm.recv(held, source=left)
    held += number
    comm.send(held, to=right)
    return held.item()
''',
    solution='''\
def total(comm, number):
    """First round: add, from rank 0 to the last. Second round: the last tells the sum."""
    right, left, last = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size, comm.size - 1
    held = torch.zeros(1)
    if comm.rank > 0:
        comm.recv(held, source=left)
    held += number
    if comm.rank < last:
        comm.send(held, to=right)
        comm.recv(held, source=left)
    if comm.rank != last - 1:
        comm.send(held, to=right)
    return held.item()
''',
    hints=(
        "One rank must begin: rank 0 sends before it receives. After n - 1 messages the last rank knows the sum.",
        "Now the last rank sends the sum to rank 0, which passes it on; the rank before the last need not send it.",
    ),
)

EXERCISES = (SHIFT, TELL, TOTAL)
