"""Exercises of lesson 02: steps of static batches, seats that a load takes, and `schedule()`, run by the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minillm.lesson.exercise import Case, Exercise, Outcome, RuleError
from minillm.policy.batch import Batch, Chunk
from minillm.policy.blocks import BlockPool, BlockTable
from minillm.policy.options import EngineOptions
from minillm.policy.request import ScheduledRequest, Status
from minillm.policy.scheduler import Scheduler

MOST_STEPS = 400


def static_steps_spec(case: Case) -> list[int]:
    """Played out, step by step: the next ones sit down when the last of a batch has left."""
    answers, seats = case.inputs
    waiting, steps = list(answers), 0
    sitting: list[int] = []
    while waiting or sitting:
        if not sitting:
            sitting, waiting = waiting[:seats], waiting[seats:]
        steps += 1
        sitting = [left - 1 for left in sitting if left > 1]
    return [steps]


def seats_taken_spec(case: Case) -> list[float]:
    """By repetition: with so many seats taken a step lasts so long, and then so many seats are taken."""
    requests_per_s, answer_tokens, read_s, row_s = case.inputs
    seats = 0.0
    for _ in range(100_000):
        seats = requests_per_s * answer_tokens * (read_s + seats * row_s)
        if seats > 1e6:
            return [-1]
    return [seats]


@dataclass(eq=False)
class Asking:
    """A request as a plan sees it: its number, and how many of its tokens are not in the cache yet."""

    request: ScheduledRequest

    @property
    def number(self) -> int:
        """Which request it is."""
        return self.request.request_id

    @property
    def left(self) -> int:
        """Tokens to compute before it gets its next one: 1 when it decodes, the rest of its prompt before."""
        return self.request.remaining

    def __repr__(self) -> str:
        return f"request {self.number} ({self.left} left)"


Plan = Callable[[list[Asking], list[Asking], int, int], Any]


class HandScheduler(Scheduler):
    """The engine's scheduler with `plan(running, waiting, budget, seats)` in the place of its own choice.

    The plan is a list of (request, tokens). Raises `RuleError` for one that breaks a rule, `OutOfBlocks` when it starts
    more than the cache holds.
    """

    def __init__(self, pool: BlockPool, options: EngineOptions, plan: Plan) -> None:
        super().__init__(pool, options)
        self.plan = plan

    def schedule(self, now_s: float) -> Batch:
        """The plan, as a batch."""
        running, waiting = ([Asking(request) for request in queue] for queue in (self.running, self.waiting))
        plan = self.plan(list(running), list(waiting), self.options.max_step_tokens, self.options.max_running)
        plan = self._checked(plan, running + waiting)
        copies, chunks = [], []
        for asking, tokens in plan:
            request = asking.request
            if request.status is Status.WAITING:
                request.table, request.status = BlockTable(self.pool), Status.RUNNING
                self.waiting.remove(request)
                self.running.append(request)
            assert request.table is not None
            start, end = request.computed, request.computed + tokens
            copies += request.table.write(start, end)
            table, ids = tuple(request.table.blocks), tuple(request.tokens[start:end])
            chunks.append(Chunk(request.request_id, start, ids, table, samples=end == len(request.tokens)))
            request.in_flight += tokens
        return Batch(tuple(chunks), tuple(copies))

    def _checked(self, plan: Any, known: list[Asking]) -> list[tuple[Asking, int]]:
        """The rules of a step."""
        if not isinstance(plan, (list, tuple)) or not all(_is_pair(pair) for pair in plan):
            raise RuleError("a plan is a list of pairs (request, tokens)")
        pairs: list[tuple[Asking, int]] = list(plan)
        for asking, tokens in pairs:
            if asking not in known:
                raise RuleError(f"{asking} is not among the requests given")
            if not 1 <= tokens <= asking.left:
                raise RuleError(f"{tokens} tokens for {asking}: give it 1 … {asking.left}")
        numbers = [asking.number for asking, _ in pairs]
        twice = next((number for number in numbers if numbers.count(number) > 1), None)
        if twice is not None:
            raise RuleError(f"request {twice} stands in the plan twice")
        total, most = sum(tokens for _, tokens in pairs), self.options.max_step_tokens
        if total > most:
            raise RuleError(f"the plan has {total} tokens, but the budget of a step is {most}")
        seated = len(self.running) + sum(asking.request.status is Status.WAITING for asking, _ in pairs)
        if seated > self.options.max_running:
            raise RuleError(f"the plan would seat {seated} requests, but there are {self.options.max_running} seats")
        if not pairs:
            raise RuleError("the plan is empty, though requests wait or run")
        return pairs


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Asking) and type(pair[1]) is int


def _play(scheduler: Scheduler, case: Case) -> list[list[int]]:
    """Serve the case's requests with a model that says 0; returns the steps in which each got its tokens."""
    work = case.inputs[2]
    for number, (prompt, answer) in enumerate(work):
        scheduler.add(ScheduledRequest(number, [0] * prompt, prompt + answer))
    came: list[list[int]] = [[] for _ in work]
    step = 0
    while scheduler.has_work:
        step += 1
        if step > MOST_STEPS:
            raise RuleError(f"after {MOST_STEPS} steps not all requests have ended")
        batch = scheduler.schedule(0.0)
        scheduler.postprocess(batch, [0 if chunk.samples else None for chunk in batch.chunks])
        for chunk in batch.chunks:
            if chunk.samples:
                came[chunk.request_id].append(step)
                if len(came[chunk.request_id]) == work[chunk.request_id][1]:
                    scheduler.remove(chunk.request_id)
    return came


def _limits(case: Case) -> EngineOptions:
    budget, seats, _ = case.inputs
    return EngineOptions(max_step_tokens=budget, max_running=seats)


