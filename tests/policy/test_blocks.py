"""Blocks under any interleaving: nobody reads another's tokens, nothing leaks, copies come in time."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minillm.policy.blocks import BlockPool, BlockTable, OutOfBlocks, chain

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)  # two words: prefixes are often the same


class Blocks(RuleBasedStateMachine):
    """Sequences that start, grow, fork and end over a pool of 8 blocks of 3 tokens, with the memory behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, 3, reuse=True)
        self.memory = [[-1] * 3 for _ in range(8)]
        self.sequences: list[tuple[BlockTable, list[int]]] = []

    def store(self, table: BlockTable, tokens: list[int], start: int) -> None:
        """Write `tokens` from `start` on, as a step of the engine does."""
        for old, new in table.write(start, len(tokens)):
            self.memory[new] = list(self.memory[old])
        for at in range(start, len(tokens)):
            block = table.blocks[at // 3]
            assert self.pool.references[block] == 1, "a shared block is written to"
            self.memory[block][at % 3] = tokens[at]
        table.remember(tokens, len(tokens))

    @rule(tokens=TOKENS)
    def start(self, tokens: list[int]) -> None:
        """A prompt comes; what is known of it is not computed again, except its last token."""
        table = BlockTable(self.pool)
        known = table.reuse(tokens)
        assert known < len(tokens)
        try:
            self.store(table, tokens, known)
        except OutOfBlocks:
            table.free()
        else:
            self.sequences.append((table, tokens))

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99), more=TOKENS)
    def grow(self, which: int, more: list[int]) -> None:
        """A sequence gets tokens, or finds no block and stays as it was."""
        table, tokens = self.sequences[which % len(self.sequences)]
        before, free = list(table.blocks), self.pool.num_free
        needed = table.missing(len(tokens), len(tokens) + len(more))
        try:
            self.store(table, [*tokens, *more], len(tokens))
        except OutOfBlocks:
            assert needed > free
            assert (table.blocks, self.pool.num_free) == (before, free)
        else:
            assert self.pool.num_free == free - needed
            tokens += more

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99))
    def fork(self, which: int) -> None:
        """Sampling splits a sequence in two; this takes no block."""
        table, tokens = self.sequences[which % len(self.sequences)]
        free = self.pool.num_free
        self.sequences.append((table.fork(), list(tokens)))
        assert self.pool.num_free == free

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        """A sequence ends."""
        table, _ = self.sequences.pop(which % len(self.sequences))
        table.free()

    @rule()
    def forget(self) -> None:
        """Kept contents are dropped."""
        self.pool.forget()
        assert not self.pool.kept

    @invariant()
    def everyone_reads_their_own(self) -> None:
        """Through its table each sequence finds its tokens."""
        for table, tokens in self.sequences:
            assert [self.memory[table.blocks[at // 3]][at % 3] for at in range(len(tokens))] == tokens

    @invariant()
    def every_block_is_counted(self) -> None:
        """References are the holders, and a block is free or held, never both."""
        holders = [sum(table.blocks.count(block) for table, _ in self.sequences) for block in range(8)]
        assert self.pool.references == holders
        assert self.pool.num_used == sum(count > 0 for count in holders)
        assert len(set(self.pool.kept)) == len(self.pool.kept)
        assert all(holders[block] == 0 for block in self.pool.kept)

    def teardown(self) -> None:
        """No leak."""
        for table, _ in self.sequences:
            table.free()
        assert self.pool.num_free == 8
        assert sorted(self.pool.take() for _ in range(8)) == list(range(8))


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(
    max_examples=int(os.environ.get("MINILLM_EXAMPLES", "60")), stateful_step_count=40, deadline=None
)


def test_the_least_recently_used_content_goes_first() -> None:
    pool = BlockPool(2, 2, reuse=True)
    for tokens in ([1, 1], [2, 2], [1, 1], [3, 3]):
        table = BlockTable(pool)
        table.reuse([*tokens, 9])
        table.write(2 * len(table.blocks), 2)
        table.remember(tokens, 2)
        table.free()
    assert pool.find(chain(b"", [1, 1])) is not None
    assert pool.find(chain(b"", [2, 2])) is None  # used before [1, 1] was used again
    assert pool.find(chain(b"", [3, 3])) is not None


def test_keys_stand_for_the_whole_prefix() -> None:
    assert chain(chain(b"", [1, 2]), [3, 4]) != chain(chain(b"", [9, 2]), [3, 4])
    assert chain(b"", [1, 2]) == chain(b"", (1, 2))


def test_without_reuse_nothing_is_kept() -> None:
    pool = BlockPool(4, 2)
    table = BlockTable(pool)
    table.write(0, 4)
    table.remember([1, 2, 3, 4], 4)
    table.free()
    assert (pool.kept, BlockTable(pool).reuse([1, 2, 3, 4])) == ([], 0)


@pytest.mark.parametrize(("blocks", "size"), [(0, 16), (4, 0), (-1, 16), (True, 16), (2.5, 16)])
def test_sizes_that_cannot_be(blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match="give a whole number from 1"):
        BlockPool(blocks, size)
