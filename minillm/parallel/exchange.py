"""Who sends which tokens to whom in a layer whose experts lie on several ranks, worked out from what everybody chose.

Every rank works it out for itself and finds the same. Nothing is sent here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minillm.model.moe import NOBODY, Routing
from minillm.policy.experts import Placement


@dataclass(frozen=True)
class Exchange:
    """What one rank sends and gets in a layer: which of its `rows` go out, rank by rank, `send_rows` to each; it gets `recv_rows`
    from each, and computes for them what `routing` says.
    """

    rows: torch.Tensor
    send_rows: list[int]
    recv_rows: list[int]
    routing: Routing


def destinations(experts: torch.Tensor, placement: Placement) -> torch.Tensor:
    """The rank that each pair of (token, expert) goes to, in the shape of `experts`; -1 where that is -1, no pair.

    Copies of an expert take the pairs that chose it in turns.
    """
    most = max(map(len, placement.copies))
    table = torch.tensor([(copies * most)[:most] for copies in placement.copies], device=experts.device)
    pairs = experts.flatten()
    known = pairs.clamp(min=0)
    turn = torch.zeros_like(known)
    if most > 1:
        count = torch.tensor([len(copies) for copies in placement.copies], device=experts.device)
        order = known.masked_fill(pairs < 0, len(placement.copies)).argsort(stable=True)
        chosen = torch.bincount(known[pairs >= 0], minlength=len(count))
        begins = (chosen.cumsum(0) - chosen)[known]
        turn[order] = torch.arange(len(pairs), device=experts.device)
        turn = (turn - begins) % count[known]
    return table[known, turn].masked_fill(pairs < 0, -1).view_as(experts)


def plan_exchange(everyone: Routing, goes_to: torch.Tensor, rank: int) -> Exchange:
    """A rank's exchange, from what everybody chose and where it goes (`destinations`), all [ranks, most rows, top_k] with -1
    (`NOBODY`) past the last row of a rank. All ranks find the same, each its own side of it.
    """
    ranks = torch.arange(len(goes_to), device=goes_to.device)
    goes = (goes_to[..., None] == ranks).any(
        -2
    )  # [ranks, most rows, ranks]: once to each, however many experts are there
    leaving = goes[rank].t().nonzero()[:, 1]
    source, row = goes[:, :, rank].nonzero(as_tuple=True)
    elsewhere = goes_to[source, row] != rank
    experts = everyone.experts[source, row].masked_fill(elsewhere, NOBODY)
    weights = everyone.weights[source, row].masked_fill(elsewhere, 0.0)
    counts = torch.stack((goes[rank].sum(0), goes[:, :, rank].sum(1))).tolist()
    return Exchange(leaving, counts[0], counts[1], Routing(experts, weights))
