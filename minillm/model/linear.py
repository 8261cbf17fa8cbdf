"""A linear layer, and a faster way to multiply a few rows on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

FEW_ROWS = 4


class Linear(nn.Linear):
    """y = x Wᵀ + b for x [rows, inputs], W [outputs, inputs].

    With `few_rows` on, up to four float32 rows on a CPU are computed as (W xᵀ)ᵀ: the BLAS then reads W once, near the
    speed of memory, where x Wᵀ reaches a third of it (`bench/decode.py`). It loses from six rows on, and is not used
    there.
    """

    few_rows = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.few_rows and x.shape[0] <= FEW_ROWS and x.device.type == "cpu" and x.dtype is torch.float32:
            return multiply_few(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def multiply_few(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, inputs], weight [outputs, inputs] -> [rows, outputs]. One row goes as two: a lone vector is read slower."""
    rows = x.shape[0]
    columns = torch.cat((x, x)) if rows == 1 else x
    out = (weight @ columns.t()).t()[:rows]
    return (out if bias is None else out + bias).contiguous()
