"""Filling a decoder built on the meta device: each parameter is read from the checkpoint, whole or only its slice.

Which slice is asked of a function, so that this file knows nothing of layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from minillm.model.checkpoint import Tensors
from minillm.model.config import ModelConfig
from minillm.model.decoder import Decoder
from minillm.model.linear import Linear

Cut = Callable[[str, tuple[int, ...]], tuple[slice, ...] | None]
_MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_MIXTRAL = {".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".down_proj.": ".w2.", ".up_proj.": ".w3."}
_IGNORED = "rotary_emb.inv_freq"  # old checkpoints store what `rope.py` computes


def whole(name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The cut of a model on one device: everything."""
    return ()


def checkpoint_names(name: str) -> list[str]:
    """The tensors of a Hugging Face checkpoint whose rows, one after the other, are a decoder's parameter."""
    name = name if name.startswith("lm_head.") else f"model.{name}"
    merged = next((module for module in _MERGED if f".{module}." in name), None)
    return [name.replace(merged, part) for part in _MERGED[merged]] if merged else [name]


def spelled(config: ModelConfig, name: str) -> str:
    """A tensor's name in a checkpoint of this family: Mixtral has words of its own for what others call alike."""
    if config.family == "mixtral" and ".mlp." in name:
        for ours, theirs in _MIXTRAL.items():
            name = name.replace(ours, theirs)
    return name


def as_checkpoint(model: Decoder) -> dict[str, torch.Tensor]:
    """The weights under a checkpoint's names; merged ones are cut again into views of their rows."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        names = [spelled(model.config, source) for source in checkpoint_names(name)]
        tensors.update(zip(names, parameter.split(part_rows(model, name, parameter))))
    return tensors


def part_rows(model: Decoder, name: str, parameter: torch.Tensor) -> list[int]:
    """The rows of a parameter that each of its checkpoint's tensors gives."""
    config = model.config
    if "qkv_proj" in name:
        return [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
    parts = len(checkpoint_names(name))
    return [parameter.shape[0] // parts] * parts


def load_weights(
    model: Decoder, folder: Path, device: torch.device, dtype: torch.dtype, cut: Cut = whole, complete: bool = True
) -> int:
    """Give every parameter of `model` its values, on `device` in `dtype`; returns the bytes read.

    `cut(name, whole shape)` says which part of a checkpoint's tensor is this model's (name without "model."); the
    parameter's shape must be those parts'.
    `complete` demands that the model uses every tensor of the checkpoint. Raises `ValueError` for a tensor that is
    missing, left over, or of another shape than config.json says.
    """
    tensors = Tensors(folder)
    used = set()
    for name, parameter in list(model.named_parameters()):  # tied weights come once
        sources = checkpoint_names(name)
        stored = [spelled(model.config, source) for source in sources]
        parts = [_read(tensors, source, at, cut) for source, at in zip(sources, stored)]
        for at, part, rows in zip(stored, parts, part_rows(model, name, parameter)):
            expected = [rows, *parameter.shape[1:]]
            if list(part.shape) != expected:
                raise ValueError(f"{folder}: {at} is {list(part.shape)}, but config.json makes it {expected}")
        values = torch.empty(parameter.shape, device=device, dtype=dtype)  # a mapped file would be shared by ranks
        torch.cat([part.to(device=device, dtype=dtype) for part in parts], out=values)
        _assign(model, name, values)
        used.update(stored)
    if model.config.tied_embeddings and isinstance(model.lm_head, Linear):
        model.lm_head.weight = model.embed_tokens.weight
        used.add("lm_head.weight")
    if complete:
        _refuse_extra(folder, model.config, tensors.names - used)
    model.frequencies = model.frequencies.to(device)
    return tensors.bytes_read


def check_names(config: ModelConfig, folder: Path) -> None:
    """Raise `ValueError` when a checkpoint has not exactly the tensors of such a model; no weights are read."""
    names = {spelled(config, name if name.startswith("lm_head.") else f"model.{name}") for name in config.tensors}
    tensors = Tensors(folder)
    for name in sorted(names):
        tensors.shape(name)
    _refuse_extra(folder, config, tensors.names - names - ({"lm_head.weight"} if config.tied_embeddings else set()))


def _refuse_extra(folder: Path, config: ModelConfig, names: set[str]) -> None:
    extra = sorted(name for name in names if not name.endswith(_IGNORED))
    if extra:
        raise ValueError(f"{folder} holds {extra[0]} ({len(extra)} such), which a {config.family} decoder does not use")


def _read(tensors: Tensors, source: str, stored: str, cut: Cut) -> torch.Tensor:
    part = cut(source.removeprefix("model."), tensors.shape(stored))
    assert part is not None, f"the model has a place for {source}, of which it holds nothing"
    return tensors.read(stored, part)


def _assign(model: nn.Module, name: str, values: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path).register_parameter(leaf, nn.Parameter(values, requires_grad=False))
