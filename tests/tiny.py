"""A tiny random checkpoint with a byte tokenizer, written without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minillm.model.config_json import parse_config
from minillm.model.decoder import Decoder
from minillm.model.weights import as_checkpoint

CONFIG = {
    "model_type": "llama", "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 256,
}  # fmt: skip


def make_checkpoint(folder: Path, **changes: Any) -> Path:
    """Write config.json, model.safetensors and tokenizer.json; returns the folder."""
    values = {**CONFIG, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in as_checkpoint(Decoder(parse_config(values))).items():
        ones = 1.0 if "norm" in name else 0.0
        tensors[name] = ones + torch.randn(parameter.shape, generator=generator) * (0.1 if ones else 0.3)
    save_file(tensors, folder / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)} | {"<end>": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
