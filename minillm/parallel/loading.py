"""A rank's part of a model: built, cut to what the layout gives it, and read from the checkpoint."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from minillm.model.checkpoint import fingerprint
from minillm.model.config_json import read_config
from minillm.model.decoder import Decoder
from minillm.model.linear import pack
from minillm.model.moe import Tally, count_choices
from minillm.model.weights import load_weights
from minillm.parallel.expert import ExpertGroup, apply_expert_parallel
from minillm.parallel.mesh import DeviceMesh
from minillm.parallel.pipeline import Elsewhere, cut_to_stage
from minillm.parallel.shards import Shard
from minillm.parallel.sharing import SharedWeights
from minillm.parallel.tensor import TensorGroup, apply_tensor_parallel
from minillm.parallel.wire import Wire
from minillm.ranks.comm import Comm

CARD_BYTES = 2048


@dataclass(frozen=True)
class Part:
    """What a rank holds of a model; `tensor` are the ranks that share its layers, None where it has them alone, and `experts` those
    that share its experts; `tally` counts what tokens choose. Of its bytes `bytes_read` came from the checkpoint, and `shared_bytes` lie in memory that it shares
    with other replicas.
    """

    model: Decoder
    tensor: TensorGroup | None
    experts: ExpertGroup | None
    tally: Tally
    bytes_read: int
    shared_bytes: int


def load_part(
    folder: Path, mesh: DeviceMesh, wire: Wire, dtype: torch.dtype, shared: SharedWeights | None = None
) -> Part:
    """The rank's part of a checkpoint, ready to compute. All ranks of a line along "tp", or "ep", call it together."""
    config = read_config(folder)
    shard = Shard(config, mesh.layout, mesh.rank)
    model = Decoder(config)
    cut_to_stage(model, shard)
    tensor = apply_tensor_parallel(model, mesh, wire) if mesh.size("tp") > 1 else None
    experts = apply_expert_parallel(model, mesh, shard, tensor, wire) if mesh.size("ep") > 1 else None
    passed = shared is not None and shared.filled and shared.passing
    bytes_read = 0 if passed else load_weights(model, folder, mesh.device, dtype, shard.cut, complete=False)
    if not shard.first_stage:
        model.embed_tokens = Elsewhere()  # type: ignore[assignment]  # of tied weights, the LM head has them now
    shared_bytes = 0
    if shared is not None and passed:
        shared_bytes = shared.take(model, mesh.rank, dtype)
    elif shared is not None:
        with suppress(OSError, RuntimeError):  # a sandbox may forbid it; then it keeps its own
            shared_bytes = (shared.join if shared.filled else shared.fill)(model, mesh.rank)
    pack(model)
    tally = experts.tally if experts else count_choices(model)
    return Part(model, tensor, experts, tally, bytes_read, shared_bytes)


def check_alike(comm: Comm, folder: Path, dtype: torch.dtype) -> None:
    """Raise `ValueError`, on all ranks, when some have another checkpoint or compute in another dtype."""
    card = {"mark": fingerprint(folder), "folder": str(folder), "dtype": str(dtype).removeprefix("torch.")}
    sent = torch.frombuffer(bytearray(json.dumps(card).encode().ljust(CARD_BYTES)), dtype=torch.uint8)
    cards = [json.loads(bytes(row.numpy())) for row in comm.all_gather(sent).view(comm.size, -1)]
    for rank, other in zip(comm.members, cards):
        if other["mark"] != cards[0]["mark"]:
            raise ValueError(
                f"rank {comm.members[0]} has the checkpoint {cards[0]['folder']}, rank {rank} another one, "
                f"{other['folder']}: give all ranks the same"
            )
        if other["dtype"] != cards[0]["dtype"]:
            raise ValueError(
                f"rank {comm.members[0]} computes in {cards[0]['dtype']}, rank {rank} in {other['dtype']}: "
                "give all ranks the same dtype"
            )
