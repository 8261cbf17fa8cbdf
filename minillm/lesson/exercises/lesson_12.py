"""Exercises of lesson 12: bytes per token of borrowed blocks, what a creditor grants, and a plan on a stale view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minillm.distkv.spread import answer_bytes
from minillm.lesson.exercise import Case, Exercise, Outcome, RuleError


def wire_spec(case: Case) -> list[int]:
    """Of each token that is decoded, however much has been borrowed."""
    borrowed, layers, heads, head_dim = case.inputs
    return [layers * sum(blocks > 0 for blocks in borrowed) * answer_bytes(heads, head_dim, 4)]


def grant_spec(case: Case) -> list[int]:
    """What there is room for within the cap; nothing while somebody waits here; a firm ask whole or not at all."""
    asked, firm, free, lent, cap, waiting = case.inputs
    room = max(0, min(asked, free, cap - lent))
    if firm:
        return [asked if room == asked else 0]
    return [0 if waiting else room]


class Lenders:
    """Others with free blocks, which may have fewer by now than is said."""

    def __init__(self, free: list[int]) -> None:
        self.free, self.held, self.asks = list(free), [0] * len(free), 0

    def ask(self, creditor: int, blocks: int) -> bool:
        """Reserve blocks there, all or none."""
        self._check(creditor, blocks)
        self.asks += 1
        if blocks > self.free[creditor]:
            return False
        self.free[creditor] -= blocks
        self.held[creditor] += blocks
        return True

    def give_back(self, creditor: int, blocks: int) -> None:
        """Return reserved blocks."""
        self._check(creditor, blocks)
        if blocks > self.held[creditor]:
            raise RuleError(f"gives {blocks} blocks back to instance {creditor}, and holds {self.held[creditor]} there")
        self.held[creditor] -= blocks
        self.free[creditor] += blocks

    def _check(self, creditor: Any, blocks: Any) -> None:
        if type(creditor) is not int or not 0 <= creditor < len(self.free):
            raise RuleError(f"there is no instance {creditor!r:.40}")
        if type(blocks) is not int or blocks < 1:
            raise RuleError(f"{blocks!r:.40} blocks: whole numbers from 1 on")


def drive_borrow(function: Callable[..., Any], case: Case) -> Outcome:
    """The outputs: whether it says that it got all, and what it holds; the work: how often it asked."""
    need, said, really = case.inputs
    lenders = Lenders(really)
    got = function(need, list(said), lenders.ask, lenders.give_back)
    if type(got) is not bool:
        raise RuleError(f"return True or False, not {got!r:.40}")
    return Outcome([got, sum(lenders.held)], lenders.asks)


def borrow_all(
    need: int, said: list[int], ask: Callable[[int, int], bool], give_back: Callable[[int, int], None]
) -> bool:
    """Greedy: who is said to have most is asked first; what it refuses is asked of the next."""
    held: list[tuple[int, int]] = []
    for creditor in sorted(range(len(said)), key=lambda each: -said[each]):
        blocks = min(need, said[creditor])
        if blocks and ask(creditor, blocks):
            held.append((creditor, blocks))
            need -= blocks
    if need:
        for creditor, blocks in held:
            give_back(creditor, blocks)
    return not need


def borrow_spec(case: Case) -> list[Any]:
    """All that is needed, or nothing is held."""
    return drive_borrow(borrow_all, case).outputs


def fewest_asks(case: Case) -> int:
    """What the greedy plan asks."""
    return drive_borrow(borrow_all, case).work


def _others(label: str, need: int, said: list[int], really: list[int] | None = None) -> Case:
    """So many blocks are needed, and so many are said to be free, or are. A verdict tells all three."""
    told = f"need {need}, said {said}" + (f", really {really}" if really else "")
    return Case(f"{label} ({told})", (need, said, really or said))


WIRE = Exercise(
    name="12.wire",
    function="wire_bytes",
    minutes=5,
    spec=wire_spec,
    names=("bytes",),
    cases=(
        Case("one creditor", ([1], 30, 9, 64)),
        Case("a hundred blocks there", ([100], 30, 9, 64)),
        Case("two creditors", ([7, 20], 32, 32, 128)),
        Case("nothing of one of them", ([5, 0, 2], 12, 8, 32)),
        Case("all at home", ([0, 0], 30, 9, 64)),
    ),
    starter='''\
def wire_bytes(borrowed, layers, heads, head_dim):
    """Bytes on the wire for a decoded token, in float32; borrowed[i] blocks lie at creditor i."""
    blocks = sum(borrowed)
    return layers * blocks * 16 * 2 * heads * head_dim * 4  # MEND (about 2 lines): what travels?
''',
    solution='''\
def wire_bytes(borrowed, layers, heads, head_dim):
    """In each layer a query goes to every creditor that holds a part, and o, m and l come back."""
    creditors = sum(blocks > 0 for blocks in borrowed)
    return layers * creditors * heads * (head_dim + head_dim + 2) * 4
''',
    hints=(
        "Blocks move once. For a token a query travels, to everybody who holds a part, and an answer comes back.",
        "A query: heads × head_dim numbers. An answer: o as large, and m and l for each head. That in every layer.",
    ),
)

GRANT = Exercise(
    name="12.grant",
    function="grant",
    minutes=10,
    spec=grant_spec,
    names=("blocks granted",),
    cases=(
        Case("plenty", (3, False, 10, 0, 8, 0)),
        Case("fewer are free", (6, False, 4, 0, 8, 0)),
        Case("the cap comes first", (6, False, 10, 5, 8, 0)),
        Case("somebody waits here", (2, False, 10, 0, 8, 1)),
        Case("firm, and somebody waits", (2, True, 10, 0, 8, 1)),
        Case("firm, and only a part is free", (6, True, 4, 0, 8, 0)),
        Case("firm, and just enough", (6, True, 6, 2, 8, 3)),
        Case("more lent than the cap is now", (2, False, 10, 9, 8, 0)),
        Case("a cap of zero", (2, True, 10, 0, 0, 0)),
        Case("firm, and the cap leaves a part", (2, True, 10, 7, 8, 0)),
        Case("three wait here", (2, False, 10, 0, 8, 3)),
    ),
    starter='''\
def grant(asked, firm, free, lent, cap, waiting):
    """How many of the blocks asked for a creditor lends: as many as it can, at most `cap` in all.

    It has `free` blocks and has lent `lent`. While own requests wait (`waiting` of them) it lends none,
    but to firm asks: those are for a request that cannot run without, and are met whole or not at all.
    """
    return min(asked, free)  # MEND (about 6 lines)
''',
    solution='''\
def grant(asked, firm, free, lent, cap, waiting):
    """As many as are free within the cap; firm asks all or none, others only while nobody waits."""
    room = max(0, min(asked, free, cap - lent))
    if firm:
        return asked if room == asked else 0
    return 0 if waiting else room
''',
    hints=(
        "Three limits at once: what is asked, what is free, what the cap leaves. None of them may become negative.",
        "Look at firm first: there `waiting` does not matter, and a part is as good as nothing.",
    ),
)

BORROW = Exercise(
    name="12.borrow",
    function="borrow",
    minutes=25,
    spec=borrow_spec,
    drive=drive_borrow,
    target=fewest_asks,
    unit="asks",
    plain=False,
    names=("all borrowed", "blocks held at the end"),
    cases=(
        _others("one has enough", 3, [2, 5]),
        _others("two together", 6, [3, 1, 4]),
        _others("the fullest view first", 7, [1, 2, 1, 6, 3]),
        _others("one has less than it is said to have", 5, [6, 3, 2], [1, 3, 2]),
        _others("nobody has enough", 9, [4, 2]),
        _others("not enough, but nobody knew", 6, [4, 3], [4, 1]),
        _others("one has nothing", 4, [0, 4, 0]),
        _others("nothing is needed", 0, [3]),
        _others("all alike", 6, [3, 3]),
        _others("the last of three has less", 12, [4, 4, 4], [4, 4, 3]),
        _others("three together", 9, [3, 3, 3]),
    ),
    starter='''\
def borrow(need, said, ask, give_back):
    """Borrow `need` blocks for a request that cannot run without: all of them, or none.

    said[i] is how many free blocks creditor i had when it was last heard of; it may have fewer now.
    ask(i, blocks) reserves blocks there: True. Or it refuses: False, and nothing is reserved.
    give_back(i, blocks) returns reserved blocks. Return whether all are borrowed. Target: few asks.
    """
    for creditor in range(len(said)):  # MEND (about 12 lines): in which order? If one refuses?
        if said[creditor]:
            ask(creditor, said[creditor])
    return sum(said) >= need
''',
    solution='''\
def borrow(need, said, ask, give_back):
    """Greedy: who is said to have most is asked first; whoever refuses is passed over."""
    held = []
    for creditor in sorted(range(len(said)), key=lambda each: -said[each]):
        blocks = min(need, said[creditor])
        if blocks and ask(creditor, blocks):
            held.append((creditor, blocks))
            need -= blocks
    if need:
        for creditor, blocks in held:
            give_back(creditor, blocks)
    return not need
''',
    hints=(
        "Note what each ask really gave: `said` is what you heard, not what is. Ask for no more than is still needed.",
        "Fullest first. At the end, if something is missing, give back all that you got: others may need it.",
    ),
)

EXERCISES = (WIRE, GRANT, BORROW)
