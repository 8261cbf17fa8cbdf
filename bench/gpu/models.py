"""Decoders of real shapes with random weights, and their decode and prefill steps beside transformers'."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from harness import ratio, side_by_side, summary

from minillm.kv.paged import PagedCache
from minillm.model.config import ModelConfig
from minillm.model.cost import pass_cost
from minillm.model.decoder import Decoder
from minillm.model.weights import as_checkpoint
from minillm.policy.batch import Batch, Chunk
from minillm.trace.recorder import Recorder
from minillm.trace.trace import Kind, Trace

TINY = {"tiny": ModelConfig("llama", 512, 64, 128, 2, 4, 2, 16, 512, dtype="float32")}


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A decoder with random weights; what it says is noise, what it costs is real."""
    model = Decoder(config).to_empty(device=device).to(dtype)
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02, generator=generator)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    fresh = Decoder(config)
    model.frequencies = fresh.frequencies.to(device)
    return model


def reference_of(model: Decoder) -> Any:
    """transformers' Llama of the same shape, on the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim, max_position_embeddings=c.max_positions,
        rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied_embeddings, torch_dtype=model.dtype,
    )  # fmt: skip
    with torch.device("meta"):
        reference = LlamaForCausalLM(config)
    reference.load_state_dict(as_checkpoint(model), strict=False, assign=True)
    if c.tied_embeddings:
        reference.lm_head.weight = reference.model.embed_tokens.weight
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config=config).to(model.device)
    return reference.eval()


def decode_job(model: Decoder, batch: int, context_tokens: int, steps: int, recorder: Recorder) -> Callable[[], None]:
    """`steps` greedy decode steps of `batch` sequences with `context_tokens` in the cache, each step a span."""
    cache = PagedCache(model.config, batch, context_tokens + steps, model.device, model.dtype)
    size = model.dtype.itemsize

    def job() -> None:
        tokens = [5] * batch
        for step in range(steps):
            chunks = Batch(
                tuple(Chunk(slot, context_tokens + step, (token,), (slot,)) for slot, token in enumerate(tokens))
            )
            cost = pass_cost(model.config, chunks, size).total
            ids = tuple(range(batch))
            with recorder.span(
                Kind.DECODE, "decode", tokens=batch, request_ids=ids, flops=cost.flops, memory_bytes=cost.memory_bytes
            ):
                tokens = model(chunks, cache).argmax(-1).tolist()

    return job


def reference_decode_job(
    reference: Any, batch: int, context_tokens: int, steps: int, vocab: int, seconds: list[float]
) -> Callable[[], None]:
    """The same steps with transformers' own cache; `seconds` gets the time of the steps alone, without the prefill."""
    device = next(reference.parameters()).device
    ids = torch.randint(5, vocab, (batch, context_tokens), device=device)

    @torch.inference_mode()
    def job() -> None:
        past = reference(ids, use_cache=True, logits_to_keep=1).past_key_values
        token = ids[:, -1:]
        token.tolist()  # a GPU has finished the prefill
        began = time.perf_counter()
        for _ in range(steps):
            token = reference(token, past_key_values=past, use_cache=True).logits[:, -1:].argmax(-1)
            token.tolist()
        seconds.append(time.perf_counter() - began)

    return job


def prefill_job(model: Decoder, tokens: int, recorder: Recorder) -> Callable[[], None]:
    """One prompt up to its first token, as a span."""
    cache = PagedCache(model.config, 1, tokens, model.device, model.dtype)
    batch = Batch((Chunk(0, 0, tuple(5 + n % 200 for n in range(tokens)), (0,)),))
    cost = pass_cost(model.config, batch, model.dtype.itemsize).total

    def job() -> None:
        with recorder.span(
            Kind.PREFILL, "prefill", tokens=tokens, request_ids=(0,), flops=cost.flops, memory_bytes=cost.memory_bytes
        ):
            model(batch, cache).argmax(-1).tolist()

    return job


def measure_model(name: str, config: ModelConfig, device: torch.device, small: bool) -> tuple[dict[str, Any], Trace]:
    """Decode at several batches and prefill, beside transformers; and the trace of the engine's steps."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = random_model(config, device, dtype)
    reference = reference_of(model)
    recorder = Recorder(model=name, dtype=str(dtype).removeprefix("torch."), device=device.type)
    context_tokens, steps, rounds = (32, 4, 2) if small else (512, 16, 5)
    figures: dict[str, Any] = {}
    for batch in (1, 4) if small else (1, 16, 64):
        theirs: list[float] = []
        jobs = {
            "engine": decode_job(model, batch, context_tokens, steps, recorder),
            "transformers": reference_decode_job(reference, batch, context_tokens, steps, config.vocab_size, theirs),
        }
        ours = side_by_side(jobs, rounds)["engine"]
        figures[f"decode, batch {batch}"] = _row(
            {"engine": [each / steps for each in ours], "transformers": [each / steps for each in theirs[1:]]}
        )
    tokens = 64 if small else 2048
    ids = torch.tensor([[5 + n % 200 for n in range(tokens)]], device=device)

    @torch.inference_mode()
    def prefill() -> None:
        reference(ids, logits_to_keep=1).logits.argmax(-1).tolist()

    seconds = side_by_side({"engine": prefill_job(model, tokens, recorder), "transformers": prefill}, rounds)
    figures[f"prefill, {tokens} tokens"] = _row(seconds)
    return figures, recorder.trace


def _row(seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "time": {name: summary(each) for name, each in seconds.items()},
        "faster than transformers": ratio(seconds["transformers"], seconds["engine"]),
        "raw_s": seconds,
    }
