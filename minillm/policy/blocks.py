"""The KV cache's blocks: who holds which, which may be reused, which goes next (PagedAttention, Kwon et al. 2023, section 4).

Blocks are numbers; the tensors behind them are in `minillm/kv`. The file knows no requests and no scheduler.
"""

from __future__ import annotations

import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from minillm.policy.batch import Away, Move

AWAY = -1  # in a block table: this block lies at another instance


class OutOfBlocks(Exception):
    """Every block of the pool is held by somebody."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens with reference counts.

    A block that nobody holds is free. With `reuse` a full block keeps its content under a key after its last holder has
    gone; such blocks are taken last, the least recently used first.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, reuse: bool = False) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number from 1")
        self.num_blocks, self.block_size, self.reuse = num_blocks, block_size, reuse
        self.references = [0] * num_blocks
        self._blank = list(range(num_blocks))  # a heap: free blocks without content worth keeping, the lowest first
        self._kept: OrderedDict[int, None] = OrderedDict()  # free blocks with a key, the least recently used first
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self.returned: list[Away] = []  # blocks at other instances that nobody here needs any more
        self.leaving = 0  # blocks that move to other instances, and are free once they have arrived

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, kept ones among them."""
        return len(self._blank) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_free

    def used_on(self, ranks: int) -> tuple[int, ...]:
        """`num_used`, rank by rank, where block b lies on rank b mod `ranks`."""
        if ranks == 1:
            return (self.num_used,)
        return tuple(sum(count > 0 for count in self.references[rank::ranks]) for rank in range(ranks))

    @property
    def kept(self) -> list[int]:
        """Free blocks whose content is kept, the next to go first."""
        return list(self._kept)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks so many tokens take."""
        return -(-tokens // self.block_size)

    def take(self) -> int:
        """A block for one holder, its content lost. Raises `OutOfBlocks`."""
        if self._blank:
            block = heapq.heappop(self._blank)
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        else:
            raise OutOfBlocks
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a block that is held or kept."""
        if self.references[block] == 0:
            del self._kept[block]
        self.references[block] += 1

    def release(self, block: int) -> None:
        """One holder less; the last one frees the block."""
        assert self.references[block] > 0, "a free block was released"
        self.references[block] -= 1
        if self.references[block] == 0:
            if block in self._key_of:
                self._kept[block] = None
            else:
                heapq.heappush(self._blank, block)

    def find(self, key: bytes) -> int | None:
        """The block with this content, held or kept."""
        return self._block_of.get(key)

    def remember(self, block: int, key: bytes) -> None:
        """This held block's content, from now on unchanging, has this key. The first block with a content stands for it."""
        if self.reuse and key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def forget(self) -> None:
        """Forget every content: kept blocks become blank."""
        for block in self._kept:
            heapq.heappush(self._blank, block)
        self._kept.clear()
        self._block_of.clear()
        self._key_of.clear()


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block: a hash of its tokens and of the key before it, so that it stands for the whole prefix."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockTable:
    """The blocks of one sequence, in order. Position p lies in block `blocks[p // block_size]`, unless that is `AWAY`: the first
    blocks may lie at other instances, in order in `away`. More are `reserved` there for those that follow, of which some may be
    `leaving`: they are still read here.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.blocks: list[int] = []
        self.away: list[Away] = []
        self.reserved: list[Away] = []
        self.leaving: list[Move] = []
        self._keys: list[bytes] = []  # of the sequence's full blocks, as far as they were asked for
        self._findable = 0  # blocks at the front that others may find

    def reuse(self, tokens: Sequence[int]) -> int:
        """Hold the blocks that already have the beginning of `tokens`; returns how many tokens that is.

        At least one token is left to compute: its logits are wanted.
        """
        assert not self.blocks
        for place in range((len(tokens) - 1) // self.pool.block_size if self.pool.reuse else 0):
            block = self.pool.find(self._key(place, tokens))
            if block is None:
                break
            self.pool.share(block)
            self.blocks.append(block)
        self._findable = len(self.blocks)
        return len(self.blocks) * self.pool.block_size

    def missing(self, start: int, length: int) -> int:
        """How many blocks `write(start, length)` would take from the pool."""
        return max(0, self.pool.blocks_for(length) - len(self.blocks)) + self._shared_at(start)

    def write(self, start: int, length: int) -> list[tuple[int, int]]:
        """Make positions `start` … `length` - 1 writable; returns the blocks (from, to) to copy first.

        New blocks are taken, and one that others hold too is replaced by a copy (copy-on-write).
        Raises `OutOfBlocks`, with nothing taken.
        """
        if self.missing(start, length) > self.pool.num_free:
            raise OutOfBlocks
        copies = []
        if self._shared_at(start):
            place = start // self.pool.block_size
            old, self.blocks[place] = self.blocks[place], self.pool.take()
            self.pool.release(old)
            copies.append((old, self.blocks[place]))
        while len(self.blocks) < self.pool.blocks_for(length):
            self.blocks.append(self.pool.take())
        return copies

    def remember(self, tokens: Sequence[int], computed: int) -> None:
        """The first `computed` of `tokens` are in the cache: let others find the full blocks."""
        while self.pool.reuse and (self._findable + 1) * self.pool.block_size <= computed:
            self.pool.remember(self.blocks[self._findable], self._key(self._findable, tokens))
            self._findable += 1

    @property
    def num_away(self) -> int:
        """Blocks that lie at other instances."""
        return sum(len(each.blocks) for each in self.away)

    @property
    def num_reserved(self) -> int:
        """Blocks that other instances keep free for this sequence."""
        return sum(len(each.blocks) for each in self.reserved)

    def movable(self, computed: int) -> int:
        """How many of the next blocks after those that are away may go too: full, computed, held by this sequence alone."""
        first, full = self.num_away, computed // self.pool.block_size
        alone = (self.pool.references[block] == 1 for block in self.blocks[first:full])
        return next((count for count, each in enumerate(alone) if not each), max(0, full - first))

    def lend(self, count: int) -> list[Move]:
        """Begin to move the next `count` blocks to where they are reserved. They are read here until `arrived`."""
        assert not self.leaving
        first = self.num_away
        for room in self.reserved:
            if some := min(count, len(room.blocks)):
                mine = tuple(self.blocks[first : first + some])
                self.leaving.append(Move(mine, Away(room.creditor, room.blocks[:some])))
                first, count = first + some, count - some
        self.pool.leaving += sum(len(move.blocks) for move in self.leaving)
        return list(self.leaving)

    def arrived(self) -> None:
        """What was leaving is read at its creditors from now on, and free here."""
        for move in self.leaving:
            room, first, some = self.reserved[0], self.num_away, len(move.blocks)
            self.reserved[:1] = [Away(room.creditor, room.blocks[some:])] if some < len(room.blocks) else []
            self.blocks[first : first + some] = [AWAY] * some
            self.away.append(move.away)
            for block in reversed(move.blocks):
                self.pool.release(block)
        self._stay()

    def _stay(self) -> None:
        """Nothing is leaving any more."""
        self.pool.leaving -= sum(len(move.blocks) for move in self.leaving)
        self.leaving = []

    def bring_home(self) -> list[Move]:
        """Move all that is away into blocks of this pool, and let go of what is reserved. Raises `OutOfBlocks`, with nothing moved."""
        if self.num_away > self.pool.num_free:
            raise OutOfBlocks
        assert not self.leaving
        moves, place = [], 0
        for away in self.away:
            mine = tuple(self.pool.take() for _ in away.blocks)
            self.blocks[place : place + len(mine)] = mine
            moves.append(Move(mine, away, home=True))
            place += len(mine)
        self.pool.returned += self.away + self.reserved
        self.away, self.reserved = [], []
        return moves

    def fork(self) -> BlockTable:
        """A second holder of the same blocks, of which none is away."""
        assert not self.away
        twin = BlockTable(self.pool)
        twin.blocks, twin._keys, twin._findable = list(self.blocks), list(self._keys), self._findable
        for block in twin.blocks:
            self.pool.share(block)
        return twin

    def free(self) -> None:
        """Let go of every block; the last first, so that of a kept prefix the end goes before the beginning."""
        self._stay()
        for block in reversed(self.blocks):
            if block != AWAY:
                self.pool.release(block)
        self.pool.returned += self.away + self.reserved
        self.blocks, self.away, self.reserved, self._findable = [], [], [], 0

    def _key(self, place: int, tokens: Sequence[int]) -> bytes:
        """The key of a full block; worked out once, because tokens are only ever added at the end."""
        size = self.pool.block_size
        while len(self._keys) <= place:
            start = len(self._keys) * size
            self._keys.append(chain(self._keys[-1] if self._keys else b"", tokens[start : start + size]))
        return self._keys[place]

    def _shared_at(self, start: int) -> bool:
        """Whether the block that `start` lies in exists and has other holders too."""
        place = start // self.pool.block_size
        return place < len(self.blocks) and self.pool.references[self.blocks[place]] > 1
