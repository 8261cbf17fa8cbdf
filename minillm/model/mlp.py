"""The MLP of a decoder layer, which is also what each expert of a mixture is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from minillm.model.linear import Linear


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer, 2020), [tokens, hidden] -> [tokens, hidden] by way of `wide` numbers."""

    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden, 2 * wide, bias=False)
        self.down_proj = Linear(wide, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate).mul_(up))
