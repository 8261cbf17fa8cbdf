"""What every benchmark shares: timing side by side, medians with spread, and raw JSON that names machine and command."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from minillm.hardware.machine import machine, version_of

RESULTS = Path(__file__).parent / "results"


def timed(job: Callable[[], object]) -> float:
    """Seconds that `job` takes."""
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def side_by_side(jobs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job, taken in turns so that a slow spell of the machine hits all alike; one round unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for round_number in range(rounds + 1):
        for name, job in jobs.items():
            took = timed(job)
            if round_number:
                seconds[name].append(took)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and extremes in milliseconds."""
    return {"median_ms": statistics.median(seconds) * 1e3, "min_ms": min(seconds) * 1e3, "max_ms": max(seconds) * 1e3}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times faster `fast` is, round by round: median and extremes."""
    each = [a / b for a, b in zip(slow, fast)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def save(name: str, figures: dict[str, Any], packages: tuple[str, ...] = ()) -> None:
    """Write bench/results/NAME.json: command, date, machine, versions, figures."""
    about = {
        "command": " ".join(["python", f"bench/{name}.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        **machine(),
    }
    versions = {package: version_of(package) for package in packages}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**about, **versions, **figures}, indent=1) + "\n")


def run_parts(name: str, parts: Mapping[str, Callable[[Any], dict[str, Any]]]) -> None:
    """Run the parts that the command line asks for, all by default, each with an engine on one device; the others' stored
    figures stay.
    """
    from minillm import LLM

    torch.set_num_threads(1)
    asked = sys.argv[1:] or list(parts)
    stored = RESULTS / f"{name}.json"
    before = json.loads(stored.read_text()) if stored.exists() else {}
    with LLM(device="cpu") as one:
        figures = {part: parts[part](one) for part in asked}
    save(name, {part: before[part] for part in parts if part in before} | figures)
