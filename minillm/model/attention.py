"""Attention over the cache: a prompt's tokens sequence by sequence, the single tokens of a decode step all at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minillm.kv.contiguous import ContiguousCache
from minillm.model.batch import Batch


@dataclass(frozen=True)
class Step:
    """What all layers of one forward pass share, made once from the batch.

    `cos` and `sin` [tokens, 1, head_dim] turn queries and keys; for a pure decode step `slots` and `positions`
    [sequences] say where each token's K and V go, and `hidden` [slots, 1, 1, longest] which cached positions are not
    its sequence's.
    """

    batch: Batch
    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, cos: torch.Tensor, sin: torch.Tensor) -> Step:
        """Read the batch; nothing here depends on a tensor's values."""
        if any(len(chunk.token_ids) > 1 for chunk in batch.chunks) or len(batch.chunks) == 1:
            return cls(batch, cos, sin)
        slots = torch.tensor([chunk.slot for chunk in batch.chunks], device=cos.device)
        positions = torch.tensor([chunk.start for chunk in batch.chunks], device=cos.device)
        rows = max(chunk.slot for chunk in batch.chunks) + 1
        lengths = torch.zeros(rows, dtype=torch.long, device=cos.device)
        lengths[slots] = positions + 1
        longest = max(chunk.end for chunk in batch.chunks)
        hidden = torch.arange(longest, device=cos.device) >= lengths.clamp_min(1)[:, None]
        return cls(batch, cos, sin, slots, positions, hidden[:, None, None])


def attention(
    layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, cache: ContiguousCache
) -> torch.Tensor:
    """Put K and V into the cache and attend. q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]."""
    if step.slots is not None:
        return _decode(layer, q, k, v, step, cache)
    out = torch.empty_like(q)
    begin = 0
    for chunk, end in zip(step.batch.chunks, step.batch.ends):  # each sequence attends to itself alone
        keys, values = cache.append(layer, chunk.slot, chunk.start, k[begin:end], v[begin:end])
        out[begin:end] = attend(q[begin:end], keys, values, chunk.start)
        begin = end
    return out


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
    """softmax(q kᵀ / √d) v for the tokens of one sequence from position `start` on.

    q [tokens, heads, head_dim], keys and values [kv_heads, start + tokens, head_dim] -> [tokens, heads, head_dim].
    Token i sees positions 0 … start + i.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, length, _ = keys.shape
    if tokens == 1:
        return _softmax_of(q.view(kv_heads, heads // kv_heads, head_dim), keys, values).view(1, heads, head_dim)
    mask = None
    if start > 0:
        row = torch.arange(start, length, device=q.device)[:, None]
        mask = torch.arange(length, device=q.device)[None, :] <= row  # [tokens, length]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=heads != kv_heads,
    )
    return out[0].transpose(0, 1)


def _softmax_of(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """The query heads of a group are the rows of one small product: q […, kv_heads, group, head_dim]."""
    scores = (q * q.shape[-1] ** -0.5) @ keys.transpose(-1, -2)  # […, kv_heads, group, length]
    if hidden is not None:
        scores = scores.masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ values


def _decode(
    layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, cache: ContiguousCache
) -> torch.Tensor:
    """One token of each of several sequences: one product over all slots, as long as the longest."""
    assert step.hidden is not None
    rows, _, _, longest = step.hidden.shape
    _, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    keys, values = cache.keys[layer, :rows], cache.values[layer, :rows]  # [slots, kv_heads, room, head_dim]
    keys[step.slots, :, step.positions] = k
    values[step.slots, :, step.positions] = v
    grouped = q.new_zeros(rows, kv_heads, heads // kv_heads, head_dim)  # slots that are free ask nothing
    grouped[step.slots] = q.view(-1, kv_heads, heads // kv_heads, head_dim)
    out = _softmax_of(grouped, keys[:, :, :longest], values[:, :, :longest], step.hidden)
    return out[step.slots].view(-1, heads, head_dim)
