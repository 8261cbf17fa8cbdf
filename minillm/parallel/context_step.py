"""One forward pass as a rank sees it that shares the KV cache with others: whom its queries go to, what it reads for whom, and the
merge (`context.py` has the group, and the layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from minillm.distkv.attention import Partial, partial_attention
from minillm.distkv.spread import Holding, questions_of
from minillm.kv.paged import PagedCache
from minillm.model.cost import Cost, experts_cost, mlp_cost, product_cost
from minillm.model.decoder import Decoder
from minillm.parallel.tensor import TensorGroup
from minillm.policy.batch import Batch
from minillm.policy.options import EngineOptions
from minillm.ranks.comm import Comm


class Group(Protocol):
    """What a step needs of its group (`ContextGroup`)."""

    comm: Comm
    tensor: TensorGroup | None
    options: EngineOptions

    def move(self, name: str, x: torch.Tensor, send_rows: list[int], recv_rows: list[int]) -> torch.Tensor: ...

    def spend(self, cost: Cost, messages: int = 0) -> None: ...


@dataclass(frozen=True)
class Reading:
    """Some queries that attend to some keys: `rows` say which queries, `seen` [rows, keys] which keys each may see. The keys lie in
    `blocks` of the cache.
    """

    rows: torch.Tensor
    blocks: torch.Tensor
    seen: torch.Tensor


class ContextStep:
    """What all layers of one forward pass share on one rank of the line; `cos` and `sin` turn the queries and keys of its rows."""

    def __init__(self, group: Group, model: Decoder, batch: Batch, cache: PagedCache) -> None:
        size, rank, block_size = group.comm.size, group.comm.rank, cache.block_size
        self.group, self.device, self.batch = group, model.device, batch
        self.shape, self.dtype = (model.config.heads, model.config.head_dim), model.dtype
        travels = [group.options.ring_prefill and chunk.is_prefill for chunk in batch.chunks]
        self.questions = questions_of(batch, size, rank, block_size, travels)
        own = self.questions.own
        self.cos, self.sin = model.turn(self._tensor([row.position for row in own]))
        tables = [batch.chunks[row.chunk].block_table for row in own]
        self.blocks = self._tensor([table[row.position // block_size] // size for row, table in zip(own, tables)])
        self.offsets = self._tensor([row.position % block_size for row in own])
        self.going = self._tensor([place for places in self.questions.going for place in places])
        self.send = [len(places) for places in self.questions.going]
        self.recv = [len(rows) for rows in self.questions.coming]
        self.silent = not any(row.asks for row in self.questions.rows if not travels[row.chunk])
        self.local = self._readings([row.chunk for row in self.questions.asked],
                                    [row.position for row in self.questions.asked], rank, block_size)  # fmt: skip
        self.travelling = self._travelling(travels, block_size) if any(travels) else []
        self._config, self._element = model.config, model.dtype.itemsize
        self._sums = group.tensor.parts(len(own)) if group.tensor else 0
        self._read_cost = self._cost([(len(each.rows), each.seen) for each in self.local])

    def _cost(self, readings: Sequence[tuple[int, torch.Tensor]]) -> Cost:
        """Of so many queries that see these keys each: as `attention_cost`, for keys anywhere."""
        config, total = self._config, Cost()
        for rows, seen in readings:
            pairs, keys = int(seen.sum()), int(seen.any(0).sum())
            moved = 2 * keys * config.kv_heads * config.head_dim + 2 * rows * config.heads * config.head_dim
            total += Cost(4 * config.heads * config.head_dim * pairs, moved * self._element)
        return total

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: PagedCache) -> torch.Tensor:
        """As `model.attention.attention`: put K and V of the own rows into the cache, and attend, here and elsewhere."""
        config, rows, size = self._config, len(q), self._element
        hidden, queries = config.hidden_size, config.heads * config.head_dim
        self.group.spend(product_cost(rows, hidden, queries + 2 * config.kv_heads * config.head_dim, size))
        cache.write(layer, self.blocks, self.offsets, k, v)
        total = self._ask(layer, q, cache)
        self.group.spend(product_cost(rows, queries, hidden, size), self._sums)  # and what the rest of the layer takes:
        if config.is_sparse(layer):
            self.group.spend(experts_cost(config, rows, size), min(1, self._sums))
        else:
            self.group.spend(mlp_cost(rows, hidden, config.intermediate_size, size), self._sums)
        return total.finish().to(q.dtype)

    def answer(self, layer: int, cache: PagedCache) -> None:
        """Answer the others' queries, with none of its own."""
        self._ask(layer, torch.empty(0, *self.shape, dtype=self.dtype, device=self.device), cache)

    def _ask(self, layer: int, q: torch.Tensor, cache: PagedCache) -> Partial:
        """The own queries out, everybody's answered, answers back and merged; then round the ring."""
        own = len(q)
        if self.silent:
            total = self._read(q, layer, cache)
        else:
            came = self.group.move("queries", q[self.going], self.send, self.recv)
            said = self._read(torch.cat((q, came)), layer, cache).pack()
            back = self.group.move("answers", said[own:], self.recv, self.send)
            total = Partial.unpack(said[:own].clone())
            at = 0
            for places in self.questions.going:
                if places:
                    _merge(total, self._tensor(list(places)), Partial.unpack(back[at : at + len(places)]))
                    at += len(places)
        if self.travelling:
            self._round(q, layer, cache, total)
        return total

    def _read(self, q: torch.Tensor, layer: int, cache: PagedCache) -> Partial:
        """What the keys that lie here say to own and foreign queries."""
        total = Partial.nothing(q)
        self.group.spend(self._read_cost)
        for reading in self.local:
            keys, values = _flat(cache.keys[layer], reading.blocks), _flat(cache.values[layer], reading.blocks)
            _merge(total, reading.rows, partial_attention(q[reading.rows], keys, values, reading.seen))
        return total

    def _round(self, q: torch.Tensor, layer: int, cache: PagedCache, total: Partial) -> None:
        """Every rank's keys of the chunks that travel go once round the line; each rank attends to them as they pass."""
        comm = self.group.comm
        size, rank = comm.size, comm.rank
        here = self.travelling[rank]
        blocks, offsets = here.blocks, here.offsets
        passing = torch.stack((cache.keys[layer, blocks, :, offsets], cache.values[layer, blocks, :, offsets]), dim=1)
        for hop in range(1, size):
            whose = self.travelling[(rank - hop) % size]
            send, recv = [0] * size, [0] * size
            send[(rank + 1) % size], recv[(rank - 1) % size] = len(passing), whose.count
            passing = self.group.move("keys", passing, send, recv)  # [keys, 2, kv_heads, head_dim]
            self.group.spend(self._cost([(len(rows), seen) for rows, _, seen in whose.parts]))
            for rows, keys, seen in whose.parts:
                part = passing[keys].movedim(0, 2)  # [2, kv_heads, keys, head_dim]
                _merge(total, rows, partial_attention(q[rows], part[0], part[1], seen))

    def _readings(self, chunks: Sequence[int], positions: Sequence[int], rank: int, block_size: int) -> list[Reading]:
        """The queries at these positions of these chunks, with what a rank holds of their sequences."""
        found = []
        for number, chunk in enumerate(self.batch.chunks):
            held = Holding.of(chunk, self.group.comm.size, rank, block_size)
            rows = [row for row, each in enumerate(chunks) if each == number]
            if rows and held.blocks:
                keys = (
                    self._tensor(list(held.places))[:, None] * block_size + torch.arange(block_size, device=self.device)
                ).flatten()
                seen = keys <= self._tensor([positions[row] for row in rows])[:, None]
                found.append(Reading(self._tensor(rows), self._tensor(list(held.blocks)), seen))
        return found

    def _travelling(self, travels: Sequence[bool], block_size: int) -> list[Travelling]:
        """What each rank sends round, and how this rank's rows attend to it."""
        return [self._of_rank(rank, travels, block_size) for rank in range(self.group.comm.size)]

    def _of_rank(self, rank: int, travels: Sequence[bool], block_size: int) -> Travelling:
        blocks: list[int] = []
        offsets: list[int] = []
        parts = []
        for number, chunk in enumerate(self.batch.chunks):
            if not travels[number]:
                continue
            held = Holding.of(chunk, self.group.comm.size, rank, block_size)
            begin, positions = len(blocks), []
            for block, place in zip(held.blocks, held.places):
                for position in range(place * block_size, min(chunk.end, (place + 1) * block_size)):
                    blocks.append(block)
                    offsets.append(position % block_size)
                    positions.append(position)
            rows = [at for at, row in enumerate(self.questions.own) if row.chunk == number]
            if rows and positions:
                mine = self._tensor([self.questions.own[at].position for at in rows])
                parts.append((self._tensor(rows), slice(begin, len(blocks)), self._tensor(positions) <= mine[:, None]))
        return Travelling(self._tensor(blocks), self._tensor(offsets), len(blocks), parts)

    def _tensor(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


@dataclass(frozen=True)
class Travelling:
    """The keys that one rank sends round: where they lie on it, and for each chunk which of this rank's rows attend to which
    of them (rows, keys, who sees whom).
    """

    blocks: torch.Tensor
    offsets: torch.Tensor
    count: int
    parts: list[tuple[torch.Tensor, slice, torch.Tensor]]


def _flat(blocks: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """[all, kv_heads, block_size, head_dim] -> the chosen ones one after another, [kv_heads, keys, head_dim]."""
    return blocks[chosen].transpose(0, 1).flatten(1, 2)


def _merge(total: Partial, rows: torch.Tensor, part: Partial) -> None:
    """Merge what was said to some of the rows, in place."""
    merged = Partial(total.o[rows], total.m[rows], total.l[rows]).merge(part)
    total.o[rows], total.m[rows], total.l[rows] = merged.o, merged.m, merged.l
