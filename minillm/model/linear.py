"""A linear layer, and two faster ways to multiply a few rows on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

FEW_ROWS = 4


class Linear(nn.Linear):
    """y = x Wᵀ + b for x [rows, inputs], W [outputs, inputs].

    The BLAS behind `F.linear` rearranges W anew at every call, which takes longer than a product of up to a hundred rows.
    Two ways around it, for float32 on a CPU (`bench/decode.py` has the figures):

    `packed`: `pack()` lets oneDNN rearrange W once and keeps only that. Wins at every number of rows; `weight` is then
    opaque (`weight.to_dense()` gives it back). `few_rows`, for a weight that must stay plain because the embedding reads
    it too: up to four rows as (W xᵀ)ᵀ, which loses from six rows on; more by oneDNN, which rearranges at every call but
    faster than the BLAS.
    """

    packed = True
    few_rows = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x, self.bias)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ, and a bias if one is given."""
        if self.weight.is_mkldnn:
            return multiply_packed(x, self.weight, bias)
        if not (self.few_rows and self._on_cpu()):
            return F.linear(x, self.weight, bias)
        if x.shape[0] <= FEW_ROWS:
            return multiply_few(x, self.weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")

    def pack(self) -> None:
        """Keep the weight in oneDNN's own order from now on. Does nothing where that is switched off or not possible."""
        if self.can_pack:
            packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data)
            self.weight = nn.Parameter(packed, requires_grad=False)

    @property
    def can_pack(self) -> bool:
        """Whether it is switched on, and possible."""
        return self.packed and self._on_cpu()

    def _on_cpu(self) -> bool:
        """Whether oneDNN multiplies this weight: float32 on a CPU that it knows."""
        plain = self.weight
        return (
            not plain.is_mkldnn
            and plain.device.type == "cpu"
            and plain.dtype is torch.float32
            and torch.backends.mkldnn.is_available()
        )


def multiply_packed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, inputs], packed weight -> [rows, outputs]. One, two or three rows go as six: oneDNN is faster with six."""
    rows = x.shape[0]
    padded = torch.cat((x,) * (6 // rows)) if 0 < rows < 4 else x
    out = torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")
    return out[:rows] if rows < 4 else out


def multiply_few(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, inputs], weight [outputs, inputs] -> [rows, outputs]. One row goes as two: a lone vector is read slower."""
    rows = x.shape[0]
    columns = torch.cat((x, x)) if rows == 1 else x
    out = (weight @ columns.t()).t()[:rows]
    return (out if bias is None else out + bias).contiguous()


def pack(model: nn.Module) -> None:
    """Pack every `Linear` of a model, except one whose weight another module uses too (a tied LM head). A module that keeps the
    weights of its parts otherwise does so first (`Experts.arrange`).
    """
    for module in model.modules():
        if callable(arrange := getattr(module, "arrange", None)):
            arrange()
    for module in packable(model):
        module.pack()


def packable(model: nn.Module) -> list[Linear]:
    """The layers that `pack` packs."""
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    return [linear for linear in linears if users[id(linear.weight)] == 1 and linear.can_pack]
