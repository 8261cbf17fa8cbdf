"""Shapes of well-known models, for formulas and plans: nothing is downloaded, and no weights are needed."""

from __future__ import annotations

from minillm.model.config import ModelConfig


def _llama(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, room: int
) -> ModelConfig:
    head_dim = hidden // heads
    return ModelConfig("llama", vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, room, dtype="bfloat16")


SHAPES: dict[str, ModelConfig] = {
    "SmolLM2-135M": ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, tied_embeddings=True, dtype="bfloat16"),
    "Llama-2-7B": _llama(32000, 4096, 11008, 32, 32, 32, 4096),  # Touvron et al., 2023: no GQA
    "Llama-3.1-8B": _llama(128256, 4096, 14336, 32, 32, 8, 131072),  # The Llama 3 Herd of Models, table 3
    "Llama-3.1-70B": _llama(128256, 8192, 28672, 80, 64, 8, 131072),
    "Llama-3.1-405B": _llama(128256, 16384, 53248, 126, 128, 8, 131072),
}
