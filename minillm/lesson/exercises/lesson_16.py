"""Exercises of lesson 16: the lower end of a predicted bucket, prompts sorted a window at a time, and reserve-dynamic."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from random import Random
from typing import Any

from minillm.lesson.exercise import Case, Exercise, Outcome, RuleError
from minillm.policy.admission import Predictor, Running, reserve_dynamic
from minillm.policy.queue import Windowed
from minillm.sim import tetri

SLACK = 1.02  # times the course's own mean
SEEDS = 3


def room_spec(case: Case) -> list[int]:
    """The likeliest bucket's lower end, the first of equals, and the prompt."""
    prompt, chances, width = case.inputs
    return [prompt + max(1, chances.index(max(chances)) * width)]


def order_spec(case: Case) -> list[int]:
    """By the engine's own queue."""
    prompts, size = case.inputs
    queue: Windowed[int] = Windowed(lambda number: prompts[number], size)
    for number in range(len(prompts)):
        queue.push(number)
    return [queue.pop() for _ in prompts]


def admit_spec(case: Case) -> list[Any]:
    """By the engine's own gate; of a simulation, that everybody is served."""
    if isinstance(case.inputs[0], str):
        return [128]
    tokens, to_come, free, running = case.inputs
    return [reserve_dynamic(tokens, to_come, free, [Running(*each) for each in running])]


def _simulated(case: Case, gate: Any) -> tuple[int, int]:
    """Requests served, and their mean completion time over some seeds, in ms."""
    (workload, first) = case.inputs
    costs, setup = tetri.v100_pair(), tetri.Setup(gate=gate, predictor=Predictor(1, 1.0, 10_000))
    served = [
        tetri.Tetri(setup, costs, seed).serve(tetri.workload(workload, seed)) for seed in range(first, first + SEEDS)
    ]
    counts = {sum(task.given == task.new for task in tasks) for tasks in served}
    if counts != {128}:
        raise RuleError(f"{min(counts)} of 128 requests got all their tokens: the others were never let in")
    return min(counts), round(1e3 * sum(tetri.means(tasks)[1] for tasks in served) / SEEDS)


@lru_cache(16)
def _reference(workload: str, first: int) -> int:
    return _simulated(Case("", (workload, first)), "reserve-dynamic")[1]


def _target(case: Case) -> int:
    return round(SLACK * _reference(*case.inputs)) if isinstance(case.inputs[0], str) else 0


def _drive_admit(function: Callable[..., Any], case: Case) -> Outcome:
    """One decision, or a simulation in which all are the learner's."""
    if isinstance(case.inputs[0], str):
        gate = lambda tokens, to_come, free, running: bool(  # noqa: E731
            function(tokens, to_come, free, [(each.tokens, each.to_come) for each in running])
        )
        return Outcome(*_listed(*_simulated(case, gate)))
    tokens, to_come, free, running = case.inputs
    said = function(tokens, to_come, free, list(running))
    if not isinstance(said, bool):
        raise RuleError(f"return True or False, not {said!r:.60}")
    return Outcome([said])


def _listed(count: int, work: int) -> tuple[list[int], int]:
    return [count], work


def _states(count: int = 60) -> tuple[Case, ...]:
    """Decisions in states that are drawn, all kinds of them about as often."""
    random = Random(3)
    cases: list[Case] = []
    while len(cases) < count:
        running = [(random.randint(5, 300), random.randint(1, 90)) for _ in range(random.choice([1, 2, 4, 50]))]
        free = random.randint(0, 300)
        case = Case(
            f"state {len(cases) + 1} that was drawn", (random.randint(1, 200), random.randint(1, 400), free, running)
        )
        sure = case.inputs[0] + case.inputs[1] + 400 < free
        if not sure and (admit_spec(case)[0] or random.random() < 0.3):
            cases.append(case)
    return tuple(cases)


RANDOM = _states()

ROOM = Exercise(
    name="16.room",
    function="room",
    minutes=5,
    spec=room_spec,
    names=("tokens",),
    cases=(
        Case("surely short", (100, [1.0, 0.0, 0.0], 200)),
        Case("the second bucket", (100, [0.2, 0.5, 0.3], 200)),
        Case("the last bucket", (50, [0.1, 0.1, 0.8], 100)),
        Case("as likely", (10, [0.4, 0.4, 0.2], 100)),
        Case("wide buckets", (512, [0.1, 0.9], 400)),
        Case("nearly as likely", (7, [0.30, 0.34, 0.36], 100)),
        Case("two that are likely", (7, [0.36, 0.64], 100)),
    ),
    starter='''\
def room(prompt, chances, width):
    """Tokens of KV cache to count on for a request whose length is predicted.

    chances[i]: how likely its answer has i·width to (i + 1)·width tokens. Take the likeliest bucket
    (the first of equals) and its lower end, but at least 1 token; the prompt needs room, too.
    """
    return prompt + width  # MEND (about 2 lines)
''',
    solution='''\
def room(prompt, chances, width):
    """The likeliest bucket's lower end."""
    return prompt + max(1, chances.index(max(chances)) * width)
''',
    hints=(
        "Which bucket is the likeliest? Its number times the width is its lower end.",
        "chances.index(max(chances)) is the first of the likeliest ones; bucket 0 would begin at 0 tokens: count 1.",
    ),
)

