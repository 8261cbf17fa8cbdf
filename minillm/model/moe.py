"""A mixture of experts in place of a layer's MLP: a router chooses a few experts for each token, and adds up what they say.

Nothing is dropped: an expert takes all tokens that chose it, as one product (Gale et al., 2022, "dropless"), however many
they are. `Experts` need not be all that there are: those that are here are computed for the rows that chose them. The file knows
nothing of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn

from minillm.model.config import ModelConfig, MoEConfig
from minillm.model.linear import Linear
from minillm.model.mlp import MLP

SMALL = 2**17  # numbers of an expert's first product
NOBODY = -1  # in place of an expert, where a pair is none, or not for here


@dataclass(frozen=True)
class Routing:
    """Where tokens go: `experts` [tokens, top_k], and by how much each counts, `weights` [tokens, top_k]."""

    experts: torch.Tensor
    weights: torch.Tensor


class Router(nn.Module):
    """Chooses experts by a linear layer. Raises `ValueError` when its scores are not numbers.

    Two orders: softmax over all experts, then the top k (Switch, Fedus et al. 2021; Qwen), divided by their sum or not; or
    the top k, then softmax over them (Mixtral, Jiang et al. 2024, section 2.1), which is the former with the division.
    """

    def __init__(self, hidden: int, moe: MoEConfig, layer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(moe.experts, hidden))
        self.moe, self.layer = moe, layer

    def forward(self, x: torch.Tensor) -> Routing:
        scores = F.linear(x, self.weight).float()  # [tokens, experts]
        if not self.moe.softmax_last:
            scores = scores.softmax(-1)
        weights, experts = scores.topk(self.moe.top_k)
        if self.moe.softmax_last:
            weights = weights.softmax(-1)
        elif self.moe.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        if torch.isnan(weights.sum()):
            token = int(weights.isnan().any(-1).nonzero()[0])
            raise ValueError(
                f"layer {self.layer}: the router's scores of row {token} are NaN: its weights, or what it got, are broken"
            )
        return Routing(experts, weights.to(x.dtype))


class Experts(nn.ModuleDict):
    """MLPs by their numbers, of `count` that there are; the others are elsewhere.

    Two ways to compute them. Large ones follow one another, each a product that oneDNN has packed for it (`Linear`). Small ones,
    for which starting a product takes longer than the product, are views of one `stack`, and go as one grouped product; so do
    all on a GPU in bfloat16. `bench/experts.py` has the figures.
    """

    stacks = True

    def __init__(self, count: int, experts: Mapping[str, nn.Module]) -> None:
        super().__init__(experts)
        self.count = count
        self.stack: tuple[torch.Tensor, ...] = ()
        self._slots: torch.Tensor | None = None  # of every expert among those here, after nobody's

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Each row's Σ weight · expert(row), over those of its experts that are here: [rows, hidden] -> the same.

        Pairs of (row, expert) are sorted by expert, so that each expert takes its rows as one product; what it says goes back to
        the pair's place, where a row's pairs are side by side.
        """
        rows, top_k = routing.experts.shape
        pairs = self.slots(x.device)[routing.experts.flatten() + 1]
        order = pairs.argsort(stable=True)
        counts = torch.bincount(pairs, minlength=len(self) + 1)[: len(self)].tolist()
        here = order[: sum(counts)]
        said = x.new_zeros(rows * top_k, x.shape[-1])
        said[here] = self._compute(x[here // top_k], counts)
        return (said.view(rows, top_k, x.shape[-1]) * routing.weights[:, :, None]).sum(1)

    def _compute(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Rows that are sorted by expert, `counts` for each."""
        if self.stack:
            ends, (gate_up, down) = (
                torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=x.device),
                self.stack,
            )
            gate, up = F.grouped_mm(x, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
            return F.grouped_mm(F.silu(gate).mul_(up), down.transpose(1, 2), offs=ends)
        parts = zip(self.values(), x.split(counts))
        said = [expert(part) for expert, part in parts if len(part)]
        return torch.cat(said) if said else x

    def slots(self, device: torch.device) -> torch.Tensor:
        """The place of each expert among those here, one past the last for those that are not; nobody's comes first."""
        if self._slots is None or self._slots.device != device:
            places = {name: place for place, name in enumerate(self)}
            self._slots = torch.tensor(
                [places.get(str(each), len(self)) for each in range(-1, self.count)], device=device
            )
        return self._slots

    def arrange(self) -> None:
        """Choose the way, once the weights are here, or others are here now."""
        self._slots, self.stack = None, ()
        products = [[getattr(expert, name) for expert in self.values()] for name in ("gate_up_proj", "down_proj")]
        if not self.stacks or not len(self) or not _go_in_a_stack(products[0][0].weight):
            return
        self.stack = tuple(torch.stack([linear.weight.data for linear in linears]) for linears in products)
        for linears, whole in zip(products, self.stack):
            for linear, mine in zip(linears, whole):
                linear.packed, linear.weight = False, nn.Parameter(mine, requires_grad=False)


def _go_in_a_stack(weight: torch.Tensor) -> bool:
    """Whether experts with such a first product [2 · wide, hidden] are faster together, and can be: in rows of whole 16 bytes."""
    wide, hidden = weight.shape[0] // 2, weight.shape[1]
    if (
        not hasattr(F, "grouped_mm")
        or weight.is_mkldnn
        or any(size * weight.element_size() % 16 for size in (wide, hidden))
    ):
        return False
    return weight.dtype is torch.bfloat16 if weight.device.type == "cuda" else weight.numel() <= SMALL


class SparseMLP(nn.Module):
    """The router, the experts by their numbers, and where the model has one a shared expert for every token.

    `combine` is what is still to be done with the result: nothing here; a sum over ranks where each has a slice.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        moe, hidden = config.moe, config.hidden_size
        assert moe is not None
        self.gate = Router(hidden, moe, layer)
        experts = {str(each): MLP(hidden, moe.intermediate_size) for each in range(moe.experts)}
        self.experts = Experts(moe.experts, experts)
        self.shared_expert = MLP(hidden, moe.shared_size) if moe.shared_size else None
        self.shared_expert_gate = Linear(hidden, 1, bias=False) if moe.shared_size else None
        self.combine: Callable[[torch.Tensor], torch.Tensor] = lambda out: out
        self.chosen: Callable[[torch.Tensor], None] | None = None  # is told the experts of each token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        routing = self.gate(x)
        if self.chosen is not None:
            self.chosen(routing.experts)
        return self.combine(self.add_shared(x, self.experts(x, routing)))

    def add_shared(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out`, and what the shared expert says of x, as far as its own gate lets it."""
        if self.shared_expert is None or self.shared_expert_gate is None:
            return out
        return out + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)


@dataclass
class Tally:
    """What tokens chose in each layer that has experts, since it was begun: `pairs` [layers, experts] of (token, expert); of these
    what each rank had to compute, `work` [layers, ranks]; and of these what the fullest rank had, step by step, `fullest`
    [layers]: a layer takes as long as that rank does.
    """

    pairs: torch.Tensor
    work: torch.Tensor
    fullest: torch.Tensor

    @classmethod
    def zero(cls, layers: int, experts: int, ranks: int = 1) -> Tally:
        """Nothing yet."""
        return cls(*(torch.zeros(*size, dtype=torch.int64) for size in ((layers, experts), (layers, ranks), (layers,))))

    def add(self, layer: int, experts: torch.Tensor, goes_to: torch.Tensor | None = None) -> None:
        """Pairs of a step, of any shape, and the ranks that they go to, if there are several; `NOBODY` is none."""
        present = experts >= 0
        self.pairs[layer] += torch.bincount(experts[present], minlength=self.pairs.shape[1]).cpu()
        where = torch.zeros_like(experts) if goes_to is None else goes_to
        work = torch.bincount(where[present], minlength=self.work.shape[1]).cpu()
        self.work[layer] += work
        self.fullest[layer] += work.max()

    def clear(self) -> None:
        """Begin anew."""
        for counts in vars(self).values():
            counts.zero_()

    @property
    def imbalance(self) -> float:
        """The fullest rank's pairs over the mean, over all layers and steps: 1 is as good as can be."""
        total = int(self.work.sum())
        return int(self.fullest.sum()) * self.work.shape[1] / total if total else 1.0

    def __add__(self, other: Tally) -> Tally:
        """Of other tokens through the same layers."""
        return Tally(self.pairs + other.pairs, self.work + other.work, self.fullest + other.fullest)


def count_choices(model: nn.Module) -> Tally:
    """A tally of all that the model's routers choose from now on."""
    sparse = [module for module in model.modules() if isinstance(module, SparseMLP)]
    tally = Tally.zero(len(sparse), sparse[0].gate.moe.experts if sparse else 0)
    for place, mlp in enumerate(sparse):
        mlp.chosen = partial(tally.add, place)
    return tally
