"""Shapes of well-known models, for formulas and plans: nothing is downloaded, and no weights are needed."""

from __future__ import annotations

from dataclasses import dataclass

from minillm.model.config import ModelConfig


@dataclass(frozen=True)
class Mixture:
    """The experts of a mixture: so many in each of `layers` layers, `top_k` for a token, each an MLP of that size. What every token
    passes through besides, shared experts too, is left out.
    """

    hidden_size: int
    experts: int
    top_k: int
    intermediate_size: int
    layers: int

    @property
    def expert_numbers(self) -> int:
        """Of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.intermediate_size


MIXTURES: dict[str, Mixture] = {
    "DeepSeek-V3": Mixture(7168, 256, 8, 2048, 58),  # its report, section 4.2: 61 layers, the first three dense
    "Qwen3-235B": Mixture(4096, 128, 8, 1536, 94),  # Qwen3 Technical Report, table 2, and its config.json
    "Mixtral-8x7B": Mixture(4096, 8, 2, 14336, 32),  # Mixtral of Experts, table 1
}


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
