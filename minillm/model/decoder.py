"""The plain decoder: one device, no parallelism, every line of a transformer's forward pass in one file.

Llama, Qwen2, Qwen3, and their kin with a mixture of experts (`moe.py`). Products that share their input are one product: `qkv_proj` and `gate_up_proj`; otherwise names
are the checkpoint's own. Modes of parallelism are *applied to* this model elsewhere; it knows nothing of ranks. How
tokens see the cache is in `attention.py`. Weights come from `weights.load_weights`; the module is built without storage.
"""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from torch import nn

from minillm.kv.paged import PagedCache
from minillm.model.attention import Step
from minillm.model.config import ModelConfig
from minillm.model.linear import Linear
from minillm.model.mlp import MLP
from minillm.model.moe import SparseMLP
from minillm.model.rope import rope_frequencies, rotate
from minillm.policy.batch import Batch


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (Zhang & Sennrich, 2019); the mean is taken in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = x.float()
        squares = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_()  # a CPU sums fastest so
        return self.weight * (exact * squares.div_(x.shape[-1]).add_(self.eps).rsqrt_()).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped KV heads, over the sequence's cache."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads, self.kv_heads = config.heads, config.kv_heads
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, query + 2 * key, bias=config.qkv_bias)
        self.o_proj = Linear(query, config.hidden_size, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: torch.Tensor, step: Step, cache: PagedCache) -> torch.Tensor:
        tokens = x.shape[0]
        qkv = self.qkv_proj(x).view(tokens, -1, self.head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)  # each [tokens, its heads, head_dim]
        q, k = rotate(self.q_norm(q), step.cos, step.sin), rotate(self.k_norm(k), step.cos, step.sin)
        return self.o_proj(step.attend(self.layer, q, k, v, cache).view(tokens, -1))


class Layer(nn.Module):
    """One decoder layer: attention and MLP, each on a normalised copy, each added to the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        sparse = config.is_sparse(layer)
        self.mlp = SparseMLP(config, layer) if sparse else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor, step: Step, cache: PagedCache) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), step, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers, final norm and LM head. Built on the meta device: shapes without storage."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.reference_attention = False  # True: the slow path of `attention.py`, by the formula
        with init_empty_weights():
            table = torch.empty(config.vocab_size, config.hidden_size, device="meta")
            self.embed_tokens = nn.Embedding.from_pretrained(table)  # not filled at random, which takes a second
            self.layers = nn.ModuleList(Layer(config, number) for number in range(config.layers))
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        frequencies, self.rope_factor = rope_frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.frequencies.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        return next(self.parameters()).dtype

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: PagedCache, every_row: bool = False) -> torch.Tensor:
        """Put the batch's tokens into the cache; returns logits [chunks that sample, vocab], or [tokens, vocab] for
        `every_row`.
        """
        return self.logits(self.through(self.embed(batch), batch, cache), batch, every_row)

    def embed(self, batch: Batch) -> torch.Tensor:
        """The tokens' embeddings, [tokens, hidden]: what enters the first layer."""
        return self.embed_tokens(torch.tensor(batch.token_ids, device=self.device))

    def through(self, x: torch.Tensor, batch: Batch, cache: PagedCache) -> torch.Tensor:
        """Through all layers, which put the batch's tokens into the cache: [tokens, hidden] -> [tokens, hidden]."""
        step = self.step(batch, cache)
        for layer in self.layers:
            x = layer(x, step, cache)
        return x

    def step(self, batch: Batch, cache: PagedCache) -> Step:
        """What all layers share for a batch."""
        cos, sin = self.turn(torch.tensor(batch.positions, device=self.device))
        return Step.of(batch, cache.block_size, cos, sin, self.reference_attention)

    def logits(self, x: torch.Tensor, batch: Batch, every_row: bool = False) -> torch.Tensor:
        """From what left the last layer [tokens, hidden] to logits, of the rows that `forward` says."""
        return self.lm_head(self.norm(x if every_row else x[batch.sampling_rows]))

    def turn(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the rotary angles at these positions, each [tokens, 1, head_dim], as `rotate` takes them."""
        angles = positions[:, None].float() * self.frequencies  # type: ignore[operator]
        cos, sin = angles.cos() * self.rope_factor, angles.sin() * self.rope_factor
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos[:, None].to(self.dtype), sin[:, None].to(self.dtype)
