"""Exercises of lesson 03: places that blocks waste, how much of a prompt is in the cache, and writing with copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minillm.lesson.exercise import Case, Exercise, Outcome, RuleError
from minillm.policy.blocks import BlockPool, BlockTable, OutOfBlocks


def waste_spec(case: Case) -> list[int]:
    """Counted: blocks are handed out one by one until all tokens have a place."""
    lengths, block_size = case.inputs
    empty = 0
    for length in lengths:
        places = 0
        while places < length:
            places += block_size
        empty += places - length
    return [empty]


def known_tokens_spec(case: Case) -> list[int]:
    """By the engine's own pool: the earlier prompts come by, then the new one looks."""
    earlier, prompt, block_size = case.inputs
    pool = BlockPool(1000, block_size, reuse=True)
    for tokens in earlier:
        table = BlockTable(pool)
        table.write(table.reuse(tokens), len(tokens))
        table.remember(tokens, len(tokens))
    return [BlockTable(pool).reuse(prompt)]


Write = Callable[..., Any]


def method_of(plan: Write) -> Callable[[BlockTable, int, int], list[tuple[int, int]]]:
    """`BlockTable.write` by `plan(blocks, holders, take, release, start, length, block_size)`.

    The method raises `OutOfBlocks` before anything changes, and `RuleError` for a wrong plan.
    """

    def write(self: BlockTable, start: int, length: int) -> list[tuple[int, int]]:
        pool = self.pool
        if self.missing(start, length) > pool.num_free:
            raise OutOfBlocks
        copies = plan(self.blocks, tuple(pool.references), pool.take, pool.release, start, length, pool.block_size)
        if not isinstance(copies, list) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in copies):
            raise RuleError("return a list of pairs (from, to), empty when nothing is to be copied")
        if len(self.blocks) != pool.blocks_for(length):
            raise RuleError(
                f"{length} tokens need {pool.blocks_for(length)} blocks, but the table has {len(self.blocks)}"
            )
        return copies

    return write


class CountingPool(BlockPool):
    """Counts the blocks that were taken."""

    taken = 0

    def take(self) -> int:
        """A block, counted."""
        self.taken += 1
        return super().take()


