"""Filling a decoder built on the meta device: each parameter is read from the checkpoint, whole or only its slice.

Which slice is asked of a function, so that this file knows nothing of layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from minillm.model.checkpoint import Tensors
from minillm.model.decoder import Decoder

Cut = Callable[[str, tuple[int, ...]], tuple[slice, ...]]
_IGNORED = "rotary_emb.inv_freq"  # old checkpoints store what `rope.py` computes


def whole(name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The cut of a model on one device: everything."""
    return ()


def checkpoint_name(name: str) -> str:
    """A decoder parameter's name in a Hugging Face checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def load_weights(
    model: Decoder, folder: Path, device: torch.device, dtype: torch.dtype, cut: Cut = whole, complete: bool = True
) -> int:
    """Give every parameter of `model` its values, on `device` in `dtype`; returns the bytes read.

    `cut(name, whole shape)` says which part of a tensor is this model's; the parameter's shape must be that part's.
    `complete` demands that the model uses every tensor of the checkpoint. Raises `ValueError` for a tensor that is
    missing, left over, or of another shape than config.json says.
    """
    tensors = Tensors(folder)
    used = set()
    for name, parameter in list(model.named_parameters()):  # tied weights come once
        source = checkpoint_name(name)
        part = cut(name, tensors.shape(source))
        values = tensors.read(source, part)
        if values.shape != parameter.shape:
            raise ValueError(
                f"{folder}: {source} is {list(values.shape)}, but config.json makes it {list(parameter.shape)}"
            )
        _assign(model, name, values.to(device=device, dtype=dtype, copy=True))  # a mapped file would be shared by ranks
        used.add(source)
    if model.config.tied_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
        used.add("lm_head.weight")
    extra = sorted(name for name in tensors.names - used if not name.endswith(_IGNORED))
    if extra and complete:
        raise ValueError(
            f"{folder} holds {extra[0]} ({len(extra)} such), which a {model.config.family} decoder does not use"
        )
    model.frequencies = model.frequencies.to(device)
    return tensors.bytes_read


def _assign(model: nn.Module, name: str, values: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path).register_parameter(leaf, nn.Parameter(values, requires_grad=False))
