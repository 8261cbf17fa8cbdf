"""How fast ranks start, answer a call and end; medians and spread over rounds, one run. Writes bench/results/ranks.json.

python bench/ranks.py
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from minillm import Ranks
from minillm.hardware.machine import machine

ROUNDS, CALLS = 15, 60
RESULTS = Path(__file__).parent / "results"


def reduce_one() -> float:
    """What a call does here: one all-reduce of one number."""
    x = torch.ones(1)
    dist.all_reduce(x)
    return x.item()


def timed(job: Callable[[], object]) -> float:
    """Seconds that `job` takes."""
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and extremes, in milliseconds."""
    return {"median_ms": statistics.median(seconds) * 1e3, "min_ms": min(seconds) * 1e3, "max_ms": max(seconds) * 1e3}


def measure(size: int) -> dict[str, object]:
    """Start, call and close pools of `size` ranks; the fork server is warm."""
    starts, calls, closes, private = [], [], [], []
    for _ in range(ROUNDS):
        ranks = Ranks(size, device="cpu")
        starts.append(timed(ranks.start))
        ranks.run(reduce_one)
        calls += [timed(partial(ranks.run, reduce_one)) for _ in range(CALLS // ROUNDS)]
        private += [psutil.Process(pid).memory_full_info().uss / 1e6 for pid in ranks.pids]
        closes.append(timed(ranks.close))
    memory = statistics.median(private)
    return {
        "ranks": size,
        "start": spread(starts),
        "call": spread(calls),
        "close": spread(closes),
        "private_MB": memory,
    }


def main() -> None:
    """Measure 2, 4 and 8 ranks and print a table."""
    with Ranks(2, device="cpu") as first:
        cold = timed(first.start)
    rows = [measure(size) for size in (2, 4, 8)]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        **machine(),
        "cold_start_s": cold,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ranks.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"first start, torch loaded by the fork server meanwhile: {cold:.2f} s")
    for row in rows:
        figures = "   ".join(
            f"{name} {row[name]['median_ms']:.1f} ms ({row[name]['min_ms']:.1f}–{row[name]['max_ms']:.1f})"
            for name in ("start", "call", "close")
        )  # type: ignore[index]
        print(f"{row['ranks']} ranks:   {figures}   {row['private_MB']:.0f} MB private each")


if __name__ == "__main__":
    main()
