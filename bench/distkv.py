"""Instances of SmolLM2 in float32, one thread each, that borrow blocks of each other's KV caches: throughput of a skewed load with
borrowing and without, in turns; the gain as lengths vary more; the longest context of N ranks; bytes beside the formula.

Writes bench/results/distkv.json.

    python bench/distkv.py [skewed] [kinds] [dealt] [context] [traffic]
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

from harness import ratio, run_parts, side_by_side, summary

from minillm import LLM, EngineOptions, SamplingParams
from minillm.distkv.spread import answer_bytes
from minillm.policy.router import Router
from minillm.ranks.membership import context as rank_context

ROUNDS, SEEDS = 3, 4
POOLS = 7, 14
POOL = EngineOptions(num_blocks=POOLS[0], max_running=16, max_step_tokens=256)  # room for 112 tokens
WAYS = {
    "alone": {},
    "on demand": {"borrowing": True},
    "planned": {"borrowing": True, "on_demand": False, "move_blocks": 4},
}


class Skewed(Router):
    """One of sixteen requests to the last instance, the others to the first."""

    sent = 0

    def prefer(self, present: list[int], prompt: list[int]) -> int:
        self.sent += 1
        return present[-1 if self.sent % 16 == 0 else 0]


def requests(lengths: list[tuple[int, int]], seed: int = 0) -> tuple[list[list[int]], list[SamplingParams]]:
    """Random prompts of these lengths, and parameters for so many new tokens."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(5, 40_000) for _ in range(prompt)] for prompt, _ in lengths]
    return prompts, [SamplingParams(max_tokens=new, ignore_eos=True) for _, new in lengths]


def skewed(one: LLM) -> dict[str, Any]:
    """16 requests of 16 tokens and 80 new ones, 15 of them for the first instance, with pools of several sizes; then one of 1.8
    times the smallest pool.
    """
    prompts, params = requests([(16, 80)] * 16)
    expected = [each.token_ids for each in one.generate(prompts, params)]
    found: dict[str, Any] = {"output tokens": sum(each.max_tokens for each in params)}
    for blocks in POOLS:
        pool = replace(POOL, num_blocks=blocks)
        with LLM(one.folder, layout="dp=2", device="cpu", options=pool) as two:
            each = {name: two.with_options(replace(pool, **switches), router=Skewed) for name, switches in WAYS.items()}
            same = {
                name: sum(a == b.token_ids for a, b in zip(expected, llm.generate(prompts, params)))
                for name, llm in each.items()
            }
            seconds = side_by_side({name: _run(llm, prompts, params) for name, llm in each.items()}, ROUNDS)
            if pool == POOL:
                found |= _longest(one, each)
        found[f"pools of {blocks} blocks"] = {
            "requests with the same tokens, of 16": same,
            "seconds": {name: summary(times) for name, times in seconds.items()},
            "tokens/s": {
                name: found["output tokens"] / (summary(times)["median_ms"] / 1e3) for name, times in seconds.items()
            },
            "on demand over alone": ratio(seconds["alone"], seconds["on demand"]),
            "planned over alone": ratio(seconds["alone"], seconds["planned"]),
            "raw_s": seconds,
        }
    return found


def _longest(one: LLM, each: dict[str, LLM]) -> dict[str, Any]:
    """A request of 1.8 times one pool, for the first instance."""
    long, answer = requests([(int(1.8 * POOL.num_blocks * POOL.block_size) - 16, 17)])
    try:
        each["alone"].generate(long, answer)
        refused = "served"
    except ValueError as error:
        refused = str(error)
    served = each["on demand"].generate(long, answer)[0].token_ids == one.generate(long, answer)[0].token_ids
    return {"1.8 pools, alone": refused, "1.8 pools, borrowing: the same tokens": served}


