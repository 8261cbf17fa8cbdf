"""How fast the simulator is, in CPU seconds of one core: a minute of conversations on 50 machines, and how that grows with requests and machines.

python bench/simulation.py [minute] [growth]
"""

from __future__ import annotations

import time
from random import Random
from typing import Any

from harness import run_parts

from minillm import LLM
from minillm.policy.handing import Dispatcher, Role
from minillm.policy.router import LeastTokens
from minillm.sim import splitwise
from minillm.sim.cluster import Apart, Kind, Wires
from minillm.sim.costs import Measured
from minillm.sim.machine import Limits
from minillm.trace.workload import PUBLISHED, poisson

LENGTHS = PUBLISHED["azure-conversation"]
RATE = 2.6  # requests per second and machine


def cpu_s(job: Any) -> float:
    """CPU seconds of this process."""
    began = time.process_time()
    job()
    return time.process_time() - began


def minute(one: LLM) -> dict[str, Any]:
    """60 s at 130 requests/s on 50 machines, 35 for prompts and 15 for tokens, five times."""
    load = splitwise.poisson_load(LENGTHS, 60.0)(130.0, 0)
    design = splitwise.Design("HH", splitwise.H100, 35, splitwise.H100, 15)
    seconds = [cpu_s(lambda: splitwise.build(design).serve(load)) for _ in range(5)]
    return {"requests": len(load), "cpu_s": sorted(seconds)}


def growth(one: LLM) -> dict[str, Any]:
    """So many machines, half for prompts and half for tokens, at the same load each."""
    kind = Kind(Measured.published("Llama-2-70B", "H100"), Limits(splitwise.LLAMA.cache_tokens, 512))
    rows = []
    for machines in (10, 100, 1000):
        for requests in (10_000, 100_000, 1_000_000):
            if requests == 1_000_000 and machines == 10:
                continue
            arrivals = poisson(requests, RATE * machines, LENGTHS, Random(0))
            roles = [Role.PREFILL if number % 2 == 0 else Role.DECODE for number in range(machines)]
            dispatcher = Dispatcher(roles, LeastTokens(machines), LeastTokens(machines), early=True)
            cluster = Apart([kind] * machines, dispatcher, Wires())
            seconds = cpu_s(lambda: cluster.serve(arrivals))  # noqa: B023
            rows.append(
                {"machines": machines, "requests": requests, "cpu_s": seconds, "µs a request": 1e6 * seconds / requests}
            )
            print(rows[-1], flush=True)
    return {"rows": rows}


if __name__ == "__main__":
    run_parts("simulation", {"minute": minute, "growth": growth})