def drive_write(function: Write, case: Case) -> Outcome:
    """Sequences that start, fork, grow and end, over a memory of tokens. The outputs are the blocks that nobody gave back,
    and what each sequence reads at its end.
    """
    block_size, script = case.inputs
    table_class = type("Table", (BlockTable,), {"write": method_of(function)})
    pool = CountingPool(24, block_size)
    memory: dict[tuple[int, int], int] = {}
    tables: dict[str, BlockTable] = {}
    texts: dict[str, list[int]] = {}
    outputs: list[int] = []

    def store(name: str, tokens: list[int]) -> None:
        table, start = tables[name], len(texts[name])
        texts[name] = texts[name] + tokens
        copies = table.write(start, len(texts[name]))
        for old, new in copies:
            for offset in range(block_size):
                memory[new, offset] = memory.get((old, offset), -1)
        for at in range(start, len(texts[name])):
            memory[table.blocks[at // block_size], at % block_size] = texts[name][at]

    for action, name, what in script:
        if action == "start":
            tables[name], texts[name] = table_class(pool), []
            store(name, what)
        elif action == "grow":
            store(name, what)
        elif action == "fork":
            twin = table_class(pool)
            twin.blocks = list(tables[name].blocks)
            for block in twin.blocks:
                pool.share(block)
            tables[what], texts[what] = twin, list(texts[name])
        else:
            outputs += [
                memory.get((tables[name].blocks[at // block_size], at % block_size), -1)
                for at in range(len(texts[name]))
            ]
            tables[name].free()
    return Outcome([pool.num_used, *outputs], pool.taken)


def _reference(case: Case) -> Outcome:
    names: dict[str, Any] = {}
    exec(WRITE.solution, names)
    return drive_write(names["write"], case)


_A, _B, _C = [11, 12, 13], [21, 22], [31, 32, 33, 34, 35]
WASTE = Exercise(
    name="03.waste",
    function="waste",
    minutes=5,
    spec=waste_spec,
    cases=(
        Case("one sequence of 5 tokens, blocks of 4", ([5], 4)),
        Case("sequences of 3, 16 and 17 tokens, blocks of 16", ([3, 16, 17], 16)),
        Case("the same, reserved for 2,048", ([3, 16, 17], 2048)),
    ),
    starter='''\
def waste(lengths, block_size):
    """Places that are held and empty, when every sequence of these lengths takes whole blocks."""
    return 0  # FILL IN (one line)
''',
    solution='''\
def waste(lengths, block_size):
    """Only the last block of a sequence can have empty places."""
    return sum(-length % block_size for length in lengths)
''',
    hints=(
        "How many blocks do 5 tokens take, if a block has 4 places? How many places is that?",
        "-(-length // block_size) blocks have block_size places each; what is above the length is empty.",
    ),
)

KNOWN_TOKENS = Exercise(
    name="03.known_tokens",
    function="known_tokens",
    minutes=10,
    spec=known_tokens_spec,
    cases=(
        Case("the same five tokens again, blocks of 2", ([[1, 2, 3, 4, 5]], [1, 2, 3, 4, 5], 2)),
        Case("the same four tokens again, blocks of 2", ([[1, 2, 3, 4]], [1, 2, 3, 4], 2)),
        Case("equal second blocks after different first ones", ([[1, 2, 3, 4, 5]], [9, 2, 3, 4, 5, 6], 2)),
        Case("the second block of another prompt", ([[1, 2, 3, 4, 5], [9, 9, 7, 8, 5]], [1, 2, 7, 8, 6], 2)),
        Case("a system prompt of 8, blocks of 4", ([[5] * 8 + [1, 2, 3]], [5] * 8 + [6, 7], 4)),
    ),
    starter='''\
def known_tokens(earlier, prompt, block_size):
    """How many tokens at the beginning of `prompt` need not be computed.

    The cache keeps full blocks of the `earlier` prompts (lists of token ids). The last token of a
    prompt is computed in any case: its logits are wanted.
    """
    return 0  # FILL IN (about 4 lines)
''',
    solution='''\
def known_tokens(earlier, prompt, block_size):
    """Block by block from the front, as long as some earlier prompt began alike."""
    known = 0
    while known + block_size < len(prompt):
        end = known + block_size
        if not any(tokens[:end] == prompt[:end] for tokens in earlier):
            break
        known = end
    return known
''',
    hints=(
        "A block may be reused only if everything before it is the same too. Compare prefixes, not blocks.",
        "Try end = block_size, 2 · block_size, … while end < len(prompt), and stop at the first end for which no earlier prompt has prompt[:end].",
    ),
)

WRITE = Exercise(
    name="03.write",
    function="write",
    minutes=25,
    spec=lambda case: _reference(case).outputs,
    cases=(
        Case(
            "a sequence of 3 tokens, then 2 more, blocks of 4",
            (4, (("start", "a", _A), ("grow", "a", _B), ("end", "a", None))),
        ),
        Case(
            "a fork in the middle of a block, and both go on",
            (
                4,
                (
                    ("start", "a", _A),
                    ("fork", "a", "b"),
                    ("grow", "a", _B),
                    ("grow", "b", _C),
                    ("end", "a", None),
                    ("end", "b", None),
                ),
            ),
        ),
        Case(
            "a fork at the end of a block",
            (
                3,
                (
                    ("start", "a", _A),
                    ("fork", "a", "b"),
                    ("grow", "b", _B),
                    ("grow", "a", _C),
                    ("end", "b", None),
                    ("end", "a", None),
                ),
            ),
        ),
        Case(
            "three of one prompt, one ends early",
            (
                4,
                (
                    ("start", "a", _C),
                    ("fork", "a", "b"),
                    ("fork", "a", "c"),
                    ("grow", "b", _B),
                    ("end", "a", None),
                    ("grow", "c", _A),
                    ("grow", "b", _A),
                    ("end", "c", None),
                    ("end", "b", None),
                ),
            ),
        ),
    ),
    drive=drive_write,
    plain=False,
    target=lambda case: _reference(case).work,
    unit="blocks taken from the pool",
    names=("blocks still held when all have ended", *(f"token {number} read back" for number in range(60))),
    starter='''\
def write(blocks, holders, take, release, start, length, block_size):
    """Make positions start … length - 1 of a sequence writable; return the blocks to copy, [(from, to)].

    `blocks` is the sequence's list of block numbers, to be changed in place; position p lies in
    blocks[p // block_size]. holders[b] says how many sequences hold block b. take() gives a new block,
    release(b) gives up the sequence's hold on one.
    """
    while len(blocks) * block_size < length:
        blocks.append(take())
    return []
''',
    solution='''\
def write(blocks, holders, take, release, start, length, block_size):
    """Copy the block at `start` if others hold it too, then add blocks to the end."""
    copies, place = [], start // block_size
    if place < len(blocks) and holders[blocks[place]] > 1:
        old, blocks[place] = blocks[place], take()
        release(old)
        copies.append((old, blocks[place]))
    while len(blocks) * block_size < length:
        blocks.append(take())
    return copies
''',
    hints=(
        "Two sequences hold one block after a fork. What do they read when one of them writes to it?",
        "Only the block of position `start` can be shared and not full. If holders[…] > 1: take a new one, put it in its place, release the old one, and return the pair.",
    ),
)

EXERCISES = (WASTE, KNOWN_TOKENS, WRITE)
