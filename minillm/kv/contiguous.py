"""The simplest KV cache: every sequence owns a slot with room for its longest length, used or not.

Lesson 03 shows what this wastes. The cache knows nothing of requests.
"""

from __future__ import annotations

import torch

from minillm.model.config import ModelConfig


class ContiguousCache:
    """K and V of `slots` sequences of up to `length` tokens: two tensors [layers, slots, kv_heads, length, head_dim]."""

    def __init__(self, config: ModelConfig, slots: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.layers, slots, config.kv_heads, length, config.head_dim)
        self.keys = torch.zeros(
            shape, device=device, dtype=dtype
        )  # zeros: unused room is multiplied by 0, never by NaN
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def bytes(self) -> int:
        """What the cache takes, used or not."""
        return self.keys.nbytes + self.values.nbytes

    def append(
        self, layer: int, slot: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write K and V [tokens, kv_heads, head_dim] at `start`.

        Returns all of the sequence's, [kv_heads, end, head_dim] each.
        """
        end = start + keys.shape[0]
        self.keys[layer, slot, :, start:end] = keys.transpose(0, 1)
        self.values[layer, slot, :, start:end] = values.transpose(0, 1)
        return self.keys[layer, slot, :, :end], self.values[layer, slot, :, :end]
