"""The shape of a decoder: what it is made of, in numbers, and the tensors that it has. The file knows no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any


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
