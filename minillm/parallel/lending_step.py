"""One forward pass of a rank whose sequences may have blocks at other instances: what it asks, what it reads itself, and the merge."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from minillm.distkv.attention import Partial
from minillm.distkv.lookup import Lookup
from minillm.kv.paged import PagedCache
from minillm.model.attention import Step, attention
from minillm.model.decoder import Decoder
from minillm.parallel.door import LinkLost, recv_tensor, say, send_tensor
from minillm.parallel.links import Link, Links
from minillm.policy.batch import Batch, Chunk


class LendingStep:
    """What all layers of one forward pass share when some sequences have blocks elsewhere."""

    def __init__(self, links: Links, model: Decoder, batch: Batch, cache: PagedCache, bad: set[int]) -> None:
        device, size = model.device, cache.block_size
        begins = [end - len(chunk.token_ids) for chunk, end in zip(batch.chunks, batch.ends)]
        asking = any(
            chunk.away for chunk in batch.chunks
        )  # then single tokens are read together, wherever their blocks are
        far = [n for n, chunk in enumerate(batch.chunks) if chunk.away or (asking and len(chunk.token_ids) == 1)]
        near = [n for n in range(len(batch.chunks)) if n not in set(far)]
        self.cos, self.sin = model.turn(torch.tensor(batch.positions, device=device))
        self.heads, self.sent, self.device = model.config.heads, 0, device
        rows = lambda some: [begins[n] + at for n in some for at in range(len(batch.chunks[n].token_ids))]  # noqa: E731
        self.near, self.far = (torch.tensor(rows(some), dtype=torch.int64, device=device) for some in (near, far))
        self.spoiled = torch.tensor(
            rows([n for n, chunk in enumerate(batch.chunks) if bad & set(chunk.block_table)]),
            dtype=torch.int64,
            device=device,
        )
        self.plain = None
        if near:
            only = Batch(tuple(batch.chunks[n] for n in near))
            self.plain = Step.of(only, size, self.cos[self.near], self.sin[self.near], model.reference_attention)
        chunks = [batch.chunks[n] for n in far]
        places = [(c.block_table[at // size], at % size) for c in chunks for at in range(c.start, c.end)]
        self.blocks, self.offsets = torch.tensor(places, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
        self.local = _reading(chunks, size, device) if far else None
        self.asked = [
            Asked(links.to(creditor), creditor, chunks, model.config.layers, self.heads, device)
            for creditor in creditors_of(chunks)
        ]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: PagedCache) -> torch.Tensor:
        """Put K and V into the cache and attend: queries go out, the rank reads what it has, and the answers are merged."""
        k, v = torch.nan_to_num(k), torch.nan_to_num(v)  # of lost rows; later holders of a block must find numbers
        if self.local is None and self.plain is not None:
            return _spoil(attention(layer, q, k, v, self.plain, cache), self.spoiled)
        cache.write(layer, self.blocks, self.offsets, k[self.far], v[self.far])
        asking = q[self.far]
        for each in self.asked:
            self.sent += each.send(asking)
        out = torch.empty_like(q)
        if self.plain is not None:
            out[self.near] = attention(layer, q[self.near], k[self.near], v[self.near], self.plain, cache)
        assert self.local is not None
        total = self.local.attend(asking, cache.keys[layer], cache.values[layer])
        for each in self.asked:
            each.merge(total)
        out[self.far] = total.finish().to(q.dtype)
        return _spoil(out, self.spoiled)


class Asked:
    """What one creditor is asked in a step: all queries of the sequences that have blocks there."""

    def __init__(
        self, link: Link, creditor: int, chunks: Sequence[Chunk], layers: int, heads: int, device: torch.device
    ) -> None:
        self.link, self.heads, self.said, self.layers = link, heads, False, layers
        at = 0
        places: list[int] = []
        self.rows: list[int] = []
        self.blocks: list[list[int]] = []
        for chunk in chunks:
            count = len(chunk.token_ids)
            blocks = [block for each in chunk.away if each.creditor == creditor for block in each.blocks]
            if blocks:
                places += range(at, at + count)
                self.rows.append(count)
                self.blocks.append(blocks)
            at += count
        self.places = torch.tensor(places, dtype=torch.int64, device=device)

    def send(self, q: torch.Tensor) -> int:
        """Send the queries of a layer, before those of the first which blocks they are for; returns their bytes."""
        with suppress(LinkLost), self.link.guarded():
            wire = self.link.use()
            if not self.said:
                say(wire, "step", rows=self.rows, blocks=self.blocks, heads=self.heads, layers=self.layers)
                self.said = True
            sent = send_tensor(wire, q[self.places])
            self.link.traffic.queries += sent
            return sent
        return 0

    def merge(self, total: Partial) -> None:
        """Take the answers into what is known; without answers it is no number any more."""
        shape = (len(self.places), self.heads, total.o.shape[-1] + 2)  # o, m and l
        try:
            with self.link.guarded():
                came = recv_tensor(self.link.use(), shape, total.o.dtype, total.o.device)
        except LinkLost:
            total.o[self.places] = torch.nan
            return
        self.link.traffic.answers += came.nbytes
        merged = Partial(total.o[self.places], total.m[self.places], total.l[self.places]).merge(Partial.unpack(came))
        total.o[self.places], total.m[self.places], total.l[self.places] = merged.o, merged.m, merged.l


def _spoil(out: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if len(rows):
        out[rows] = torch.nan
    return out


def creditors_of(chunks: Sequence[Chunk]) -> list[int]:
    """Who has blocks of these sequences."""
    return sorted({away.creditor for chunk in chunks for away in chunk.away})


def _reading(chunks: Sequence[Chunk], block_size: int, device: torch.device) -> Lookup:
    """How these chunks find what is here of their sequences."""
    away = [sum(len(each.blocks) for each in chunk.away) for chunk in chunks]
    here = [chunk.block_table[gone : -(-chunk.end // block_size)] for chunk, gone in zip(chunks, away)]
    starts = [chunk.start - gone * block_size for chunk, gone in zip(chunks, away)]
    return Lookup.of([len(chunk.token_ids) for chunk in chunks], here, block_size, device, starts)
