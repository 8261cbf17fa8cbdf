"""What a checkpoint's config.json says, checked: what the decoder does not do is refused by name, never ignored.

Families: Llama, Qwen2 (q/k/v bias), Qwen3 (q/k norm), and with a mixture of experts Mixtral, Qwen2-MoE (a shared expert) and
Qwen3-MoE. The file knows no tensors.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base `theta` and how its frequencies are scaled (`rope.py` has the formulas)."""

    theta: float = 10_000.0
    kind: str = "default"
    values: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """A scaling parameter; `default` where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts: in some `layers` the MLP is `experts` smaller ones, of which a router chooses `top_k` a token.

    The chosen ones' weights are a softmax over all experts, divided by their sum where they are `normalised`; with
    `softmax_last` it is taken over the chosen ones alone. A shared expert of `shared_size` takes every token, 0 for none.
    """

    experts: int
    top_k: int
    intermediate_size: int
    layers: tuple[int, ...]
    shared_size: int = 0
    normalised: bool = True
    softmax_last: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. Heads share KV heads in groups of `heads // kv_heads` (GQA, any ratio)."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
    moe: MoEConfig | None = None

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.moe is not None and layer in self.moe.layers

    def of_layers(self, layers: range) -> ModelConfig:
        """The same with these layers alone, numbered from 0."""
        inside = tuple(place for place, layer in enumerate(layers) if self.is_sparse(layer))
        return replace(self, layers=len(layers), moe=self.moe and replace(self.moe, layers=inside))

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def kv_numbers_per_token(self) -> int:
        """Numbers in K and V of one token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers, in the checkpoint's dtype."""
        return self.kv_numbers_per_token * DTYPE_BYTES[self.dtype]

    @property
    def parameters(self) -> int:
        """How many numbers the weights hold; tied embeddings count once."""
        ends = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        sparse = len(self.moe.layers) if self.moe else 0
        layers = (self.layers - sparse) * _numbers(self.layer_tensors(False))
        return layers + self.hidden_size + ends + (sparse * _numbers(self.layer_tensors(True)) if sparse else 0)

    @property
    def layer_parameters(self) -> int:
        """How many numbers the weights of one layer hold, the first one."""
        return _numbers(self.layer_tensors(self.is_sparse(0)))

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight of a checkpoint, by its name without "model."; tied embeddings come once."""
        ends = (self.vocab_size, self.hidden_size)
        whole: dict[str, tuple[int, ...]] = {"embed_tokens.weight": ends, "norm.weight": (self.hidden_size,)}
        if not self.tied_embeddings:
            whole["lm_head.weight"] = ends
        return whole | {
            f"layers.{number}.{name}": shape
            for number in range(self.layers)
            for name, shape in self.layer_tensors(self.is_sparse(number)).items()
        }

    def layer_tensors(self, sparse: bool) -> dict[str, tuple[int, ...]]:
        """The shape of every weight of a layer, whose MLP is a mixture of experts or not, by its name in the layer."""
        q, kv, h = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden_size
        layer: dict[str, tuple[int, ...]] = {
            f"{norm}.weight": (h,) for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            layer[f"self_attn.{part}_proj.weight"] = (rows, h)
            if self.qkv_bias:
                layer[f"self_attn.{part}_proj.bias"] = (rows,)
        layer["self_attn.o_proj.weight"] = (h, q)
        if self.out_bias:
            layer["self_attn.o_proj.bias"] = (h,)
        if self.qk_norm:
            layer |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        return layer | (self._expert_tensors() if sparse else _mlp("mlp", h, self.intermediate_size))

    def _expert_tensors(self) -> dict[str, tuple[int, ...]]:
        """The router, the experts, and the shared expert with its gate."""
        moe, h = self.moe, self.hidden_size
        assert moe is not None
        layer: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (moe.experts, h)}
        for expert in range(moe.experts):
            layer |= _mlp(f"mlp.experts.{expert}", h, moe.intermediate_size)
        if moe.shared_size:
            layer |= {"mlp.shared_expert_gate.weight": (1, h)} | _mlp("mlp.shared_expert", h, moe.shared_size)
        return layer


def _mlp(name: str, hidden: int, wide: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}
    return {f"{name}.{part}.weight": shape for part, shape in shapes.items()}


def _numbers(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in tensors.values())


DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


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
