"""One rank, one thread, SmolLM2 in float32: decode and prefill beside transformers, and beside the bare products.

Writes bench/results/decode.json. The engine's steps and transformers' steps are taken in turns; a step of transformers
is timed inside its own `generate`, between one token and the next.

    python bench/decode.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from harness import ratio, save, side_by_side, summary
from transformers import AutoModelForCausalLM, StoppingCriteria

from minillm import LLM
from minillm.kv.paged import PagedCache
from minillm.model.cost import pass_cost
from minillm.model.decoder import Decoder
from minillm.model.linear import Linear
from minillm.model.weights import load_weights
from minillm.policy.batch import Batch, Chunk

ROUNDS, PROMPT, STEPS = 7, 128, 16


def prompts(count: int, length: int) -> list[list[int]]:
    """Random token ids, the same every time."""
    return torch.randint(5, 40_000, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def engine_steps(model: Decoder, count: int) -> Callable[[], object]:
    """`STEPS` decode steps of `count` sequences that have `PROMPT` tokens in blocks of 16, sampling included."""
    each = -(-(PROMPT + STEPS) // 16)
    cache = PagedCache(model.config, count * each, 16, model.device, model.dtype)
    tables = [tuple(range(slot * each, (slot + 1) * each)) for slot in range(count)]
    for slot, ids in enumerate(prompts(count, PROMPT)):
        model(Batch((Chunk(slot, 0, tuple(ids), tables[slot]),)), cache)

    def job() -> None:
        tokens = [5] * count
        for step in range(STEPS):
            chunks = (Chunk(slot, PROMPT + step, (token,), tables[slot]) for slot, token in enumerate(tokens))
            tokens = model(Batch(tuple(chunks)), cache).argmax(-1).tolist()

    return job


class _Stamps(StoppingCriteria):
    """Notes the time of every token of a `generate`."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        import time

        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def reference_steps(reference: Any, count: int, seconds: list[float]) -> Callable[[], object]:
    """A `generate` of `STEPS` + 1 tokens; appends the time from the first token to the last to `seconds`."""
    ids = torch.tensor(prompts(count, PROMPT))

    def job() -> None:
        stamps = _Stamps()
        reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=STEPS + 1,
            min_new_tokens=STEPS + 1,
            do_sample=False,
            stopping_criteria=[stamps],
        )
        seconds.append(stamps.times[-1] - stamps.times[0])

    return job


def bare_products(model: Decoder, rows: int) -> Callable[[], object]:
    """The matrix products of one forward pass and nothing else; 0.5 GB of weights leave no cache warm."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    inputs = {size: torch.randn(rows, size) for size in {layer.in_features for layer in layers}}

    @torch.inference_mode()
    def job() -> None:
        for layer in layers:
            layer(inputs[layer.in_features][: rows if layer is not model.lm_head or rows <= 16 else 1])

    return job


def decode(llm: LLM, plain: Decoder, reference: Any, count: int) -> dict[str, Any]:
    """Decode steps of `count` sequences: the engine, transformers, its products alone, and those of the BLAS on `plain`."""
    theirs: list[float] = []

    def plain_products() -> None:
        Linear.few_rows = False
        by_blas()
        Linear.few_rows = True

    bare, by_blas = bare_products(llm.model, count), bare_products(plain, count)
    jobs = {
        "engine": engine_steps(llm.model, count),
        "transformers": reference_steps(reference, count, theirs),
        "products": bare,
        "plain products": plain_products,
    }
    seconds = side_by_side(jobs, ROUNDS)
    seconds["engine"] = [each / STEPS for each in seconds["engine"]]
    seconds["transformers"] = [each / STEPS for each in theirs[1:]]
    return {
        "step": {name: summary(each) for name, each in seconds.items()},
        "faster than transformers": ratio(seconds["transformers"], seconds["engine"]),
        "step over its products": ratio(seconds["engine"], seconds["products"]),
        "step over plain products": ratio(seconds["engine"], seconds["plain products"]),
        "raw_s": seconds,
    }


def prefill(llm: LLM, reference: Any, length: int = 512) -> dict[str, Any]:
    """One prompt of `length` tokens up to its first token's logits, beside transformers and the machine's GEMM rate."""
    ids = prompts(1, length)[0]
    batch = Batch((Chunk(0, 0, tuple(ids), (0,)),))
    cache = PagedCache(llm.config, 1, length, llm.model.device, llm.model.dtype)
    square = torch.randn(1024, 1024)
    jobs = {
        "engine": lambda: llm.model(batch, cache),
        "transformers": lambda: _forward(reference, torch.tensor([ids])),
        "GEMM 1024": lambda: square @ square,
    }
    seconds = side_by_side(jobs, ROUNDS)
    flops = pass_cost(llm.config, batch, 4).total.flops
    engine_rate = [flops / each for each in seconds["engine"]]
    gemm_rate = [2 * 1024**3 / each for each in seconds["GEMM 1024"]]
    return {
        "time": {name: summary(each) for name, each in seconds.items()},
        "faster than transformers": ratio(seconds["transformers"], seconds["engine"]),
        "GFLOP/s": statistics.median(engine_rate) / 1e9,
        "GEMM GFLOP/s": statistics.median(gemm_rate) / 1e9,
        "share of the GEMM rate": statistics.median(engine_rate) / statistics.median(gemm_rate),
        "raw_s": seconds,
    }


@torch.inference_mode()
def _forward(reference: Any, ids: torch.Tensor) -> None:
    reference(ids, logits_to_keep=1)


def main() -> None:
    """Measure, print, and store."""
    torch.set_num_threads(1)
    llm = LLM(device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(llm.folder, dtype=torch.float32).eval()
    plain = Decoder(llm.config)  # weights as the checkpoint has them
    load_weights(plain, llm.folder, torch.device("cpu"), torch.float32)
    figures: dict[str, Any] = {f"decode, batch {n}": decode(llm, plain, reference, n) for n in (1, 2, 4, 16)}
    figures["prefill, 512 tokens"] = prefill(llm, reference)
    for name, row in figures.items():
        times = ", ".join(f"{k} {v['median_ms']:.0f} ms" for k, v in row.get("step", row.get("time")).items())
        ratios = ", ".join(
            f"{k} {v['median']:.2f}× ({v['min']:.2f}–{v['max']:.2f})"
            for k, v in row.items()
            if isinstance(v, dict) and "median" in v
        )
        print(f"{name}: {times}\n    {ratios}")
    print(f"    {figures['prefill, 512 tokens']['share of the GEMM rate']:.0%} of the GEMM rate")
    save("decode", figures, ("transformers",))


if __name__ == "__main__":
    main()
