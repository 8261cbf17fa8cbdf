"""Exercises of lesson 05: the forward schedule, cuts that make the slowest stage fast, and groups that keep stages busy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minillm.lesson.exercise import Case, Exercise, Outcome, RuleError
from minillm.parallel.balance import balance
from minillm.parallel.data import split_evenly
from minillm.trace.programs import pipeline_program
from minillm.trace.replay import replay
from minillm.trace.trace import Kind

ROUNDS = 8


def ends_spec(case: Case) -> list[float]:
    """By the replay clock: when each stage ends its last micro-batch."""
    (times,) = case.inputs
    run = replay(pipeline_program([[float(time) for time in row] for row in times]))
    return [max(span.end_s for span in run.spans if span.rank == stage) for stage in range(len(times))]


def drive_ends(function: Callable[..., Any], case: Case) -> Outcome:
    """One number for each stage. Raises `RuleError` for another length."""
    ends = function([list(row) for row in case.inputs[0]])
    if not isinstance(ends, (list, tuple)) or len(ends) != len(case.inputs[0]):
        raise RuleError(f"return a list with one number for each stage, here {len(case.inputs[0])}")
    return Outcome([float(end) for end in ends])


def slowest(sizes: Sequence[int], layer: int, head: int) -> int:
    """What the slowest stage takes."""
    return max([size * layer for size in sizes[:-1]] + [sizes[-1] * layer + head])


def drive_sizes(function: Callable[..., Any], case: Case) -> Outcome:
    """What the slowest stage of the learner's sizes takes. Raises `RuleError` for what is no cut."""
    layers, stages, layer, head = case.inputs
    sizes = function(layers, stages, layer, head)
    if not isinstance(sizes, (list, tuple)) or len(sizes) != stages or not all(type(size) is int for size in sizes):
        raise RuleError(f"return a list of {stages} whole numbers: how many layers each stage takes")
    if min(sizes) < 1 or sum(sizes) != layers:
        raise RuleError(f"{list(sizes)}: every stage takes a layer at least, and all together {layers}")
    return Outcome([slowest(sizes, layer, head)])


def sizes_spec(case: Case) -> list[int]:
    """What the slowest stage takes at best."""
    layers, stages, layer, head = case.inputs
    return [slowest(balance([layer] * layers, stages, 0, head), layer, head)]


def round_time(groups: Sequence[Sequence[int]], stages: int) -> int:
    """Microseconds that some rounds of decoding take: a group's step costs each stage 20, and 1 per 100 cached tokens."""
    times = [20.0 + sum(group) / 100 for group in groups] * ROUNDS
    run = replay(pipeline_program([times] * stages, depth=stages, kind=Kind.DECODE))
    return round(run.end_s)


def drive_groups(function: Callable[..., Any], case: Case) -> Outcome:
    """Nothing to compare but the requests; the work is the time. Raises `RuleError` for requests lost or served twice."""
    contexts, stages = case.inputs
    groups = function(list(contexts), stages)
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, (list, tuple)) for group in groups):
        raise RuleError("return a list of groups, each a list of context lengths")
    if len(groups) != stages:
        raise RuleError(f"{stages} groups are in flight, but there are {len(groups)}")
    if sorted(each for group in groups for each in group) != sorted(contexts):
        raise RuleError(
            f"the groups hold {sum(map(len, groups))} requests that are not the {len(contexts)} given, each once"
        )
    return Outcome([len(contexts)], round_time(groups, stages))


def groups_target(case: Case) -> int:
    """What a round takes when groups are as even as the engine deals requests to replicas."""
    contexts, stages = case.inputs
    shares = split_evenly(contexts, stages)
    return round_time([[contexts[number] for number in share] for share in shares], stages)


