"""Attention to keys that lie in several places: each place attends to its own, and what they say is merged.

This is DistAttention (Infinite-LLM, Lin et al. 2024, section 4.1), and the same merge as Flash-Decoding's over parts of one
device's cache and ring attention's over keys that travel. It is exact: a part is not divided by its sum yet, so parts may be
merged in any order. All of a place's keys are boiled down to head_dim + 2 numbers for each query and head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch


@dataclass(frozen=True)
class Partial:
    """What attention to some of the keys says to each query, with s = q k / √head_dim.

    `m` [tokens, heads] is the largest s, `l` [tokens, heads] is Σ exp(s − m), and `o` [tokens, heads, head_dim] is
    Σ exp(s − m) v, in float32 or float64. Where there are no keys, m is −∞, l and o are 0.
    """

    o: torch.Tensor
    m: torch.Tensor
    l: torch.Tensor  # noqa: E741  # the papers' letter

    @classmethod
    def nothing(cls, q: torch.Tensor) -> Partial:
        """No keys for queries [tokens, heads, head_dim]: it changes nothing that it is merged with."""
        o = torch.zeros_like(q, dtype=wide(q.dtype))
        return cls(o, torch.full_like(o[..., 0], -torch.inf), torch.zeros_like(o[..., 0]))

    def merge(self, other: Partial) -> Partial:
        """Attention to the keys of both: m = max(m₁, m₂); l and o are sums, each weighted with exp(its m − m)."""
        m = torch.maximum(self.m, other.m)
        finite = m.masked_fill(m == -torch.inf, 0.0)  # neither has a key: −∞ − −∞ would be no number
        mine, theirs = torch.exp(self.m - finite), torch.exp(other.m - finite)
        o = self.o * mine[..., None] + other.o * theirs[..., None]
        return Partial(o, m, self.l * mine + other.l * theirs)

    def finish(self) -> torch.Tensor:
        """softmax(s) v over all that was merged, o / l: [tokens, heads, head_dim]. No number where no key was seen."""
        return self.o / self.l[..., None]

    def pack(self) -> torch.Tensor:
        """One message [tokens, heads, head_dim + 2]."""
        return torch.cat((self.o, self.m[..., None], self.l[..., None]), dim=-1)

    @classmethod
    def unpack(cls, message: torch.Tensor) -> Partial:
        """What `pack` made."""
        return cls(message[..., :-2], message[..., -2], message[..., -1])


def partial_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor | None = None
) -> Partial:
    """Attend to some of the keys. q [tokens, heads, head_dim], keys and values [kv_heads, n, head_dim]; n may be 0.

    `seen` [tokens, n] says which keys each query may see; without it, all. Query head h uses KV head h · kv_heads // heads.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, length, _ = keys.shape
    if length == 0 or tokens == 0:
        return Partial.nothing(q)
    grouped = (q * head_dim**-0.5).view(tokens, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    scores = (grouped @ keys[:, None].transpose(-1, -2)).to(wide(q.dtype))  # [kv_heads, group, tokens, n]
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    m = scores.amax(-1)
    weights = torch.exp(scores - m.masked_fill(m == -torch.inf, 0.0)[..., None])
    o = weights.to(q.dtype) @ values[:, None]
    by_token = [each.flatten(0, 1).transpose(0, 1) for each in (o.to(scores.dtype), m, weights.sum(-1))]
    return Partial(*by_token)


def paged_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor, hidden: torch.Tensor
) -> Partial:
    """One query of each of several sequences, to keys that lie in blocks, at least one key each.

    q [sequences, heads, head_dim], keys and values [blocks of the pool, kv_heads, block_size, head_dim]. `blocks` has the same
    number for each sequence, one sequence after the other, any block where one has fewer; `hidden` [sequences, 1, keys] adds −∞ to
    what is no key of a sequence. The part comes divided by its sum: m is log Σ exp(s), and l is 1.
    """
    rows, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    near, far = (  # [kv_heads, sequences, keys, head_dim]
        pool.transpose(0, 1).index_select(1, blocks).view(kv_heads, rows, hidden.shape[-1], head_dim)
        for pool in (keys, values)
    )
    grouped = (q * head_dim**-0.5).view(rows, kv_heads, heads // kv_heads, head_dim).transpose(0, 1)
    scores = (grouped @ near.transpose(-1, -2)).to(wide(q.dtype)).add_(hidden)  # [kv_heads, sequences, group, keys]
    m = torch.logsumexp(scores, dim=-1).transpose(0, 1).reshape(rows, heads)
    o = (torch.softmax(scores, dim=-1).to(q.dtype) @ far).to(scores.dtype)
    return Partial(o.transpose(0, 1).reshape(rows, heads, head_dim), m, torch.ones_like(m))


def merge_all(parts: Iterable[Partial]) -> Partial:
    """Attention to the keys of all parts, of which there is at least one."""
    return reduce(Partial.merge, parts)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return dtype if dtype == torch.float64 else torch.float32
