"""What a checkpoint's config.json says, checked: what the decoder does not do is refused by name, never ignored.

Families: Llama, Qwen2 (q/k/v bias), Qwen3 (q/k norm), and with a mixture of experts Mixtral, Qwen2-MoE (a shared expert) and
Qwen3-MoE.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minillm.model.config import DTYPE_BYTES, ModelConfig, MoEConfig, RopeConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ROPE_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_MAX_POSITIONS = {
    "llama": 2048,
    "qwen2": 32768,
    "qwen3": 32768,
    "mixtral": 131072,
    "qwen2_moe": 32768,
    "qwen3_moe": 32768,
}
_THETA = {"mixtral": 1e6}  # else 10,000: the families' defaults when the file is silent
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def read_config(folder: Path) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face folder. Raises `ValueError` for a missing, broken or unsupported file."""
    values = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    return parse_config(values, eos)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `ValueError` in one line when it is missing or broken."""
    if not path.exists():
        raise ValueError(f"{path.parent} has no {path.name}: give the folder of a Hugging Face checkpoint")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download the checkpoint again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; download the checkpoint again")
    return values


def parse_config(values: dict[str, Any], eos: int | list[int] | None = None) -> ModelConfig:
    """Check the keys of a config.json and name what they mean. `eos` overrides the file's end-of-text tokens."""
    family = values.get("model_type")
    if family not in _MAX_POSITIONS:
        raise ValueError(
            f"model_type={family!r} is not supported; this decoder runs {', '.join(sorted(_MAX_POSITIONS))}"
        )
    _refuse(values, family)
    for key in _NEEDED:
        if not isinstance(values.get(key), int) or values[key] < 1:
            raise ValueError(f"config.json: {key}={values.get(key)!r}; it must be a whole number above 0")
    heads = values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
        )
    eos = values.get("eos_token_id") if eos is None else eos
    if not all(isinstance(token, int) for token in (eos if isinstance(eos, list) else [eos or 0])):
        raise ValueError(f"config.json: eos_token_id={eos!r}; it must be a token id or a list of them")
    bias = (
        bool(values.get("qkv_bias", True)) if family in ("qwen2", "qwen2_moe") else bool(values.get("attention_bias"))
    )
    return ModelConfig(
        family=family,
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        layers=values["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=values.get("head_dim") or (128 if family == "qwen3" else values["hidden_size"] // heads),
        max_positions=values.get("max_position_embeddings") or _MAX_POSITIONS[family],
        norm_eps=values.get("rms_norm_eps", 1e-6),
        rope=_rope(values, values.get("max_position_embeddings") or _MAX_POSITIONS[family]),
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=bias,
        out_bias=family in ("llama", "qwen3", "qwen3_moe") and bool(values.get("attention_bias")),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        dtype=_dtype(values),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        moe=_moe(values, family),
    )


def _moe(values: dict[str, Any], family: str) -> MoEConfig | None:
    """The mixture of experts, for the families that have one."""
    if family not in ("mixtral", "qwen2_moe", "qwen3_moe"):
        return None
    qwen = family != "mixtral"
    sizes: dict[str, Any] = {
        "experts": values.get("num_experts") or values.get("num_local_experts") or (8 if not qwen else None),
        "top_k": values.get("num_experts_per_tok") or (2 if not qwen else None),
        "intermediate_size": values.get("moe_intermediate_size") if qwen else values["intermediate_size"],
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                f"config.json: a mixture of experts needs {_MOE_KEYS[name]}, a whole number above 0, not {size!r}"
            )
    if sizes["top_k"] > sizes["experts"]:
        raise ValueError(
            f"config.json: num_experts_per_tok={sizes['top_k']} is more than there are, {sizes['experts']} experts"
        )
    shared = values.get("shared_expert_intermediate_size") if family == "qwen2_moe" else 0
    if family == "qwen2_moe" and (not isinstance(shared, int) or shared < 1):
        raise ValueError(f"config.json: shared_expert_intermediate_size={shared!r}; it must be a whole number above 0")
    every, dense = (values.get("decoder_sparse_step") or 1, values.get("mlp_only_layers") or ()) if qwen else (1, ())
    layers = range(values["num_hidden_layers"])
    sparse = tuple(layer for layer in layers if layer not in dense and (layer + 1) % every == 0)
    normalised = bool(values.get("norm_topk_prob", False)) if qwen else True
    return MoEConfig(**sizes, layers=sparse, shared_size=shared or 0, normalised=normalised, softmax_last=not qwen)


_MOE_KEYS = {
    "experts": "num_experts or num_local_experts", "top_k": "num_experts_per_tok", "intermediate_size": "moe_intermediate_size"
}  # fmt: skip


def _refuse(values: dict[str, Any], family: str) -> None:
    """What the config asks and this decoder does not do."""
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act={activation!r} is not supported; this decoder has silu")
    if values.get("mlp_bias"):
        raise ValueError("mlp_bias=true is not supported; this decoder's MLP has no bias")
    if values.get("quantization_config"):
        raise ValueError("quantization_config is not supported; give a float32, bfloat16 or float16 checkpoint")
    if values.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ValueError(
            f"partial_rotary_factor={values['partial_rotary_factor']} is not supported; heads are rotated whole"
        )
    by_default = family in ("llama", "mixtral")
    window = values.get("sliding_window") if values.get("use_sliding_window", by_default) else None
    if window or set(values.get("layer_types") or []) - {"full_attention"}:
        raise ValueError(
            "a sliding window, or layer_types other than full_attention, is not supported; attention sees the whole context"
        )


def _rope(values: dict[str, Any], max_positions: int) -> RopeConfig:
    """Both spellings: `rope_theta` + `rope_scaling`, and `rope_parameters` of transformers 5; the first wins, as there."""
    for key in ("rope_scaling", "rope_parameters"):
        if values.get(key) is not None and not isinstance(values[key], dict):
            raise ValueError(f"config.json: {key}={values[key]!r}; it must be an object")
    found = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
    found.pop("type", None)
    theta = found.pop("rope_theta", None) or values.get("rope_theta")
    theta = (
        theta or (values.get("rope_parameters") or {}).get("rope_theta") or _THETA.get(values["model_type"], 10_000.0)
    )
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope scaling {kind!r} is not supported; this decoder has {', '.join(ROPE_TYPES)}")
    if found.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ValueError("partial_rotary_factor is not supported; heads are rotated whole")
    missing = [name for name in _ROPE_NEEDS.get(kind, ()) if found.get(name) is None]
    if missing:
        raise ValueError(f"rope scaling {kind!r} needs {', '.join(missing)} in config.json")
    original = values.get("original_max_position_embeddings") or found.get("original_max_position_embeddings")
    found["original_max_position_embeddings"] = original or max_positions
    return RopeConfig(float(theta), kind, found if kind != "default" else {})


def _dtype(values: dict[str, Any]) -> str:
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ValueError(f"dtype={name!r} is not supported; give a {', '.join(DTYPE_BYTES)} checkpoint")
    return name
