"""The KV cache's tensors: K and V in blocks, which sequences find by their block tables (Kwon et al. 2023, section 4.1).

Who holds which block is decided in `policy/blocks.py`; the cache knows no requests. One block as long as a sequence's
longest length, for each sequence, makes it the plain contiguous cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch

from minillm.model.config import ModelConfig


class PagedCache:
    """K and V: two tensors [layers, blocks, kv_heads, block_size, head_dim]."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.layers, num_blocks, config.kv_heads, block_size, config.head_dim)
        self.block_size = block_size
        self.keys, self.values = _zeros(shape, device, dtype), _zeros(shape, device, dtype)

    @property
    def bytes(self) -> int:
        """What the cache takes, used or not."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def block_bytes(self) -> int:
        """What one block takes in all layers."""
        return self.bytes // self.keys.shape[1]

    def write(
        self, layer: int, blocks: torch.Tensor, offsets: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Put K and V [tokens, kv_heads, head_dim] at `offsets` [tokens] within `blocks` [tokens]."""
        self.keys[layer, blocks, :, offsets] = keys
        self.values[layer, blocks, :, offsets] = values

    def read(self, layer: int, block_table: Sequence[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a sequence's first `length` positions, [kv_heads, length, head_dim] each."""
        return self._gather(self.keys[layer], block_table, length), self._gather(
            self.values[layer], block_table, length
        )

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to), in all layers."""
        if pairs:
            sources, targets = (list(side) for side in zip(*pairs))
            self.keys[:, targets] = self.keys[:, sources]
            self.values[:, targets] = self.values[:, sources]

    def _gather(self, blocks: torch.Tensor, block_table: Sequence[int], length: int) -> torch.Tensor:
        used = block_table[: -(-length // self.block_size)]
        if len(used) == 1:
            return blocks[used[0], :, :length]  # a view: nothing is copied
        whole = blocks[list(used)].transpose(0, 1)  # [kv_heads, blocks, block_size, head_dim]
        return whole.flatten(1, 2)[:, :length]


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, because unused room is multiplied by 0 and must be finite, as what earlier holders left in it must be.

    On a CPU they take memory only once written to.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    untouched = numpy.zeros(math.prod(shape) * dtype.itemsize, dtype=numpy.uint8)
    return torch.from_numpy(untouched).view(dtype).view(shape)