def _run(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> Any:
    return lambda: llm.generate(prompts, params)


def varied(spread: float, count: int, seed: int) -> list[tuple[int, int]]:
    """Answers to 16 tokens, of 40 tokens on average and, before they are cut to what a pool of 10 blocks holds, with this coefficient
    of variation (log-normal).
    """
    draw, sigma = random.Random(seed), math.sqrt(math.log(1 + spread**2))
    each = [draw.lognormvariate(-(sigma**2) / 2, sigma) if spread else 1.0 for _ in range(count)]
    return [(16, min(144, max(4, round(40 * value)))) for value in each]


def dealt(one: LLM) -> dict[str, Any]:
    """Answers whose lengths vary more and more, dealt in turn to two instances: what borrowing gains."""
    return _gains(
        one, 10, {spread: [varied(spread, 24, seed) for seed in range(SEEDS)] for spread in (0.0, 0.5, 1.0, 1.5, 2.0)}
    )


def kinds(one: LLM) -> dict[str, Any]:
    """Requests of two kinds, long and short answers, each for an instance of its own: the first has 1 + c times the mean, the second
    1 - c times, so that c is the coefficient of variation; by chance each is up to 5 % longer or shorter.
    """
    loads = {}
    for spread in (0.0, 0.2, 0.4, 0.6, 0.8):
        draws = [random.Random(seed) for seed in range(SEEDS)]
        loads[spread] = [
            [(16, round(40 * (1 + spread * (-1) ** n) * draw.uniform(0.95, 1.05))) for n in range(16)] for draw in draws
        ]
    return _gains(one, 7, loads)


def _gains(one: LLM, blocks: int, loads: dict[float, list[list[tuple[int, int]]]]) -> dict[str, Any]:
    """By coefficient of variation: how many times as fast two instances with borrowing are, over several loads."""
    found: dict[str, Any] = {}
    pool = replace(POOL, num_blocks=blocks)
    with LLM(one.folder, layout="dp=2", device="cpu", options=pool) as two:
        alone = two.with_options(pool, router="round-robin")
        lends = two.with_options(replace(pool, borrowing=True), router="round-robin")
        for spread, each in loads.items():
            raw = []
            for seed, lengths in enumerate(each):
                prompts, params = requests(lengths, seed)
                raw.append([])
                for llm in (alone, lends):
                    began = time.perf_counter()
                    llm.generate(prompts, params)
                    raw[-1].append(time.perf_counter() - began)
            gains = [times[0] / times[1] for times in raw]
            news = [[new for _, new in lengths] for lengths in each]
            found[f"coefficient of variation {spread}"] = {
                "gain": mean(gains), "deviation": stdev(gains), "of the lengths drawn": mean(stdev(new) / mean(new) for new in news),
                "raw_s": raw,
            }  # fmt: skip
            print(spread, found[f"coefficient of variation {spread}"], flush=True)
    return found


def context(one: LLM) -> dict[str, Any]:
    """The longest prompt that 16 blocks on each of N ranks have room for, run to its end."""
    found: dict[str, Any] = {}
    for size in (1, 2, 4):
        options = EngineOptions(num_blocks=16, max_running=1, max_step_tokens=64)
        with LLM(one.folder, layout=f"cp={size}" if size > 1 else "", device="cpu", options=options) as llm:
            longest = llm.engine.num_blocks * options.block_size if size > 1 else 256
            prompts, params = requests([(longest - 7, 8)])
            tokens = llm.generate(prompts, params)[0].token_ids
            wanted = one.generate(prompts, params)[0].token_ids
            found[f"{size} ranks"] = {
                "longest": longest,
                "of N times one": longest / (size * 256),
                "same": tokens == wanted,
            }
    return found


def _traffic(instance: str, engine: int) -> tuple[int, int, int]:
    links = rank_context().held[instance].seats[engine].lending.links._links.values()
    each = [(link.traffic.queries, link.traffic.answers, link.traffic.blocks) for link in links]
    return tuple(map(sum, zip((0, 0, 0), *each)))


def traffic(one: LLM) -> dict[str, Any]:
    """What a request with blocks elsewhere sends and receives in each decode step."""
    config = one.config
    with LLM(one.folder, layout="dp=2", device="cpu", options=replace(POOL, borrowing=True), router=Skewed) as llm:
        prompts, _ = requests([(150, 1)])
        found = []
        for new in (1, 33):
            engine = llm.engine.engines[0]
            before = engine.instance.ranks.run(_traffic, engine.instance.name, engine.number)[0]
            llm.generate(prompts, SamplingParams(max_tokens=new, ignore_eos=True))
            after = engine.instance.ranks.run(_traffic, engine.instance.name, engine.number)[0]
            found.append([late - early for early, late in zip(before, after)])
    measured = (found[1][0] + found[1][1] - found[0][0] - found[0][1]) / 32
    formula = config.layers * answer_bytes(config.heads, config.head_dim, 4)
    return {"bytes a step": measured, "by formula": formula, "of the formula": measured / formula}


if __name__ == "__main__":
    run_parts("distkv", {"skewed": skewed, "kinds": kinds, "dealt": dealt, "context": context, "traffic": traffic})
