"""The engine under many requests, one thread, SmolLM2 in float32: beside transformers at its best padded batch size;
what each switch is worth; what prefix reuse saves; what scheduling costs.

Writes bench/results/serving.json. Prompts and lengths are the same for all; every output has the length it was asked for.

    python bench/serving.py
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import ratio, save, summary, timed
from transformers import AutoModelForCausalLM

from minillm import LLM, EngineOptions, SamplingParams
from minillm.policy.blocks import BlockPool
from minillm.policy.request import ScheduledRequest
from minillm.policy.scheduler import Scheduler

ROUNDS, REQUESTS, BATCH_SIZES = 3, 64, (4, 8, 16, 32)
Work = list[tuple[list[int], int]]  # prompt, tokens to generate


def workload() -> Work:
    """64 requests, uniformly 16 - 512 tokens in and 8 - 128 out."""
    draw = random.Random(0)
    lengths = [(draw.randint(16, 512), draw.randint(8, 128)) for _ in range(REQUESTS)]
    return [([draw.randrange(5, 40_000) for _ in range(prompt)], new) for prompt, new in lengths]


def ours(llm: LLM, work: Work) -> Callable[[], object]:
    """All requests at once."""
    params = [SamplingParams(max_tokens=new, ignore_eos=True) for _, new in work]
    return lambda: llm.generate([prompt for prompt, _ in work], params)


def padded(reference: Any, work: Work, size: int) -> Callable[[], object]:
    """transformers.generate on batches of `size` in the order of arrival: padded left to the longest prompt, generating
    until the longest answer of the batch is there.
    """

    def job() -> None:
        for begin in range(0, len(work), size):
            batch = work[begin : begin + size]
            longest, new = max(len(prompt) for prompt, _ in batch), max(new for _, new in batch)
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
            reference.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
            )

    return job


def throughput(llm: LLM, work: Work) -> dict[str, Any]:
    """Output tokens per second beside transformers at each batch size, in turns."""
    reference = AutoModelForCausalLM.from_pretrained(llm.folder, dtype=torch.float32).eval()
    jobs = {"engine": ours(llm, work)}
    jobs |= {f"transformers, batches of {size}": padded(reference, work, size) for size in BATCH_SIZES}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    best = ""
    for round_number in range(ROUNDS):  # the first one finds the best batch size, the others repeat that
        for name in list(jobs) if round_number == 0 else ["engine", best]:
            seconds[name].append(timed(jobs[name]))
            print(f"    round {round_number}: {name} {seconds[name][-1]:.1f} s", flush=True)
        best = best or min((name for name in jobs if name != "engine"), key=lambda name: seconds[name][0])
    tokens = sum(new for _, new in work)
    return {
        "output tokens": tokens,
        "tokens/s": {name: tokens / statistics.median(each) for name, each in seconds.items()},
        "best batch size": best,
        "faster than transformers at its best": ratio(seconds[best], seconds["engine"]),
        "raw_s": seconds,
    }


def switches(llm: LLM, work: Work) -> dict[str, Any]:
    """The same work with one feature off at a time."""
    off = {
        "all on": EngineOptions(),
        "static batches of 16": EngineOptions(continuous=False, max_running=16),
        "continuous, at most 16": EngineOptions(max_running=16),
        "whole prompts": EngineOptions(chunked_prefill=False),
        "no preemption, 320 blocks": EngineOptions(num_blocks=320, preemption=False),
        "preemption, 320 blocks": EngineOptions(num_blocks=320),
        "one block a request": EngineOptions(block_size=640, num_blocks=64),
        "attention by formula": EngineOptions(),
    }
    figures = {}
    for name, options in off.items():
        other = llm.with_options(options)
        llm.model.reference_attention = name == "attention by formula"
        took = timed(ours(other, work))
        lives = other.trace.lives
        gaps = sorted(gap for life in lives for gap in life.itl_s)
        figures[name] = {
            "tokens/s": sum(new for _, new in work) / took,
            "mean TTFT s": statistics.mean(life.ttft_s for life in lives),
            "P99 ITL s": gaps[int(len(gaps) * 0.99)],
            "steps": len(other.trace.spans),
        }
        print(f"    {name}: {figures[name]}", flush=True)
    llm.model.reference_attention = False
    return figures


def prefix_reuse(llm: LLM) -> dict[str, Any]:
    """TTFT of an unloaded engine on prompts that share 256 tokens and have 16 - 32 of their own, with reuse on and off."""
    draw = random.Random(1)
    system = [draw.randrange(5, 40_000) for _ in range(256)]
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    engines = {}
    for name in seconds:
        engines[name] = llm.with_options(EngineOptions(prefix_reuse=name == "on"))
        engines[name].generate([system + [7]], SamplingParams(max_tokens=1))  # the system prompt comes by once
    for _ in range(24):
        prompt = system + [draw.randrange(5, 40_000) for _ in range(draw.randint(16, 32))]
        tokens = []
        for name, engine in engines.items():
            output = engine.generate([prompt], SamplingParams(max_tokens=2, ignore_eos=True))[0]
            seconds[name].append(output.metrics.ttft_s)
            tokens.append(output.token_ids)
        assert tokens[0] == tokens[1]
    means = {name: statistics.mean(each) for name, each in seconds.items()}
    return {"mean TTFT s": means, "shorter": means["off"] / means["on"], "per request": ratio(seconds["off"], seconds["on"]), "raw_s": seconds}  # fmt: skip


def scheduling() -> dict[str, Any]:
    """Seconds of `schedule` and `postprocess` for one step of 64 decoding requests with 300 tokens each."""
    options = EngineOptions(num_blocks=4096, prefix_reuse=True)
    scheduler = Scheduler(BlockPool(4096, 16, True), options)
    for number in range(64):
        scheduler.add(ScheduledRequest(number, [number] * 300, 2000))
    while any(request.remaining > 1 for request in scheduler.requests.values()):
        batch = scheduler.schedule(0.0)
        scheduler.postprocess(batch, [1 if chunk.samples else None for chunk in batch.chunks])
    seconds = []
    for _ in range(500):
        began = time.perf_counter()
        batch = scheduler.schedule(0.0)
        scheduler.postprocess(batch, [1] * len(batch.chunks))
        seconds.append(time.perf_counter() - began)
        assert len(batch.chunks) == 64
    return {"step": summary(seconds), "raw_s": seconds}


def main() -> None:
    """Measure, print, and store."""
    torch.set_num_threads(1)
    llm, work = LLM(device="cpu"), workload()
    figures: dict[str, Any] = {"scheduling, 64 running": scheduling()}
    print(f"scheduling: {figures['scheduling, 64 running']['step']['median_ms']:.2f} ms a step")
    figures["prefix reuse"] = prefix_reuse(llm)
    print(f"prefix reuse: TTFT {figures['prefix reuse']['shorter']:.1f}x shorter")
    figures["64 requests"] = throughput(llm, work)
    faster = figures["64 requests"]["faster than transformers at its best"]
    print(
        f"{faster['median']:.2f}x ({faster['min']:.2f}-{faster['max']:.2f}) of {figures['64 requests']['best batch size']}"
    )
    figures["switches"] = switches(llm, work)
    save("serving", figures, ("transformers",))


if __name__ == "__main__":
    main()
