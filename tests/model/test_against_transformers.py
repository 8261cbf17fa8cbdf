"""The decoder's logits equal transformers' on random weights over a grid of configs: in one go, in chunks, token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minillm.kv.paged import PagedCache
from minillm.model.config import ModelConfig
from minillm.model.config_json import read_config
from minillm.model.decoder import Decoder
from minillm.model.linear import Linear, pack
from minillm.model.weights import load_weights
from minillm.policy.batch import Batch, Chunk

BASE = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 28}
GRID: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, one KV head": {"model_type": "llama", "num_key_value_heads": 1},
    "llama, as many KV heads as heads": {"model_type": "llama", "num_key_value_heads": 6},
    "llama, wide heads": {"model_type": "llama", "head_dim": 20},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, biases": {"model_type": "llama", "attention_bias": True},
    "llama, theta and eps": {"model_type": "llama", "rope_theta": 500000.0, "rms_norm_eps": 1e-3},
    "llama, linear, old spelling": {
        "model_type": "llama",
        "rope_theta": 1000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "llama, linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0},
    },
    "llama, llama3, old spelling": {"model_type": "llama", "rope_theta": 5000.0, "rope_scaling": LLAMA3},
    "llama, llama3": {"model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 300.0}},
    "llama, yarn, old spelling": {"model_type": "llama", "rope_theta": 5000.0, "rope_scaling": YARN},
    "llama, yarn, all its knobs": {
        "model_type": "llama",
        "rope_parameters": {
            **YARN,
            "rope_theta": 900.0,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.7,
            "mscale_all_dim": 0.3,
        },
    },
    "llama, yarn, attention factor": {
        "model_type": "llama",
        "rope_parameters": {**YARN, "rope_theta": 900.0, "attention_factor": 1.3, "truncate": False},
    },  # fmt: skip
    "llama, both spellings": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "default", "rope_theta": 900.0},
        "rope_scaling": {**YARN, "rope_theta": 900.0},
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen2, yarn, tied": {"model_type": "qwen2", "rope_scaling": YARN, "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3, wide heads, biases": {"model_type": "qwen3", "head_dim": 32, "attention_bias": True},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
    "mixtral, one expert a token, tied": {
        "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True
    },
    "qwen3_moe": {"model_type": "qwen3_moe", **EXPERTS, "norm_topk_prob": True, "head_dim": 16},
    "qwen3_moe, weights as they are, every other layer": {
        "model_type": "qwen3_moe", **EXPERTS, "decoder_sparse_step": 2, "num_hidden_layers": 3, "attention_bias": True
    },
    "qwen3_moe, some layers dense": {"model_type": "qwen3_moe", **EXPERTS, "mlp_only_layers": [0], "norm_topk_prob": True},
    "qwen2_moe, a shared expert": {"model_type": "qwen2_moe", **EXPERTS, "shared_expert_intermediate_size": 44},
    "qwen2_moe, normalised, no bias": {
        "model_type": "qwen2_moe", **EXPERTS, "shared_expert_intermediate_size": 12, "norm_topk_prob": True, "qkv_bias": False
    },
}  # fmt: skip


def make(folder: Path, values: dict[str, Any], shard_size: str = "50GB") -> Any:
    """A random model saved in `folder`, whose config.json is `values`, in the spelling under test."""
    values = {**BASE, **values}
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "config.json").write_text(json.dumps(values))
    return model


def load(folder: Path) -> Decoder:
    decoder = Decoder(read_config(folder))
    load_weights(decoder, folder, torch.device("cpu"), torch.float32)
    return decoder


def logits_in_chunks(decoder: Decoder, ids: list[int], cuts: list[int]) -> torch.Tensor:
    """Logits [tokens, vocab] when the text is fed in chunks that end at `cuts`."""
    cache = PagedCache(decoder.config, 1, len(ids), decoder.device, decoder.dtype)
    rows = []
    for start, end in zip([0, *cuts], [*cuts, len(ids)]):
        rows.append(decoder(Batch((Chunk(0, start, tuple(ids[start:end]), (0,)),)), cache, every_row=True))
    return torch.cat(rows)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("name", GRID)
def test_logits_equal_transformers(tmp_path: Path, name: str, packed: bool) -> None:
    reference = make(tmp_path, GRID[name])
    decoder = load(tmp_path)
    if packed:
        pack(decoder)
        assert decoder.layers[0].self_attn.qkv_proj.weight.is_mkldnn
        assert decoder.lm_head.weight.is_mkldnn != decoder.config.tied_embeddings
    ids = torch.randint(0, BASE["vocab_size"], (1, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(ids).logits[0]
    assert expected.std() > 0.1  # logits worth comparing
    tokens = ids[0].tolist()
    for cuts in ([], [1], [13, 14, 40, 69], list(range(1, 70))):
        torch.testing.assert_close(logits_in_chunks(decoder, tokens, cuts), expected, atol=1e-4, rtol=0)


def test_sequences_in_a_batch_do_not_see_each_other(tmp_path: Path) -> None:
    make(tmp_path, GRID["qwen3"])
    decoder = load(tmp_path)
    texts = [[1, 2, 3, 4, 5], [7], [9, 8, 7]]
    alone = [logits_in_chunks(decoder, ids, [])[-1] for ids in texts]
    cache = PagedCache(decoder.config, 3, 8, decoder.device, decoder.dtype)
    together = decoder(Batch(tuple(Chunk(slot, 0, tuple(ids), (slot,)) for slot, ids in enumerate(texts))), cache)
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=0)
    mixed = Batch(
        (Chunk(0, 5, (6,), (0,)), Chunk(1, 1, (3, 4), (1,)), Chunk(2, 3, (1,), (2,)))
    )  # decode and prefill side by side
    alone = [logits_in_chunks(decoder, ids, [])[-1] for ids in ([1, 2, 3, 4, 5, 6], [7, 3, 4], [9, 8, 7, 1])]
    torch.testing.assert_close(decoder(mixed, cache), torch.stack(alone), atol=1e-5, rtol=0)


def test_decode_of_several_sequences_in_any_slots(tmp_path: Path) -> None:
    """A decode step computes all sequences at once; free slots in between, and what they held, change nothing."""
    make(tmp_path, GRID["llama, wide heads"])
    decoder = load(tmp_path)
    texts = {0: [3, 1, 4, 1, 5], 2: [9, 2], 5: [6, 5, 3]}
    cache = PagedCache(decoder.config, 6, 8, decoder.device, decoder.dtype)
    decoder(Batch((Chunk(1, 0, (7, 7, 7, 7), (1,)), Chunk(4, 0, (8,), (4,)))), cache)  # left behind by others
    decoder(Batch(tuple(Chunk(slot, 0, tuple(ids[:-1]), (slot,)) for slot, ids in texts.items())), cache)
    step = decoder(Batch(tuple(Chunk(slot, len(ids) - 1, (ids[-1],), (slot,)) for slot, ids in texts.items())), cache)
    alone = [logits_in_chunks(decoder, ids, [])[-1] for ids in texts.values()]
    torch.testing.assert_close(step, torch.stack(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_are_multiplied_alike(rows: int, bias: bool) -> None:
    """By the BLAS, in the few-row way, and packed; a packed weight can be had back, and counts its bytes."""
    layer = Linear(24, 40, bias=bias)
    x = torch.randn(rows, 24)
    with torch.inference_mode():
        fast = layer(x)
        layer.few_rows = False
        plain, weight = layer(x), layer.weight.clone()
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
        layer.pack()
        torch.testing.assert_close(layer(x), plain, atol=1e-5, rtol=1e-5)
    assert fast.is_contiguous()
    assert torch.equal(layer.weight.to_dense(), weight)
    assert layer.weight.nbytes == weight.nbytes


def test_packing_can_be_switched_off() -> None:
    layer = Linear(24, 40, bias=False)
    layer.packed = False
    layer.pack()
    assert not layer.weight.is_mkldnn
    half = Linear(24, 40, bias=False).to(torch.bfloat16)
    half.pack()
    assert not half.weight.is_mkldnn


def test_shards_with_an_index(tmp_path: Path) -> None:
    reference = make(tmp_path, GRID["llama"], shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = [5, 6, 7]
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_in_chunks(load(tmp_path), ids, []), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", ["llama, tied", "llama, biases", "qwen2", "qwen3, wide heads, biases", "mixtral", "qwen2_moe, a shared expert",
    "qwen3_moe, weights as they are, every other layer"],
)  # fmt: skip
def test_the_number_of_parameters(tmp_path: Path, name: str) -> None:
    reference = make(tmp_path, GRID[name])
    config: ModelConfig = read_config(tmp_path)
    assert config.parameters == sum(p.numel() for p in reference.parameters())
    assert config.parameters == sum(math.prod(shape) for shape in config.tensors.values())