ORDER = Exercise(
    name="16.order",
    function="order",
    minutes=10,
    spec=order_spec,
    drive=lambda function, case: Outcome(list(function(*case.inputs))),
    names=tuple(f"place {n}" for n in range(20)),
    cases=(
        Case("one", ([300], 16)),
        Case("two, the short one came later", ([300, 100], 16)),
        Case("two windows", ([300, 100, 50, 20], 2)),
        Case("equals stay in order", ([100, 50, 100, 50], 4)),
        Case("a long one is not overtaken for ever", ([900, 10, 20, 30, 40, 50], 3)),
        Case("first come, first served", ([3, 2, 1], 1)),
        Case("a window that is not full", ([5, 4, 3, 2, 1], 3)),
        Case("nobody", ([], 4)),
    ),
    starter='''\
def order(prompts, size):
    """In which order the waiting prompts are read: their numbers, the shortest first, a window at a
    time.

    prompts: their tokens, in order of arrival. The first `size` are a window, then the next `size`
    …; within one the shortest goes first, of equals the one that came first. Nobody overtakes from
    a later window.
    """
    return sorted(range(len(prompts)), key=lambda number: prompts[number])  # MEND (about 4 lines)
''',
    solution='''\
def order(prompts, size):
    """Sort window by window."""
    numbers, result = list(range(len(prompts))), []
    for begin in range(0, len(numbers), size):
        result += sorted(numbers[begin : begin + size], key=lambda number: prompts[number])
    return result
''',
    hints=(
        "Sorting all of them would let short prompts overtake a long one for ever. Sort only `size` at a time.",
        "for begin in range(0, len(prompts), size): sort the numbers begin … begin + size by their tokens, and append them. sorted keeps equals in order.",
    ),
)

RESERVE = Exercise(
    name="16.reserve",
    function="admit",
    minutes=25,
    spec=admit_spec,
    drive=_drive_admit,
    target=_target,
    unit="ms to the last token, on average",
    plain=False,
    names=("the answer",),
    cases=(
        Case("nobody runs, and it fits: admit(30, 50, 40, [])", (30, 50, 40, [])),
        Case("nobody runs, and it does not fit: admit(40, 5, 40, [])", (40, 5, 40, [])),
        Case("it fits when the first has ended: admit(30, 50, 60, [(100, 5)])", (30, 50, 60, [(100, 5)])),
        Case("it has no room now: admit(60, 5, 60, [(100, 5)])", (60, 5, 60, [(100, 5)])),
        Case("the others grow until then: admit(30, 60, 60, [(40, 50), (100, 90), (100, 90)])", (30, 60, 60, [(40, 50), (100, 90), (100, 90)])),
        Case("who ends first is not who has most: admit(20, 90, 50, [(10, 2), (300, 50)])", (20, 90, 50, [(10, 2), (300, 50)])),
        Case("what ends gives back what it takes meanwhile: admit(30, 69, 60, [(40, 20)])", (30, 69, 60, [(40, 20)])),
        Case("just too much: admit(30, 71, 60, [(40, 20)])", (30, 71, 60, [(40, 20)])),
        Case("who ends first has most: admit(20, 90, 50, [(10, 50), (300, 2)])", (20, 90, 50, [(10, 50), (300, 2)])),
        Case("just enough: admit(30, 70, 60, [(40, 20)])", (30, 70, 60, [(40, 20)])),
        Case("the last of five ends first: admit(20, 60, 60, [(9, 40)] * 4 + [(30, 3)])", (20, 60, 60, [(9, 40)] * 4 + [(30, 3)])),
        Case("the last of five, too little: admit(20, 70, 60, [(9, 40)] * 4 + [(30, 3)])", (20, 70, 60, [(9, 40)] * 4 + [(30, 3)])),
        Case("two end at once, the first counts: admit(20, 60, 40, [(30, 4), (90, 4)])", (20, 60, 40, [(30, 4), (90, 4)])),
        *RANDOM,
        Case("simulated, heavy answers", ("LPHD", 100)),
        Case("simulated, mixed answers", ("Mixed", 200)),
    ),
    starter='''\
def admit(tokens, to_come, free, running):
    """Reserve-dynamic: whether a request is let in that has `tokens` in the cache and may give
    `to_come` more.

    free: tokens of cache that are free now; running: (tokens, to_come) of each that decodes. It
    needs room for tokens + 1 now. And all that it may become must fit what will be free when the
    first of those that run ends (of several at once, the first in the list): until then each takes a
    token a step, and then that one gives back all it has by then. If nobody runs, room for tokens
    + 1 is enough.
    """
    return tokens + 1 <= free  # greedy. MEND (about 6 lines)
''',
    solution='''\
def admit(tokens, to_come, free, running):
    """What will be free when the first ends: less what all take until then, more what it gives
    back.
    """
    if tokens + 1 > free or not running:
        return tokens + 1 <= free
    has, steps = min(running, key=lambda each: each[1])
    then = free - steps * len(running) + has + steps
    return tokens + to_come <= then
''',
    hints=(
        "Who of those that run ends first, and after how many steps? How many tokens do all of them take until then?",
        "then = free − steps · len(running) + (its tokens + steps). Let it in if it fits now (tokens + 1 ≤ free) and tokens + to_come ≤ then.",
    ),
)  # fmt: skip

EXERCISES = (ROOM, ORDER, RESERVE)
