"""What lesson 16 asks of the simulator: how much a gate gains by guesses that are right so often, and what each part of TetriInfer changes (Hu
et al. 2024; signs and orders only, its machines are emulated).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import mean, stdev

from minillm.policy.admission import Predictor
from minillm.sim import tetri
from minillm.sim.measures import tetri_over_vllm
from minillm.sim.tetri import Setup, Tetri

LOAD = "LPHD"  # light prompts, heavy answers: where lengths matter
ACCURACIES = (0.0, 0.25, 0.5, 0.75, 1.0)
PRINTED = {
    "LPLD": (0.56, 0.60),
    "LPHD": (0.03, 0.53),
    "HPLD": (0.91, 0.77),
    "HPHD": (None, 0.81),
    "Mixed": (0.15, 0.50),
}
WORDS = {
    "LPLD": "light prompts, light answers", "LPHD": "light prompts, heavy answers", "HPLD": "heavy prompts, light answers",
    "HPHD": "heavy prompts, heavy answers", "Mixed": "mixed",
}  # fmt: skip


@dataclass(frozen=True)
class Served:
    """Means over the requests of a run, in seconds, and how often one was put back."""

    ttft_s: float
    completion_s: float
    preemptions: int


@lru_cache(4096)
def serve(setup: Setup, load: str = LOAD, seed: int = 0) -> Served:
    """128 requests at once."""
    tasks = Tetri(setup, tetri.v100_pair(), seed).serve(tetri.workload(load, seed))
    return Served(*tetri.means(tasks), sum(task.preemptions for task in tasks))


@lru_cache(64)
def vllm(load: str = LOAD, seed: int = 0) -> Served:
    """The same on one instance that does both, with 16 places."""
    tasks = tetri.baseline(tetri.v100_pair()).serve(tetri.workload(load, seed))
    return Served(*tetri.means(tasks), sum(task.preemptions for task in tasks))


def over_greedy(gate: str, predictor: Predictor, seeds: int = 8, load: str = LOAD) -> tuple[float, float]:
    """Completion time over greedy's: mean, and deviation from seed to seed."""
    each = [
        serve(Setup(gate=gate, predictor=predictor), load, seed).completion_s
        / serve(Setup(gate="greedy", predictor=predictor), load, seed).completion_s
        for seed in range(seeds)
    ]
    return mean(each), stdev(each)


def sweep(width: int = 200, seeds: int = 8, load: str = LOAD) -> dict[str, list[tuple[float, float, float]]]:
    """For both reserving gates: (accuracy, completion time over greedy's, deviation)."""
    return {
        gate: [(right, *over_greedy(gate, Predictor(width, right), seeds, load)) for right in ACCURACIES]
        for gate in ("reserve-static", "reserve-dynamic")
    }


def exactly(seeds: int = 8) -> dict[str, float]:
    """Completion time over greedy's when lengths are known to the token."""
    known = Predictor(1, 1.0, 10_000)
    return {gate: over_greedy(gate, known, seeds)[0] for gate in ("reserve-static", "reserve-dynamic")}


def put_back(gate: str, right: float, seeds: int = 8) -> float:
    """How often a request is put back, mean over seeds, with buckets of 200 tokens."""
    return mean(
        serve(Setup(gate=gate, predictor=Predictor(200, right)), LOAD, seed).preemptions for seed in range(seeds)
    )


def over_two(seeds: int = 8, load: str = LOAD) -> float:
    """Completion time of a load over that of two vLLM instances, which have as many GPUs."""
    costs = tetri.v100_pair()
    each = []
    for seed in range(seeds):
        theirs = tetri.baseline(costs, instances=2).serve(tetri.workload(load, seed))
        each.append(serve(Setup(), load, seed).completion_s / tetri.means(theirs)[1])
    return mean(each)


def over_vllm(which: int, seeds: int = 8) -> dict[str, tuple[Sequence[float], float | None]]:
    """For each load, TTFT (`which` 0) or completion time (1) over vLLM's, seed by seed, and what the paper prints."""
    return {
        WORDS[load]: ([tetri_over_vllm(load, seed)[which] for seed in range(seeds)], printed[which])
        for load, printed in PRINTED.items()
    }
