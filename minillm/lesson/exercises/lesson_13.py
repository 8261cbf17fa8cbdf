"""Exercises of lesson 13: how many instances should read prompts, which caches decode may pull, and a transfer plan between layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minillm.lesson.exercise import Case, Exercise, Outcome, RuleError

Part = tuple[int, int]  # from … to, the end not included
Holding = tuple[Part, Part]  # layers and heads that a rank holds


def share_spec(case: Case) -> list[int]:
    """What the slower kind lets through is most; of equals the fewest that read."""
    instances, prefill_rate, decode_rate = case.inputs
    return [max(range(1, instances), key=lambda n: min(n * prefill_rate, (instances - n) * decode_rate))]


def pull_spec(case: Case) -> list[int]:
    """In order, while their blocks are free, and one for each running request whose last block is full."""
    waiting, free, running = case.inputs
    room, count = free - sum(tokens % 16 == 0 for tokens in running), 0
    for tokens in waiting:
        blocks = tokens // 16 + 1
        if blocks > room:
            break
        room, count = room - blocks, count + 1
    return [count]


def _common(one: Part, other: Part) -> Part:
    return max(one[0], other[0]), min(one[1], other[1])


def plan_sends(sources: list[Holding], targets: list[Holding]) -> list[tuple[int, int, Part, Part]]:
    """What two ranks have in common goes from the one to the other; of sources that hold the same, the first sends."""
    sends = []
    for target, (layers, heads) in enumerate(targets):
        for source, held in enumerate(sources):
            both = _common(layers, held[0]), _common(heads, held[1])
            if held not in sources[:source] and all(begin < end for begin, end in both):
                sends.append((source, target, *both))
    return sends


def drive_plan(function: Callable[..., Any], case: Case) -> Outcome:
    """The output: pieces (a layer's K and V of a head, at a target) that come; the work: messages. Raises `RuleError` for the first piece
    that comes twice or never.
    """
    sources, targets = case.inputs
    sends = function(list(sources), list(targets))
    if not isinstance(sends, (list, tuple)):
        raise RuleError(f"return a list of sends, not {sends!r:.60}")
    came: dict[tuple[int, int, int], list[int]] = {}
    for each in sends:
        source, target, layers, heads = _checked(each, len(sources), len(targets))
        for layer in range(*layers):
            for head in range(*heads):
                _check_held(each, layer, head, sources[source], f"source {source} does not hold")
                _check_held(each, layer, head, targets[target], f"target {target} does not want")
                came.setdefault((target, layer, head), []).append(source)
    wanted = [
        (n, layer, head)
        for n, (layers, heads) in enumerate(targets)
        for layer in range(*layers)
        for head in range(*heads)
    ]
    for target, layer, head in wanted:
        by = came.get((target, layer, head), [])
        if len(by) != 1:
            often = f"{len(by)} times, from sources {' and '.join(map(str, by))}" if by else "never"
            raise RuleError(f"head {head} of layer {layer} comes to target {target} {often}: expected once")
    return Outcome([len(wanted)], len(sends))


def _checked(send: Any, sources: int, targets: int) -> tuple[int, int, Part, Part]:
    """Raises `RuleError` for what is no (source, target, (begin, end), (begin, end))."""
    try:
        source, target, (first, last), (low, high) = send
        plain = all(type(each) is int for each in (source, target, first, last, low, high))
    except (TypeError, ValueError):
        plain = False
    if not plain:
        raise RuleError(f"a send is (source, target, (layer, layer), (head, head)), not {send!r:.60}")
    if not (0 <= source < sources and 0 <= target < targets):
        raise RuleError(f"{send}: there are {sources} sources and {targets} targets, from 0")
    return source, target, (first, last), (low, high)


def _check_held(send: Any, layer: int, head: int, holding: Holding, words: str) -> None:
    (first, last), (low, high) = holding
    if not (first <= layer < last and low <= head < high):
        raise RuleError(f"{tuple(send)}: {words} head {head} of layer {layer}")


def plan_spec(case: Case) -> list[int]:
    """Everything comes once."""
    return drive_plan(plan_sends, case).outputs


def fewest_sends(case: Case) -> int:
    """A message for each pair of ranks that have something in common, copies counted once."""
    return drive_plan(plan_sends, case).work


SHARE = Exercise(
    name="13.share",
    function="readers",
    minutes=5,
    spec=share_spec,
    names=("instances that read prompts",),
    cases=(
        Case("as fast", (8, 10, 10)),
        Case("prefill is faster", (8, 30, 10)),
        Case("decode is faster", (8, 10, 30)),
        Case("uneven", (5, 7, 12)),
        Case("at least one of each", (4, 1000, 1)),
        Case("two instances", (2, 3, 50)),
        Case("two ratios serve as many", (3, 10, 10)),
        Case("between two ratios", (8, 10, 15)),
        Case("one decoder suffices", (8, 1, 100)),
        Case("the more even one is not the best", (8, 50, 10)),
    ),
    starter='''\
def readers(instances, prefill_rate, decode_rate):
    """How many of the instances should read prompts, so that most requests/s get through.

    One serves prefill_rate requests/s as a reader, decode_rate as one that decodes. At least one of
    each; of ratios that serve as many, the one with fewer readers.
    """
    return instances // 2  # MEND (about 3 lines)
''',
    solution='''\
def readers(instances, prefill_rate, decode_rate):
    """What gets through is what the slower kind lets through; max takes the first of equals."""
    return max(range(1, instances), key=lambda n: min(n * prefill_rate, (instances - n) * decode_rate))
''',
    hints=(
        "A request needs both kinds: n readers and instances − n others. Which of the two holds it up?",
        "Try every n from 1 to instances − 1 and take the largest min(n · prefill_rate, (instances − n) · decode_rate).",
    ),
)

PULL = Exercise(
    name="13.pull",
    function="pull",
    minutes=10,
    spec=pull_spec,
    names=("caches to pull",),
    cases=(
        Case("one, and room", ([20], 4, [])),
        Case("the second does not fit", ([20, 40], 4, [])),
        Case("nobody overtakes", ([100, 5], 4, [])),
        Case("full blocks need one more", ([16], 1, [])),
        Case("just enough", ([16], 2, [])),
        Case("those that run come first", ([20], 3, [32, 33])),
        Case("no block is left for them", ([20], 2, [48])),
        Case("three of four", ([10, 31, 17, 90], 8, [7, 64])),
        Case("nobody waits", ([], 9, [5])),
        Case("fewer free than those that run want", ([5], 1, [16, 32])),
        Case("one token more fills the block", ([15], 1, [])),
        Case("two that run want one each", ([5, 5], 3, [16, 32])),
        Case("not full yet", ([5], 1, [15])),
        Case("kept for the second, too", ([5, 5], 2, [16])),
    ),
    starter='''\
def pull(waiting, free, running):
    """How many of the finished prompts' caches, from the first on, decode should pull now.

    waiting: tokens of each prompt, in order; free: blocks of 16 tokens. A cache needs blocks for its
    prompt and one token more. running: tokens in the cache of each request that decodes: one whose
    last block is full takes a block in the next step, and that is kept for it.
    """
    count = 0
    for tokens in waiting:  # MEND (about 6 lines)
        if tokens / 16 <= free:
            count += 1
    return count
''',
    solution='''\
def pull(waiting, free, running):
    """First a block for each full one that grows; then in order, until one does not fit."""
    room, count = free - sum(tokens % 16 == 0 for tokens in running), 0
    for tokens in waiting:
        room -= tokens // 16 + 1  # for one token more than the prompt has
        if room < 0:
            break
        count += 1
    return count
''',
    hints=(
        "Every cache that comes takes blocks from those after it. Whole blocks: 20 tokens and one more take two.",
        "Keep a block for each running request with tokens % 16 == 0. Then go through waiting in order, and stop at the first that does not fit.",
    ),
)

PLAN = Exercise(
    name="13.plan",
    function="plan",
    minutes=25,
    spec=plan_spec,
    drive=drive_plan,
    target=fewest_sends,
    unit="messages",
    plain=False,
    names=("pieces that come",),
    cases=(
        Case("one rank to one", ([((0, 4), (0, 2))], [((0, 4), (0, 2))])),
        Case("tp=2 to one rank", ([((0, 4), (0, 1)), ((0, 4), (1, 2))], [((0, 4), (0, 2))])),
        Case("one rank to pp=2", ([((0, 4), (0, 2))], [((0, 2), (0, 2)), ((2, 4), (0, 2))])),
        Case("tp=2 to pp=2", ([((0, 4), (0, 1)), ((0, 4), (1, 2))], [((0, 2), (0, 2)), ((2, 4), (0, 2))])),
        Case("tp=2 to pp=2, 3 heads", ([((0, 4), (0, 2)), ((0, 4), (2, 3))], [((0, 2), (0, 3)), ((2, 4), (0, 3))])),
        Case("pp=2 to pp=3, 30 layers", ([((0, 15), (0, 3)), ((15, 30), (0, 3))], [((0, 10), (0, 3)), ((10, 20), (0, 3)), ((20, 30), (0, 3))])),
        Case("tp=3 to tp=2, 3 heads", ([((0, 2), (n, n + 1)) for n in range(3)], [((0, 2), (0, 2)), ((0, 2), (2, 3))])),
        Case("tp=2 to tp=2, nothing crosses", ([((0, 4), (0, 1)), ((0, 4), (1, 2))], [((0, 4), (0, 1)), ((0, 4), (1, 2))])),
        Case("two ranks hold the same head", ([((0, 2), (0, 1)), ((0, 2), (0, 1)), ((0, 2), (1, 2)), ((0, 2), (1, 2))], [((0, 2), (0, 2))])),
        Case("copies take turns", ([((0, 2), (0, 1)), ((0, 2), (1, 2)), ((0, 2), (0, 1)), ((0, 2), (1, 2))], [((0, 2), (0, 2))])),
        Case("both want it", ([((0, 2), (0, 1)), ((0, 2), (1, 2))], [((0, 2), (0, 1)), ((0, 2), (0, 1)), ((0, 2), (1, 2))])),
    ),
    starter='''\
def plan(sources, targets):
    """Who sends which layers and heads of a KV cache to whom, when it moves between two layouts.

    sources[s] = ((first layer, end), (first head, end)) is what source rank s holds; targets likewise.
    Return sends (s, t, (first layer, end), (first head, end)): every target rank gets all that it holds
    exactly once, from who has it. Several ranks may hold the same. Target: few messages.
    """
    return [(0, t, layers, heads) for t, (layers, heads) in enumerate(targets)]  # MEND (about 9 lines)
''',
    solution='''\
def plan(sources, targets):
    """What a source and a target have in common goes; of sources that hold the same, the first sends."""
    def common(one, other):
        return max(one[0], other[0]), min(one[1], other[1])

    sends = []
    for t, (layers, heads) in enumerate(targets):
        for s, held in enumerate(sources):
            both = common(layers, held[0]), common(heads, held[1])
            if held not in sources[:s] and all(begin < end for begin, end in both):
                sends.append((s, t, *both))
    return sends
''',
    hints=(
        "What has a source in common with a target? Two ranges overlap from the larger beginning to the smaller end.",
        "Send where layers and heads both overlap. If an earlier source holds exactly the same, this one keeps quiet.",
    ),
)  # fmt: skip

EXERCISES = (SHARE, PULL, PLAN)