def _drive_schedule(function: Plan, case: Case) -> Outcome:
    """The engine's scheduler under the learner's plan: the longest wait of each request, and the steps of all."""
    came = _play(HandScheduler(BlockPool(1000), _limits(case), function), case)
    waits = [max((b - a for a, b in zip(each, each[1:])), default=1) for each in came]
    return Outcome(waits, max(map(max, came)))


def _schedule_steps(case: Case) -> int:
    """What decodes first, then prompts begun, then new ones take: the engine's own scheduler."""
    return max(map(max, _play(Scheduler(BlockPool(1000), _limits(case)), case)))


STATIC_STEPS = Exercise(
    name="02.static_steps",
    function="static_steps",
    minutes=5,
    spec=static_steps_spec,
    cases=(
        Case("answers of 3 and 5 tokens, 2 seats", ([3, 5], 2)),
        Case("answers of 2, 5, 1 and 4 tokens, 2 seats", ([2, 5, 1, 4], 2)),
        Case("seven answers, 3 seats", ([4, 4, 9, 1, 1, 1, 6], 3)),
    ),
    starter='''\
def static_steps(answers, seats):
    """Steps until all answers are there, when batches of `seats` run one after the other."""
    return sum(answers)  # FILL IN (one line)
''',
    solution='''\
def static_steps(answers, seats):
    """Each batch lasts as long as its longest answer."""
    return sum(max(answers[i:i + seats]) for i in range(0, len(answers), seats))
''',
    hints=(
        "A batch gives every seat one token a step. When may the next batch begin?",
        "The first batch is answers[0:seats]; it takes max(…) steps. Then comes answers[seats:2 * seats].",
    ),
)

SEATS_TAKEN = Exercise(
    name="02.seats_taken",
    function="seats_taken",
    minutes=10,
    spec=seats_taken_spec,
    cases=(
        Case("1 request/s of 10 tokens, steps of 50 ms whatever the batch", (1.0, 10, 0.05, 0.0)),
        Case("2 requests/s of 50 tokens, 45 ms and 4 ms a row", (2.0, 50, 0.045, 0.004)),
        Case("8 requests/s of 200 tokens, 10 ms and 0.1 ms a row", (8.0, 200, 0.010, 0.0001)),
        Case("10 requests/s of 100 tokens, 45 ms and 4 ms a row", (10.0, 100, 0.045, 0.004)),
    ),
    starter='''\
def seats_taken(requests_per_s, answer_tokens, read_s, row_s):
    """How many requests run at a time, on average; -1 when they become more and more.

    Little's law: requests under way = requests per second × seconds that each takes. A request takes
    answer_tokens steps, and a step takes read_s + seats · row_s.
    """
    return requests_per_s * answer_tokens * read_s  # FILL IN (about 3 lines)
''',
    solution='''\
def seats_taken(requests_per_s, answer_tokens, read_s, row_s):
    """seats = rate · tokens · (read_s + seats · row_s), solved for seats."""
    grows = requests_per_s * answer_tokens * row_s  # seats that one more seat brings along
    if grows >= 1:
        return -1
    return requests_per_s * answer_tokens * read_s / (1 - grows)
''',
    hints=(
        "Write the sentence of Little's law as an equation; the seats stand on both sides of it.",
        "seats · (1 - requests_per_s · answer_tokens · row_s) = requests_per_s · answer_tokens · read_s. Which rate has no answer?",
    ),
)

SCHEDULE = Exercise(
    name="02.schedule",
    function="schedule",
    minutes=25,
    spec=lambda case: [1] * len(case.inputs[2]),
    cases=(
        Case("two requests, two seats", (16, 2, ((4, 3), (4, 2)))),
        Case("a short and a long answer, then a third request, two seats", (16, 2, ((4, 2), (4, 9), (4, 4)))),
        Case("a prompt above the budget beside a running answer", (8, 3, ((3, 6), (30, 2), (2, 3)))),
        Case(
            "nine requests of all sizes, four seats",
            (12, 4, ((5, 9), (40, 3), (2, 2), (7, 12), (3, 1), (20, 8), (1, 5), (9, 9), (4, 2))),
        ),
    ),
    drive=_drive_schedule,
    plain=False,
    target=_schedule_steps,
    unit="steps",
    names=tuple(f"request {number}: longest wait for a token, in steps" for number in range(20)),
    starter='''\
def schedule(running, waiting, budget, seats):
    """The next step: a list of (request, tokens).

    Every request has `.left`: tokens to compute before its next one comes; 1 when it decodes. All of a
    step together get at most `budget` tokens, and at most `seats` requests run. Those of `waiting`
    that you name sit down. Requests leave by themselves.
    """
    plan = []
    for request in running or waiting[:seats]:  # static: a batch ends before the next one begins
        tokens = min(request.left, budget - sum(tokens for _, tokens in plan))
        if tokens > 0:
            plan.append((request, tokens))
    return plan
''',
    solution='''\
def schedule(running, waiting, budget, seats):
    """Decodes first, then prompts begun, then new ones, as long as budget and seats last."""
    plan = []
    for request in sorted(running, key=lambda each: each.left > 1) + waiting[:seats - len(running)]:
        tokens = min(request.left, budget)
        if tokens > 0:
            plan.append((request, tokens))
            budget -= tokens
    return plan
''',
    hints=(
        "Who may be named while others still run? There are seats - len(running) free seats.",
        "In this order: running ones with left == 1, running ones with left > 1, then waiting[:seats - len(running)]; each takes min(left, what the budget still has).",
    ),
)

EXERCISES = (STATIC_STEPS, SEATS_TAKEN, SCHEDULE)
