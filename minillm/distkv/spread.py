"""Where the blocks of sequences lie when several ranks hold them, and who has to ask whom. Numbers only, no tensors.

Block b of the whole pool is on rank b mod N, as its block b div N. A token is computed where its own block lies, so that K and V are
written where they are made. Every rank works the same out from the same batch; nothing is sent for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minillm.policy.batch import Batch, Chunk


@dataclass(frozen=True)
class Holding:
    """What one rank holds of a sequence: its own `blocks` there, in order, and which place each has in the sequence."""

    blocks: tuple[int, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, chunk: Chunk, size: int, rank: int, block_size: int) -> Holding:
        """Of the blocks that reach to the end of the chunk."""
        used = chunk.block_table[: -(-chunk.end // block_size)]
        found = [(block // size, place) for place, block in enumerate(used) if block % size == rank]
        return cls(tuple(block for block, _ in found), tuple(place for _, place in found))


@dataclass(frozen=True)
class Row:
    """A token of the step: its row in the batch, which chunk it is of, its position in the sequence, the rank that computes it, and
    the others that hold keys it attends to.
    """

    number: int
    chunk: int
    position: int
    owner: int
    asks: tuple[int, ...]


def rows_of(batch: Batch, size: int, block_size: int) -> list[Row]:
    """All tokens of a batch, in order, when its blocks lie on `size` ranks."""
    rows: list[Row] = []
    for number, chunk in enumerate(batch.chunks):
        held = [block % size for block in chunk.block_table[: -(-chunk.end // block_size)]]
        first = {rank: held.index(rank) * block_size for rank in set(held)}  # the first position that each holds
        for position in range(chunk.start, chunk.end):
            owner = held[position // block_size]
            asks = tuple(rank for rank in sorted(first) if first[rank] <= position and rank != owner)
            rows.append(Row(len(rows), number, position, owner, asks))
    return rows


@dataclass(frozen=True)
class Questions:
    """One rank's part of a step. Of all `rows` it computes its `own`; of these, `going[r]` (places among its own) ask rank r, and
    the rows `coming[r]` of rank r ask here.
    """

    rows: tuple[Row, ...]
    own: tuple[Row, ...]
    going: tuple[tuple[int, ...], ...]
    coming: tuple[tuple[Row, ...], ...]

    @property
    def asked(self) -> tuple[Row, ...]:
        """All that this rank answers: its own rows, then the others', rank by rank."""
        return (*self.own, *(row for rows in self.coming for row in rows))


def questions_of(batch: Batch, size: int, rank: int, block_size: int, travels: Sequence[bool] = ()) -> Questions:
    """Who asks whom in a step, as one of the ranks sees it. Chunks whose keys travel (`travels`) ask nobody."""
    rows = rows_of(batch, size, block_size)
    asking = [row for row in rows if not (travels and travels[row.chunk])]
    own = tuple(row for row in rows if row.owner == rank)
    place = {row.number: at for at, row in enumerate(own)}
    going = tuple(
        tuple(place[row.number] for row in asking if row.owner == rank and other in row.asks) for other in range(size)
    )
    coming = tuple(tuple(row for row in asking if row.owner == other and rank in row.asks) for other in range(size))
    return Questions(tuple(rows), own, going, coming)


def answer_bytes(heads: int, head_dim: int, element_bytes: int) -> int:
    """What a query and its answer from one other rank take on the wire, in one layer: q [heads, head_dim], and
    o [heads, head_dim], m, l [heads] in float32 (float64 where the model is).
    """
    return heads * head_dim * element_bytes + heads * (head_dim + 2) * max(4, element_bytes)


def key_bytes(kv_heads: int, head_dim: int, element_bytes: int) -> int:
    """What the K and V of a token take on the wire to one other rank, in one layer."""
    return 2 * kv_heads * head_dim * element_bytes
