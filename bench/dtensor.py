"""The same decoder under torch's own tensor parallelism (`parallelize_module`, DTensor), on the ranks that call this.

Products that share an input are taken apart again, because DTensor cuts a weight evenly by rows or columns, and all products
are torch's; everything else is the course's own decoder. "ours" multiplies with packed weights, which is the engine's way;
"ours, plain" with torch's products too, so that the parallelism alone is compared. Heads and words must divide by the ranks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from minillm.kv.paged import PagedCache
from minillm.model.config_json import read_config
from minillm.model.decoder import Decoder
from minillm.model.linear import Linear
from minillm.model.weights import load_weights
from minillm.parallel.layout import Layout
from minillm.parallel.loading import load_part
from minillm.parallel.mesh import DeviceMesh
from minillm.policy.batch import Batch, Chunk
from minillm.ranks.membership import context


class Apart(nn.Module):
    """Products that share their input, one by one; the results side by side: [rows, all outputs]."""

    def __init__(self, weight: torch.Tensor, sizes: list[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        for part in weight.split(sizes):
            linear = nn.Linear(part.shape[1], part.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(part.clone(), requires_grad=False)
            self.parts.append(linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def plain(weight: torch.Tensor) -> nn.Linear:
    """A torch linear layer with this weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear


def load_dtensor(folder: Path) -> Decoder:
    """The whole checkpoint, then cut by `parallelize_module` over all ranks."""
    here, config = context(), read_config(folder)
    model = Decoder(config)
    load_weights(model, folder, here.device, torch.float32)
    queries, keys, ranks = config.heads * config.head_dim, config.kv_heads * config.head_dim, here.world_size
    mesh = init_device_mesh(here.device.type, (ranks,))
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.qkv_proj = Apart(attention.qkv_proj.weight, [queries, keys, keys])
        attention.o_proj, mlp.down_proj = plain(attention.o_proj.weight), plain(mlp.down_proj.weight)
        mlp.gate_up_proj = Apart(mlp.gate_up_proj.weight, [config.intermediate_size] * 2)
        attention.heads, attention.kv_heads = config.heads // ranks, config.kv_heads // ranks
    model.lm_head = plain(model.lm_head.weight)
    model.embed_tokens = nn.Embedding.from_pretrained(model.embed_tokens.weight.clone())
    plan = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "layers.*.self_attn.qkv_proj.parts.*": ColwiseParallel(),
        "layers.*.self_attn.o_proj": RowwiseParallel(),
        "layers.*.mlp.gate_up_proj.parts.*": ColwiseParallel(),
        "layers.*.mlp.down_proj": RowwiseParallel(),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    return model


def set_up(folder: Path, name: str, prompt: list[int], new: int) -> None:
    """Load, and keep under `name` ("dtensor", "ours", "ours, plain"): the model, how to choose the next token, and the work."""
    here, config = context(), read_config(folder)
    if name == "dtensor":
        model, kv_heads = load_dtensor(folder), config.kv_heads // here.world_size
        choose = lambda logits: int(logits.argmax())  # noqa: E731
    else:
        Linear.packed = name == "ours"
        part = load_part(folder, DeviceMesh(Layout(tp=here.world_size), here), torch.float32)
        for module in part.model.modules():
            if isinstance(module, Linear):
                module.few_rows = name == "ours"
        model, kv_heads = part.model, part.model.config.kv_heads
        choose = lambda logits: int(part.tensor.argmax(logits))  # noqa: E731
    here.held[name] = model, kv_heads, choose, prompt, new


@torch.inference_mode(False)
@torch.no_grad()
def generate(name: str) -> list[int]:
    """Greedy tokens of one prompt: a prefill, then a token a step."""
    from dataclasses import replace

    model, kv_heads, choose, tokens, new = context().held[name]
    config = replace(model.config, kv_heads=kv_heads)
    length = len(tokens) + new
    cache = PagedCache(config, 1, length, torch.device("cpu"), torch.float32)
    made: list[int] = []
    chunk = Chunk(0, 0, tuple(tokens), (0,))
    for step in range(new):
        batch = Batch((chunk,))
        made.append(choose(model.logits(model.through(model.embed(batch), batch, cache), batch)[0:1]))
        chunk = Chunk(0, len(tokens) + step, (made[-1],), (0,))
    return made
