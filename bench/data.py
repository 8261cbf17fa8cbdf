"""Replicas of SmolLM2 in float32, one thread each: throughput of two beside one; the P99 of routers under heavy-tailed lengths,
measured here and on simulated GPUs; what replicas share.

Writes bench/results/data.json.

    python bench/data.py [throughput] [routers] [simulated] [weights]
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from harness import ratio, run_parts, side_by_side, summary

from minillm import LLM, EngineOptions, SamplingParams
from minillm.hardware.devices import find_device
from minillm.load import drive
from minillm.model.shapes import SHAPES
from minillm.policy.router import ROUTERS
from minillm.sim.engine import simulate
from minillm.trace.life import RequestLife
from minillm.trace.metrics import percentile
from minillm.trace.workload import PUBLISHED, Arrival, poisson

ROUNDS, SEEDS, REQUESTS, UTILISATION = 5, 5, 240, 0.7
SHORT, LONG, LONG_SHARE = (16, 4), (400, 4), 0.08  # prompt and new tokens


def throughput(one: LLM) -> dict[str, Any]:
    """64 mixed requests at once, uniformly 16 - 256 tokens in and 8 - 64 out, in turns: one replica, two."""
    draw = random.Random(0)
    lengths = [(draw.randint(16, 256), draw.randint(8, 64)) for _ in range(64)]
    prompts = [[draw.randrange(5, 40_000) for _ in range(prompt)] for prompt, _ in lengths]
    params = [SamplingParams(max_tokens=new, ignore_eos=True) for _, new in lengths]
    tokens = sum(new for _, new in lengths)
    with LLM(one.folder, layout="dp=2", device="cpu") as two:
        expected, got = one.generate(prompts, params), two.generate(prompts, params)
        same = sum(a.token_ids == b.token_ids for a, b in zip(expected, got))
        seconds = side_by_side(
            {"one replica": lambda: one.generate(prompts, params), "two": lambda: two.generate(prompts, params)}, ROUNDS
        )
    return {
        "output tokens": tokens,
        "requests with the same tokens": f"{same} of 64",
        "seconds": {name: summary(each) for name, each in seconds.items()},
        "tokens/s": {name: tokens / (summary(each)["median_ms"] / 1e3) for name, each in seconds.items()},
        "two over one": ratio(seconds["one replica"], seconds["two"]),
        "raw_s": seconds,
    }


def heavy_tail(count: int, rate_per_s: float, seed: int) -> list[Arrival]:
    """Poisson arrivals; most prompts are short, and a few 25 times as long."""
    draw, time_s, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        time_s += draw.expovariate(rate_per_s)
        arrivals.append(Arrival(time_s, *(LONG if draw.random() < LONG_SHARE else SHORT)))
    return arrivals


def p99(lives: list[RequestLife]) -> dict[str, Any]:
    """P99 of TTFT in ms with the interval that holds the true one with 95 % confidence."""
    estimate = percentile([life.ttft_s for life in lives], 99)
    return {name: value and value * 1e3 for name, value in vars(estimate).items()}


def routers(one: LLM) -> dict[str, Any]:
    """The same arrivals for each router, on two replicas that run here; in turns, several seeds."""
    options = EngineOptions(max_running=8)
    lives: dict[str, list[RequestLife]] = {name: [] for name in ROUTERS}
    each: dict[str, list[float]] = {name: [] for name in ROUTERS}
    with LLM(one.folder, layout="dp=2", device="cpu", options=options) as llm:
        every = drive(llm, heavy_tail(60, 1e9, 99)).lives  # all at once: what the two can do
        busy_s = max(life.moments[-1][1] for life in every) - min(life.moments[0][1] for life in every)
        rate = UTILISATION * len(every) / busy_s
        for seed in range(SEEDS):
            for name in ROUTERS:
                twin = llm.with_options(router=name)
                mine = list(drive(twin, heavy_tail(REQUESTS, rate, seed), seed).lives)
                twin.close()
                lives[name] += mine
                each[name].append(p99(mine)["value"])
                print(f"    seed {seed}: {name} P99 TTFT {each[name][-1]:.0f} ms", flush=True)
    return {
        "requests per second": rate,
        "share of what they can do": UTILISATION,
        "requests": SEEDS * REQUESTS,
        "P99 TTFT (ms) of all": {name: p99(mine) for name, mine in lives.items()},
        "P99 TTFT (ms) of each seed": each,
        "round-robin over least-tokens, seed by seed": ratio(each["round-robin"], each["least-tokens"]),
    }


def simulated(one: LLM) -> dict[str, Any]:
    """4,000 requests with the lengths of the Azure traces, Llama-3.1-8B on four H100s; the same arrivals for each router."""
    config, device, found = SHAPES["Llama-3.1-8B"], find_device("H100"), {}
    for source, rate in (("azure-code", 30.0), ("azure-conversation", 30.0)):
        arrivals = poisson(4_000, rate, PUBLISHED[source], random.Random(0))
        arrivals = [Arrival(a.time_s, min(a.prompt_tokens, 16_000), min(a.new_tokens, 2000)) for a in arrivals]
        found[source] = {"requests per second": rate}
        for name in ("round-robin", "least-tokens"):
            trace = simulate(arrivals, config, device, "bfloat16", EngineOptions(), replicas=4, router=name)
            found[source][name] = {"P99 TTFT (ms)": p99(trace.lives)}
    return found


def weights(one: LLM) -> dict[str, Any]:
    """Bytes that each replica read, and what they have together: resident and proportional sizes from /proc."""
    with LLM(one.folder, layout="dp=2", device="cpu") as two:
        loaded = [vars(instance.loaded[0]) for instance in two.instances]
        sizes = [memory_of(instance.ranks.pids[0]) for instance in two.instances]
    return {"loaded": loaded, "bytes": sizes}


def memory_of(pid: int) -> dict[str, int]:
    """Rss and Pss of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("Rss:", "Pss:"))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_parts("data", {"throughput": throughput, "routers": routers, "simulated": simulated, "weights": weights})
