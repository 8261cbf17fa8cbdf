"""A mixture of experts made of a dense model: every expert is a copy of its layer's MLP (sparse upcycling, Komatsuzaki et al. 2022).

Since a token's weights sum to 1, any routing gives the dense model's text, until the experts are trained apart. So whatever goes
wrong between ranks that share them shows as another text. The copies take no room on disk: they are other names of the same
tensors (`aliases.json`, which `checkpoint.Tensors` reads).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from minillm.model.config_json import read_config, read_json
from minillm.model.embedded import cache_folder, embedded_folder

_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def upcycled_folder(experts: int = 4, top_k: int = 2, seed: int = 0) -> Path:
    """The embedded model with so many experts a layer, of which a random router chooses `top_k`; made at first use."""
    folder = cache_folder() / f"{embedded_folder().name}-{experts}-experts-top-{top_k}-seed-{seed}"
    if not folder.exists():
        upcycle(embedded_folder(), folder, experts, top_k, seed)
    return folder


def upcycle(source: Path, folder: Path, experts: int, top_k: int = 2, seed: int = 0) -> None:
    """Write a Mixtral checkpoint in `folder` whose experts are the MLPs of `source`, a Llama checkpoint in one file.

    Raises `ValueError` for another kind of model, and for more experts a token than there are.
    """
    config = read_config(source)
    if config.family != "llama" or not (source / "model.safetensors").exists():
        raise ValueError(f"{source} is no Llama checkpoint in one file: only such a one can be upcycled")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k} of {experts} experts: give a number from 1 to {experts}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            if (source / name).exists():
                shutil.copy(source / name, scratch / name)
        changes = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
        sizes = {"num_local_experts": experts, "num_experts_per_tok": top_k, "sliding_window": None}
        values = read_json(source / "config.json") | changes | sizes
        (scratch / "config.json").write_text(json.dumps(values, indent=1) + "\n")
        generator = torch.Generator().manual_seed(seed)
        layers = [f"model.layers.{layer}" for layer in range(config.layers)]
        routers = {
            f"{layer}.block_sparse_moe.gate.weight": torch.randn(experts, config.hidden_size, generator=generator) / config.hidden_size**0.5
            for layer in layers
        }  # fmt: skip
        save_file(routers, scratch / "model.safetensors", metadata={"format": "pt"})
        copies = {
            f"{layer}.block_sparse_moe.experts.{expert}.{theirs}.weight": f"{layer}.mlp.{ours}.weight"
            for layer in layers for expert in range(experts) for theirs, ours in _PARTS.items()
        }  # fmt: skip
        same = [name for name in config.tensors if ".mlp." not in name]
        stored = [name if name.startswith("lm_head.") else f"model.{name}" for name in same]
        place = os.path.relpath(source / "model.safetensors", folder)
        aliases = {"file": place, "names": dict(zip(stored, stored)) | copies}
        (scratch / "aliases.json").write_text(json.dumps(aliases) + "\n")
        scratch.chmod(0o755)
        scratch.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster, and its folder is as good
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
