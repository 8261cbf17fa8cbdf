"""Moving experts between ranks while they serve, so that the next tokens find the load shared out better.

All ranks have counted the same choices, so that each works out the same new placement; what a rank lacks comes from one that
has it, in one all-to-all a layer. No token changes: a copy is the same expert. (DeepSeek does so every ten minutes or so.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from minillm.model.linear import pack
from minillm.model.mlp import MLP
from minillm.parallel.expert import ExpertGroup, ExpertParallelMLP
from minillm.policy.experts import Placement, place


def rebalance(model: nn.Module, group: ExpertGroup, redundant: int, given: Sequence[Placement] = ()) -> int:
    """Place the experts of every layer as `given` or, without, by what was chosen since the last time, with so many `redundant`
    copies in each, or a few more, so that all ranks have as many. All ranks of the group call it together. Returns the bytes
    that left this rank.
    """
    ranks, sent = group.comm.size, 0
    for mlp in [module for module in model.modules() if isinstance(module, ExpertParallelMLP)]:
        old, loads = group.placements[mlp.place], group.tally.pairs[mlp.place].tolist()
        slots = -(-(old.experts + redundant) // ranks) * ranks
        if given:
            sent += move(mlp, group, given[mlp.place])
        elif any(loads):
            sent += move(mlp, group, place(loads, ranks, slots))
    group.tally.clear()
    return sent


def move(mlp: ExpertParallelMLP, group: ExpertGroup, new: Placement) -> int:
    """Give every rank the experts of a layer that it has in a new placement. Returns the bytes that left this rank."""
    old, comm = group.placements[mlp.place], group.comm
    ways = moves(old, new)
    leaving = [expert for source, _, expert in ways if source == comm.rank]
    coming = [expert for _, to, expert in ways if to == comm.rank]
    some = mlp.gate.weight
    numbers = 3 * some.shape[1] * mlp.gate.moe.intermediate_size
    rows = [_numbers(mlp.experts[str(expert)]) for expert in leaving]  # type: ignore[arg-type]
    sent = torch.stack(rows) if rows else some.new_empty(0, numbers)
    splits = [[sum(source == a and to == b for source, to, _ in ways) for a, b in pairs] for pairs in (
        [(comm.rank, other) for other in range(comm.size)], [(other, comm.rank) for other in range(comm.size)]
    )]  # fmt: skip
    came = comm.all_to_all(sent, *splits)
    for expert, values in zip(coming, came):
        mlp.experts[str(expert)] = _expert(values, some.shape[1])
    for gone in set(map(int, mlp.experts)) - set(new.held(comm.rank)):
        del mlp.experts[str(gone)]
    pack(mlp.experts)
    group.placements[mlp.place] = new
    return sent.nbytes


def moves(old: Placement, new: Placement) -> list[tuple[int, int, int]]:
    """(from, to, expert) for everything that a rank has in the new placement and lacks in the old one, sorted. Who has an expert
    sends it to its share of those who lack it.
    """
    ways = []
    for expert in range(new.experts):
        have = sorted(set(old.copies[expert]))
        lack = [rank for rank in sorted(set(new.copies[expert])) if rank not in have]
        ways += [(have[number % len(have)], rank, expert) for number, rank in enumerate(lack)]
    return sorted(ways)


def _numbers(expert: MLP) -> torch.Tensor:
    """An expert's weights in one row."""
    weights = [linear.weight for linear in (expert.gate_up_proj, expert.down_proj)]
    return torch.cat([(weight.to_dense() if weight.is_mkldnn else weight).flatten() for weight in weights])


def _expert(values: torch.Tensor, hidden: int) -> MLP:
    """An expert of such a row."""
    wide = len(values) // (3 * hidden)
    with torch.device("meta"):
        expert = MLP(hidden, wide)
    gate_up, down = values.split((2 * wide * hidden, wide * hidden))
    expert.gate_up_proj.weight = nn.Parameter(gate_up.view(2 * wide, hidden).clone(), requires_grad=False)
    expert.down_proj.weight = nn.Parameter(down.view(hidden, wide).clone(), requires_grad=False)
    return expert
