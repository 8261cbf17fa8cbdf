"""The same layers as a pipeline of torch's and of ours, forward only, on the ranks that call these functions.

A micro-batch is one prompt. Both start from the same hidden states and end with those that leave the last layer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from minillm.kv.paged import PagedCache
from minillm.model.config_json import read_config
from minillm.parallel.layout import Layout
from minillm.parallel.loading import load_part
from minillm.parallel.mesh import DeviceMesh
from minillm.policy.batch import Batch, Chunk
from minillm.ranks.membership import context
from minillm.ranks.transfers import Transfer


class Layers(nn.Module):
    """A stage's layers for one prompt at a time: [1, tokens, hidden] -> [1, tokens, hidden]."""

    def __init__(self, model: nn.Module, cache: PagedCache, batch: Batch) -> None:
        super().__init__()
        self.model, self.cache, self.batch = model, cache, batch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.through(x[0], self.batch, self.cache)[None]


def set_up(folder: Path, layout: str, count: int, tokens: int) -> None:
    """Load this rank's stage and make the input, the same on every rank."""
    here, config = context(), read_config(folder)
    model = load_part(folder, DeviceMesh(Layout.parse(layout), here), torch.float32).model
    cache = PagedCache(model.config, 1, tokens, here.device, torch.float32)
    layers = Layers(model, cache, Batch((Chunk(0, 0, (1,) * tokens, (0,)),)))
    x = torch.randn(count, tokens, config.hidden_size, generator=torch.Generator().manual_seed(0))
    stage = PipelineStage(layers, here.rank, here.world_size, here.device)
    here.held["bench"] = layers, x, ScheduleGPipe(stage, count)


@torch.inference_mode(False)
@torch.no_grad()
def forward_torch() -> torch.Tensor | None:
    """torch.distributed.pipelining: what leaves the last stage, on the last rank."""
    here = context()
    _, x, schedule = here.held["bench"]
    return schedule.eval(x) if here.rank == 0 else schedule.eval()


@torch.inference_mode()
def forward_ours() -> torch.Tensor | None:
    """Messages that are received and sent while a stage computes."""
    here = context()
    layers, x, _ = here.held["bench"]
    comm, last = here.comm(), here.world_size - 1
    expect = lambda: comm.irecv(torch.empty_like(x[0]), here.rank - 1)  # noqa: E731
    coming = expect() if here.rank else None
    going: list[Transfer] = []
    results = []
    for number, part in enumerate(x):
        if coming is not None:
            part, coming = coming.wait(), expect() if number + 1 < len(x) else None
        out = layers(part[None])[0]
        if here.rank < last:
            going.append(comm.isend(out, here.rank + 1))
        else:
            results.append(out)
    for transfer in going:
        transfer.wait()
    return torch.stack(results) if results else None
