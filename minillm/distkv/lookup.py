"""What the blocks on one rank say to the queries of a step: partial attention over a paged cache, for several sequences at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minillm.distkv.attention import Partial, paged_attention, partial_attention


@dataclass(frozen=True)
class Lookup:
    """How the queries of a step find the blocks of their sequences on this rank: single tokens all at once, the `singles`, and parts
    of prompts one by one.
    """

    singles: torch.Tensor
    blocks: torch.Tensor
    hidden: torch.Tensor
    prompts: list[tuple[slice, torch.Tensor, torch.Tensor | None]]

    @classmethod
    def of(
        cls,
        rows: Sequence[int],
        blocks: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device,
        starts: Sequence[int] = (),
    ) -> Lookup:
        """`rows` of each sequence and its blocks, in order. With `starts`, the first query's place among the keys; else all are seen."""
        begins = [sum(rows[:n]) for n in range(len(rows))]
        alone = [n for n, asking in enumerate(rows) if asking == 1]
        most = max((len(blocks[n]) for n in alone), default=0)
        tables = [[*blocks[n], *[0] * (most - len(blocks[n]))] for n in alone]
        lengths = [starts[n] + 1 if starts else len(blocks[n]) * block_size for n in alone]
        prompts = []
        for n, asking in enumerate(rows):
            if asking == 1:
                continue
            seen = None
            if starts:
                places = torch.arange(len(blocks[n]) * block_size, device=device)
                seen = places <= torch.arange(starts[n], starts[n] + asking, device=device)[:, None]
            prompts.append((slice(begins[n], begins[n] + asking), torch.tensor(blocks[n], device=device), seen))
        past = torch.arange(most * block_size) >= torch.tensor(lengths, dtype=torch.int64)[:, None]
        return cls(
            torch.tensor([begins[n] for n in alone], dtype=torch.int64, device=device),
            torch.tensor(tables, dtype=torch.int64, device=device).flatten(),
            torch.zeros(past.shape).masked_fill_(past, -torch.inf)[:, None].to(device),
            prompts,
        )

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Partial:
        """What the blocks of a layer say to the queries [rows, heads, head_dim]."""
        if not self.prompts:
            return paged_attention(q, keys, values, self.blocks, self.hidden)
        total = Partial.nothing(q)
        if len(self.singles):
            part = paged_attention(q[self.singles], keys, values, self.blocks, self.hidden)
            total.o[self.singles], total.m[self.singles], total.l[self.singles] = part.o, part.m, part.l
        for rows, blocks, seen in self.prompts:
            flat = [pool[blocks].transpose(0, 1).flatten(1, 2) for pool in (keys, values)]
            part = partial_attention(q[rows], flat[0], flat[1], seen)
            total.o[rows], total.m[rows], total.l[rows] = part.o, part.m, part.l
        return total