ENDS = Exercise(
    name="05.ends",
    function="ends",
    minutes=5,
    spec=ends_spec,
    drive=drive_ends,
    names=tuple(f"stage {number}" for number in range(9)),
    cases=(
        Case("1 stage, 3 micro-batches of 2", ([[2, 2, 2]],)),
        Case("2 stages, 1 micro-batch", ([[2], [3]],)),
        Case("2 equal stages, 3 micro-batches", ([[2, 2, 2], [2, 2, 2]],)),
        Case("a slow stage in the middle", ([[1, 1, 1], [4, 4, 4], [1, 1, 1]],)),
        Case("unequal micro-batches", ([[5, 1, 1, 2], [5, 1, 1, 2], [5, 1, 1, 2]],)),
    ),
    starter='''\
def ends(times):
    """When each stage has ended its last micro-batch: one number for each stage.

    times[stage][batch] is what a stage computes for a micro-batch. All are there at time 0; a stage
    takes them in order, each once the stage before has ended it.
    """
    return [sum(row) for row in times]  # MEND (about 6 lines)
''',
    solution='''\
def ends(times):
    """A micro-batch begins when the stage before has ended it, and this stage the one before."""
    arrived, result = [0] * len(times[0]), []
    for row in times:
        now = 0
        for batch, time in enumerate(row):
            now = max(now, arrived[batch]) + time
            arrived[batch] = now
        result.append(now)
    return result
''',
    hints=(
        "What must have happened before stage 1 begins micro-batch 2? Two things.",
        "Keep when each micro-batch left the stage before. now = max(now, that) + time, batch after batch, stage after stage.",
    ),
)

SIZES = Exercise(
    name="05.sizes",
    function="sizes",
    minutes=10,
    spec=sizes_spec,
    drive=drive_sizes,
    names=("the slowest stage takes",),
    cases=(
        Case("6 layers of 10, 2 stages, no head", (6, 2, 10, 0)),
        Case("6 layers of 10, 2 stages, a head of 20", (6, 2, 10, 20)),
        Case("30 layers of 3, 4 stages, a head of 24", (30, 4, 3, 24)),
        Case("30 layers of 12, 4 stages, a head of 13", (30, 4, 12, 13)),
        Case("5 layers of 1, 3 stages, a head of 50", (5, 3, 1, 50)),
    ),
    starter='''\
def sizes(layers, stages, layer, head):
    """How many layers each stage takes, so that the slowest stage is as fast as can be.

    Every layer takes the time `layer`; the last stage takes `head` more, for the LM head.
    """
    base, rest = divmod(layers, stages)
    return [base + (stage < rest) for stage in range(stages)]  # MEND (about 6 lines)
''',
    solution='''\
def sizes(layers, stages, layer, head):
    """Try every number of layers for the last stage; the others share the rest."""
    if stages == 1:
        return [layers]
    best = None
    for last in range(1, layers - stages + 2):
        base, rest = divmod(layers - last, stages - 1)
        cut = [base + (stage < rest) for stage in range(stages - 1)] + [last]
        time = max(cut[0] * layer, last * layer + head)
        if best is None or time < best[0]:
            best = time, cut
    return best[1]
''',
    hints=(
        "The last stage has the head on top. How many layers should it give away?",
        "Try each number of layers for the last stage, spread the rest evenly over the others, and keep the cut whose slowest stage is fastest.",
    ),
)

GROUPS = Exercise(
    name="05.groups",
    function="groups",
    minutes=25,
    spec=lambda case: [len(case.inputs[0])],
    drive=drive_groups,
    target=groups_target,
    unit="µs",
    names=("requests",),
    cases=(
        Case("4 requests with 100 tokens each, 2 stages", ([100] * 4, 2)),
        Case("1,000, 900, 100 and 100 cached tokens, 2 stages", ([1000, 900, 100, 100], 2)),
        Case("eight unequal prompts, 4 stages", ([300, 4000, 700, 1200, 100, 3000, 900, 2500], 4)),
        Case("one very long prompt among eleven, 4 stages", ([500] * 6 + [1000] * 5 + [8000], 4)),
    ),
    starter='''\
def groups(contexts, stages):
    """Divide requests into `stages` groups, which decode in turns: a list of lists of context lengths.

    A group's step takes each stage 20 µs for the weights, and 1 µs for every 100 tokens that its
    requests have in the cache. While one group is in a stage, the next waits before it.
    """
    size = -(-len(contexts) // stages)
    return [contexts[n * size : (n + 1) * size] for n in range(stages)]  # MEND (about 5 lines)
''',
    solution='''\
def groups(contexts, stages):
    """The longest first, each to the group that has least to read so far."""
    result = [[] for _ in range(stages)]
    for context in sorted(contexts, reverse=True):
        min(result, key=sum).append(context)
    return result
''',
    hints=(
        "Equal numbers of requests are not equal work. Which group holds everybody up?",
        "Go through the requests from the longest to the shortest, and put each into the group whose contexts add up to least.",
    ),
)

EXERCISES = (ENDS, SIZES, GROUPS)
