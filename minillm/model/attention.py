"""Attention over the paged cache, for prompts and single tokens mixed in one batch, without padding.

Two paths give the same numbers up to rounding. `reference` reads each sequence's blocks into one piece and writes the
formula out; it is for every device. The fast path leaves the blocks of single tokens where they are: each block is
attended to by itself, and the parts are merged by their log-sum-exp (Flash-Decoding; the DistAttention of Infinite-LLM,
section 4.1, on one device); prompts go through torch's fused attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minillm.kv.paged import PagedCache
from minillm.policy.batch import Batch, Chunk


@dataclass(frozen=True)
class Parts:
    """The blocks that the single tokens of a batch attend to, `rows` of the batch asking.

    `blocks` are consecutive ones, read in place (a slice), or any (a tensor). For each: `owner` is the place in `rows`
    of the token that attends to it, or one past the last for nobody; `hidden` [blocks, 1, 1, width] adds -inf to
    positions past the sequence's end. `table` [rows, most blocks] finds a sequence's blocks among them, with `absent`
    where it has no more.
    """

    rows: torch.Tensor
    blocks: slice | torch.Tensor
    owner: torch.Tensor
    hidden: torch.Tensor
    table: torch.Tensor
    absent: torch.Tensor

    @classmethod
    def of(cls, rows: list[int], chunks: list[Chunk], block_size: int, device: torch.device) -> Parts:
        """Lay out the blocks of chunks of one token each, which stand at `rows` of the batch."""
        counts = [-(-chunk.end // block_size) for chunk in chunks]
        blocks = [block for chunk, count in zip(chunks, counts) for block in chunk.block_table[:count]]
        first, span = min(blocks), max(blocks) + 1 - min(blocks)
        in_place = len(set(blocks)) == len(blocks) and 2 * len(blocks) >= span
        places = [block - first for block in blocks] if in_place else list(range(len(blocks)))
        nobody = len(chunks)
        owner = [nobody] * (span if in_place else len(blocks))  # gaps are blocks of others
        filled = [block_size] * len(owner)
        table, at = [], 0
        for asking, (chunk, count) in enumerate(zip(chunks, counts)):
            mine = places[at : at + count]
            for place in mine:
                owner[place] = asking
            filled[mine[-1]] = chunk.end - (count - 1) * block_size
            table.append(mine + [0] * (max(counts) - count))
            at += count
        width = torch.arange(max(filled[place] for place in places))
        past = (width >= torch.tensor(filled)[:, None])[:, None, None]
        absent = (torch.arange(max(counts)) >= torch.tensor(counts)[:, None])[:, :, None, None]
        return cls(
            torch.tensor(rows, device=device),
            slice(first, first + span) if in_place else torch.tensor(blocks, device=device),
            torch.tensor(owner, device=device),
            torch.zeros(past.shape).masked_fill_(past, -torch.inf).to(device),
            torch.tensor(table, device=device),
            absent.to(device),
        )


@dataclass(frozen=True)
class Step:
    """What all layers of one forward pass share, made once from the batch.

    `cos` and `sin` [tokens, 1, head_dim] turn queries and keys; `blocks` and `offsets` [tokens] say where each token's K
    and V go. `prompts` are (first row, chunk) to attend sequence by sequence; the single tokens are in `parts`.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    prompts: list[tuple[int, Chunk]]
    parts: Parts | None
    reference: bool

    @classmethod
    def of(cls, batch: Batch, block_size: int, cos: torch.Tensor, sin: torch.Tensor, reference: bool) -> Step:
        """Read the batch; nothing here depends on a tensor's values."""
        places = [(chunk.block_table[at // block_size], at % block_size)
                  for chunk in batch.chunks for at in range(chunk.start, chunk.end)]  # fmt: skip
        blocks, offsets = torch.tensor(places, device=cos.device).unbind(1)
        begins = [end - len(chunk.token_ids) for chunk, end in zip(batch.chunks, batch.ends)]
        singles = [] if reference else [n for n, chunk in enumerate(batch.chunks) if len(chunk.token_ids) == 1]
        if len(singles) == 1:
            singles = []
        prompts = [(begins[n], chunk) for n, chunk in enumerate(batch.chunks) if n not in set(singles)]
        parts = None
        if singles:
            rows, chunks = [begins[n] for n in singles], [batch.chunks[n] for n in singles]
            parts = Parts.of(rows, chunks, block_size, cos.device)
        return cls(cos, sin, blocks, offsets, prompts, parts, reference)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: PagedCache) -> torch.Tensor:
        """`attention`, by this step."""
        return attention(layer, q, k, v, self, cache)


def attention(
    layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, cache: PagedCache
) -> torch.Tensor:
    """Put K and V into the cache and attend. q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]."""
    cache.write(layer, step.blocks, step.offsets, k, v)
    if step.parts is not None and not step.prompts:
        return attend_parts(q, cache.keys[layer], cache.values[layer], step.parts)
    out = torch.empty_like(q)
    if step.parts is not None:
        rows = step.parts.rows
        out[rows] = attend_parts(q[rows], cache.keys[layer], cache.values[layer], step.parts)
    for begin, chunk in step.prompts:  # each sequence attends to itself alone
        mine = slice(begin, begin + len(chunk.token_ids))
        if chunk.start == 0:
            keys, values = k[mine].transpose(0, 1), v[mine].transpose(0, 1)
        else:
            keys, values = cache.read(layer, chunk.block_table, chunk.end)
        out[mine] = (attend_by_formula if step.reference else attend)(q[mine], keys, values, chunk.start)
    return out


def attend_by_formula(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
    """softmax(q kᵀ / √d) v for the tokens of one sequence from position `start` on. Token i sees positions 0 … start + i.

    q [tokens, heads, head_dim], keys and values [kv_heads, start + tokens, head_dim] -> [tokens, heads, head_dim].
    """
    tokens, heads, head_dim = q.shape
    kv_heads, length, _ = keys.shape
    grouped = q.view(tokens, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)  # [kv_heads, group, tokens, …]
    scores = grouped @ keys[:, None].transpose(-1, -2) / head_dim**0.5  # [kv_heads, group, tokens, length]
    future = torch.arange(length, device=q.device) > torch.arange(start, length, device=q.device)[:, None]
    weights = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ values[:, None]).permute(2, 0, 1, 3).reshape(tokens, heads, head_dim)


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
    """The same by torch's fused attention; a single token by two products with the query heads of a group as rows."""
    tokens, heads, head_dim = q.shape
    kv_heads, length, _ = keys.shape
    if tokens == 1:
        scores = (q.view(kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5) @ keys.transpose(-1, -2)
        return (torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ values).view(1, heads, head_dim)
    mask = None
    if start > 0:
        mask = torch.arange(length, device=q.device) <= torch.arange(start, length, device=q.device)[:, None]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=heads != kv_heads,
    )
    return out[0].transpose(0, 1)


def attend_parts(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, parts: Parts) -> torch.Tensor:
    """The same for one token of each of several sequences, block by block where the blocks lie.

    q [rows, heads, head_dim], keys and values [blocks of the pool, kv_heads, block_size, head_dim].
    A block's part is o = softmax(s) v with weight exp(lse), lse = log Σ exp(s); the parts' weights are made to sum to 1.
    """
    rows, heads, head_dim = q.shape
    kv_heads, width = keys.shape[1], parts.hidden.shape[-1]
    keys, values = keys[parts.blocks, :, :width], values[parts.blocks, :, :width]
    asking = F.pad(q * head_dim**-0.5, (0, 0, 0, 0, 0, 1)).view(rows + 1, kv_heads, heads // kv_heads, head_dim)
    scores = asking.index_select(0, parts.owner) @ keys.transpose(-1, -2)  # [blocks, kv_heads, group, width]
    scores = scores.float().add_(parts.hidden)
    lse = torch.logsumexp(scores, dim=-1)  # [blocks, kv_heads, group]
    shares = lse[parts.table].masked_fill_(parts.absent, -torch.inf).softmax(1)  # [rows, most blocks, kv_heads, group]
    weights = torch.zeros_like(lse).index_put_((parts.table,), shares, accumulate=True)
    out = torch.softmax(scores, dim=-1).mul_(weights[..., None]).to(q.dtype) @ values
    return asking.zero_().index_add_(0, parts.owner, out)[:rows].view(rows, heads, head_dim)
