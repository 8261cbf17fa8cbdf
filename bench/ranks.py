"""How fast ranks start, answer a call and end. Writes bench/results/ranks.json.

python bench/ranks.py
"""

from __future__ import annotations

import statistics
from functools import partial

import psutil
import torch
import torch.distributed as dist
from harness import save, summary, timed

from minillm import Ranks

ROUNDS, CALLS = 15, 60


def reduce_one() -> float:
    """What a call does here: one all-reduce of one number."""
    x = torch.ones(1)
    dist.all_reduce(x)
    return x.item()


def measure(size: int) -> dict[str, dict[str, float]]:
    """Start, call and close pools of `size` ranks; the fork server is warm."""
    starts, calls, closes, private = [], [], [], []
    for _ in range(ROUNDS):
        ranks = Ranks(size, device="cpu")
        starts.append(timed(ranks.start))
        ranks.run(reduce_one)
        calls += [timed(partial(ranks.run, reduce_one)) for _ in range(CALLS // ROUNDS)]
        private += [psutil.Process(pid).memory_full_info().uss / 1e6 for pid in ranks.pids]
        closes.append(timed(ranks.close))
    memory = {"median_MB": statistics.median(private)}
    return {"start": summary(starts), "call": summary(calls), "close": summary(closes), "private memory": memory}


def main() -> None:
    """Measure 2, 4 and 8 ranks and print a table."""
    with Ranks(2, device="cpu") as first:
        cold = timed(first.start)
    print(f"first start, torch loaded by the fork server meanwhile: {cold:.2f} s")
    figures = {f"{size} ranks": measure(size) for size in (2, 4, 8)}
    for name, row in figures.items():
        times = [
            f"{k} {v['median_ms']:.1f} ms ({v['min_ms']:.1f}–{v['max_ms']:.1f})"
            for k, v in row.items()
            if "median_ms" in v
        ]
        print(f"{name}:   {'   '.join(times)}   {row['private memory']['median_MB']:.0f} MB private each")
    save("ranks", {"cold_start_s": cold, **figures})


if __name__ == "__main__":
    main()
