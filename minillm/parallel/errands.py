"""What the launching process asks of the ranks of an instance besides serving: logits of a text, what experts were chosen, a new
placement. Functions here run on all ranks alike, by `Ranks.run`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from minillm.kv.paged import PagedCache
from minillm.model.decoder import Decoder
from minillm.model.moe import Tally
from minillm.parallel.context import ContextGroup
from minillm.parallel.member import member_of
from minillm.parallel.pipe import Pipe
from minillm.parallel.rebalance import rebalance
from minillm.policy.batch import Batch, Chunk
from minillm.policy.experts import Placement


def score(instance: str, token_ids: list[int]) -> torch.Tensor | None:
    """The logits after each token of a text [tokens, vocab], from the last stage; None from the others."""
    member = member_of(instance)
    model, pipe = member.model, member.pipe
    cache = PagedCache(model.config, 1, -(-len(token_ids) // pipe.spread), model.device, model.dtype)
    batch = Batch((Chunk(0, 0, tuple(token_ids), tuple(range(pipe.spread))),))
    with torch.inference_mode():
        if pipe.context is not None:
            return _score_with(pipe.context, pipe, model, batch, cache)
        if pipe.stage == 0:
            x = model.embed(batch)
        else:
            room = torch.empty(len(token_ids), model.config.hidden_size, dtype=model.dtype, device=model.device)
            x = pipe.hidden.recv(room, pipe.stage - 1)
        if pipe.experts is not None:
            replicas = pipe.experts.comm.size // pipe.experts.alike
            x = pipe.experts.through(model, x, batch, cache, [len(token_ids)] * replicas)  # all score the same text
        else:
            x = model.through(x, batch, cache)
        if pipe.stage == pipe.last:
            logits = model.logits(x, batch, every_row=True)
            return pipe.tensor.whole(logits) if pipe.tensor else logits
        pipe.hidden.send(x, pipe.stage + 1)
        return None


def _score_with(
    spread: ContextGroup, pipe: Pipe, model: Decoder, batch: Batch, cache: PagedCache
) -> torch.Tensor | None:
    """`score` where several ranks share the KV cache."""
    x, rows = None, len(spread.own(batch, cache.block_size))
    if pipe.stage > 0:
        room = torch.empty(rows, model.config.hidden_size, dtype=model.dtype, device=model.device)
        x = pipe.hidden.recv(room, pipe.stage - 1) if rows else room
    last = pipe.stage == pipe.last
    out = spread.forward(model, x, batch, cache, range(len(batch.token_ids)) if last else ())
    if last:
        return (pipe.tensor.whole(out) if pipe.tensor else out) if pipe.draws else None
    if rows:
        pipe.hidden.send(out, pipe.stage + 1)
    return None


def choices(instance: str, clear: bool) -> Tally | None:
    """What the tokens of this rank's stage have chosen; None from ranks that have counted the same as another one."""
    pipe, tally = member_of(instance).pipe, member_of(instance).tally
    told = copy.deepcopy(tally)
    if clear:
        tally.clear()
    return told if (pipe.experts.comm if pipe.experts else pipe.orders).rank == 0 else None


def place_experts(instance: str, placements: Sequence[Placement], redundant: int) -> tuple[tuple[Placement, ...], int]:
    """Place the experts of this rank's layers: as `placements` of all layers say or, without them, by what was chosen. Returns
    those of the stage, and the bytes that left this rank.
    """
    member = member_of(instance)
    group = member.pipe.experts
    assert group is not None
    sent = rebalance(member.model, group, redundant, group.of_stage(placements))
    return tuple(group.placements), sent
