"""Rotary position embedding (Su et al., RoFormer, section 3.2.2) and the ways checkpoints stretch it to long contexts."""

from __future__ import annotations

import math

import torch

from minillm.model.config import ModelConfig, RopeConfig


def rope_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """(inverse frequencies [head_dim / 2] float32, factor on cos and sin).

    `linear` divides all by the factor; `llama3` divides the slow ones and blends in between (Llama 3.1);
    `yarn` blends by how often a dimension turns within the original context (Peng et al., YaRN, section 3.2-3.4).
    """
    dim, rope = config.head_dim, config.rope
    plain = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.kind == "linear":
        return plain / rope["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(plain, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(plain, rope, dim), _yarn_attention_factor(rope)
    return plain, 1.0


def _llama3(plain: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    turns = context * plain / (2 * math.pi)  # how often each dimension turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * plain / rope["factor"] + keep * plain


def _yarn(plain: torch.Tensor, rope: RopeConfig, dim: int) -> torch.Tensor:
    context = rope["original_max_position_embeddings"]

    def dimension_of(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.get("beta_fast", 32)), dimension_of(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001
    slow = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain / rope["factor"] * slow + plain * (1 - slow)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """YaRN's temperature (section 3.4), or what the checkpoint says instead."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (a, b) = (x[i], x[i + head_dim/2]) by its angle: (a cos - b sin, b cos + a sin).

    x [tokens, heads, head_dim]; cos and sin [tokens, 1, head_dim], sin negative in its first half.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)
