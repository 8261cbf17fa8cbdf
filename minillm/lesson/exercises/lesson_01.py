"""Exercises of lesson 01: bytes of a KV cache, the batch that fills a device, and the cache by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from minillm.lesson.exercise import Case, Exercise, Outcome


def kv_bytes_spec(case: Case) -> list[int]:
    """Counted the long way: one K and one V vector per token, KV head and layer."""
    layers, kv_heads, head_dim, tokens, batch, number_bytes = case.inputs
    per_token = sum(2 * head_dim * number_bytes for _ in range(layers) for _ in range(kv_heads))
    return [sum(per_token * tokens for _ in range(batch))]


def enough_batch_spec(case: Case) -> list[int]:
    """Tried out: the first batch at which computing one product takes no less time than reading its weights."""
    flops_per_s, bytes_per_s, number_bytes = case.inputs
    weights, batch = 1_000_000, 1
    while 2 * batch * weights / flops_per_s < weights * number_bytes / bytes_per_s:
        batch += 1
    return [batch]


class Projection:
    """q, k and v of some embeddings: `project(x)` for x [tokens, dim] gives three tensors of that shape.

    Counts its rows, because they are the work that a cache saves.
    """

    def __init__(self, dim: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._weights = [torch.randn(dim, dim, generator=generator) for _ in range(3)]
        self.rows = 0

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.rows += x.shape[0]
        q, k, v = (x @ weight for weight in self._weights)
        return q, k, v


def attention_spec(case: Case) -> list[torch.Tensor]:
    """From the start every time: project all tokens, and let the last one attend to all of them."""
    tokens, prompt, project = _sequence(case)
    outputs = []
    for end in range(prompt, len(tokens) + 1):
        q, k, v = project(tokens[:end])
        weights = torch.softmax(q[-1] @ k.T / math.sqrt(q.shape[1]), dim=-1)
        outputs.append(weights @ v)
    return outputs


def _drive_attention(function: Callable[..., Any], case: Case) -> Outcome:
    """The prompt in one call, then a call per token, with one cache throughout."""
    tokens, prompt, project = _sequence(case)
    cache: dict[str, torch.Tensor] = {}
    outputs = []
    for end in range(prompt, len(tokens) + 1):
        outputs.append(function(tokens[:end].clone(), cache, project))
    return Outcome(outputs, project.rows)


def _sequence(case: Case) -> tuple[torch.Tensor, int, Projection]:
    count, prompt, dim = case.inputs
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, dim, generator=generator), prompt, Projection(dim, seed=dim)


KV_BYTES = Exercise(
    name="01.kv_bytes",
    function="kv_bytes",
    minutes=5,
    spec=kv_bytes_spec,
    cases=(
        Case("1 layer, 1 KV head of 2, 1 token, batch 1, 4 bytes a number", (1, 1, 2, 1, 1, 4)),
        Case("SmolLM2, 100 tokens, batch 1, 4 bytes a number", (30, 3, 64, 100, 1, 4)),
        Case("an 8B Llama, 4,096 tokens, batch 64, 2 bytes a number", (32, 8, 128, 4096, 64, 2)),
    ),
    starter='''\
def kv_bytes(layers, kv_heads, head_dim, tokens, batch, number_bytes):
    """Bytes of the KV cache of `batch` sequences of `tokens` tokens each."""
    return 0  # FILL IN (one line)
''',
    solution='''\
def kv_bytes(layers, kv_heads, head_dim, tokens, batch, number_bytes):
    """K and V: 2 vectors of head_dim numbers per layer, KV head, token and sequence."""
    return 2 * layers * kv_heads * head_dim * tokens * batch * number_bytes
''',
    hints=(
        "How many numbers does one token leave behind in one layer? It has kv_heads keys and as many values.",
        "2 · kv_heads · head_dim numbers per token and layer; the rest are factors.",
    ),
)

ENOUGH_BATCH = Exercise(
    name="01.enough_batch",
    function="enough_batch",
    minutes=10,
    spec=enough_batch_spec,
    cases=(
        Case("90 GFLOP/s, 30 GB/s, 4 bytes a number", (90e9, 30e9, 4)),
        Case("an A100: 312 TFLOP/s, 2,039 GB/s, 2 bytes a number", (312e12, 2039e9, 2)),
        Case("an H200: 989 TFLOP/s, 4,800 GB/s, 2 bytes a number", (989e12, 4800e9, 2)),
        Case("a future device: 1,000 TFLOP/s, 1,000 GB/s, 1 byte a number", (1e15, 1e12, 1)),
    ),
    starter='''\
def enough_batch(flops_per_s, bytes_per_s, number_bytes):
    """The smallest batch at which computing a product takes at least as long as reading its weights.

    A weight is read once per step, and every request of the batch does 2 operations with it.
    """
    return 1  # FILL IN (about 2 lines)
''',
    solution='''\
def enough_batch(flops_per_s, bytes_per_s, number_bytes):
    """2 · batch / flops_per_s ≥ number_bytes / bytes_per_s, for one weight."""
    return math.ceil(number_bytes * flops_per_s / (2 * bytes_per_s))
''',
    hints=(
        "Take one single weight. How long does it take to read it? How long to use it, for one request?",
        "Reading: number_bytes / bytes_per_s. Using: 2 · batch / flops_per_s. Round the batch up.",
    ),
)

KV_CACHE = Exercise(
    name="01.kv_cache",
    function="last_output",
    minutes=25,
    spec=attention_spec,
    cases=(
        Case("a prompt of 1 token, then 1 token", (2, 1, 2)),
        Case("a prompt of 3 tokens, then 3 tokens", (6, 3, 4)),
        Case("a prompt of 8 tokens, then 16 tokens", (24, 8, 8)),
    ),
    drive=_drive_attention,
    plain=False,
    target=lambda case: case.inputs[0],
    unit="projected rows",
    names=("call 0, the prompt", *(f"call {number}" for number in range(1, 40))),
    starter='''\
def last_output(x, cache, project):
    """Attention of the last token of x [tokens, dim] to all tokens: [dim].

    Called once for the prompt, then once for every further token; x then has one row more. `cache` is
    a dict, empty at first, that stays the same from call to call. `project(rows)` gives q, k, v
    [rows, dim] and is what costs time.
    """
    q, k, v = project(x)
    weights = torch.softmax(q[-1] @ k.T / math.sqrt(q.shape[1]), dim=-1)
    return weights @ v
''',
    solution='''\
def last_output(x, cache, project):
    """Project only what is new; keep K and V."""
    new = x[len(cache["k"]):] if cache else x
    q, k, v = project(new)
    cache["k"] = torch.cat((cache["k"], k)) if cache else k
    cache["v"] = torch.cat((cache["v"], v)) if "v" in cache else v
    weights = torch.softmax(q[-1] @ cache["k"].T / math.sqrt(q.shape[1]), dim=-1)
    return weights @ cache["v"]
''',
    hints=(
        "Which rows of x were projected in an earlier call? Their q is never needed again. Are their k and v?",
        "Put k and v into the cache; from the second call on project only x[len(cache['k']):], and append.",
    ),
)

EXERCISES = (KV_BYTES, ENOUGH_BATCH, KV_CACHE)
