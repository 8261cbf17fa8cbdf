"""Does the simulator say what our own engine does? Step times are fitted on one load, and another load is predicted and run, on the same two
ranks: colocated, and prefill and decode apart.

    python bench/fidelity.py
"""

from __future__ import annotations

import random
from typing import Any

from harness import run_parts

from minillm import LLM, EngineOptions
from minillm.calibrate import calibrate
from minillm.load import drive
from minillm.trace.metrics import percentile
from minillm.trace.workload import Arrival
from minillm.twin import twin_of

OPTIONS = EngineOptions(num_blocks=256, max_running=16, max_step_tokens=512)
ROUNDS, SECONDS, RATE = 3, 25.0, 1.4
SPLIT = "prefill=1xtp=1,decode=1xtp=1"


def load(seed: int) -> list[Arrival]:
    """Poisson arrivals; prompts of 16 to 300 tokens, answers of 8 to 40."""
    draw, arrivals, at = random.Random(seed), [], 0.0
    while (at := at + draw.expovariate(RATE)) < SECONDS:
        arrivals.append(Arrival(at, draw.randint(16, 300), draw.randint(8, 40)))
    return arrivals


def figures(lives: Any) -> dict[str, float]:
    """P50 and P99 of TTFT and TPOT, in ms."""
    return {
        f"P{percent} {kind.upper()}": 1e3 * percentile([getattr(life, f"{kind}_s") for life in lives], percent).value
        for kind in ("ttft", "tpot")
        for percent in (50, 99)
    }


def fidelity(one: LLM) -> dict[str, Any]:
    """Predicted over measured, seed by seed."""
    with (
        LLM(one.folder, SPLIT, device="cpu", options=OPTIONS) as split,
        LLM(one.folder, "dp=2", device="cpu", options=OPTIONS) as two,
    ):
        found = calibrate(split)
        print(found.as_text(), flush=True)
        raw: dict[str, list[dict[str, Any]]] = {"dp=2": [], SPLIT: []}
        for seed in range(ROUNDS):
            for layout, llm in (("dp=2", two), (SPLIT, split)):
                measured = figures(drive(llm, load(seed), seed).lives)
                predicted = figures(twin_of(llm, found).serve(load(seed)))
                raw[layout].append({"measured_ms": measured, "predicted_ms": predicted})
                print(
                    layout,
                    seed,
                    {name: (round(predicted[name]), round(measured[name])) for name in measured},
                    flush=True,
                )
    off = {
        layout: {
            name: [each["predicted_ms"][name] / each["measured_ms"][name] - 1 for each in rounds]
            for name in rounds[0]["measured_ms"]
        }
        for layout, rounds in raw.items()
    }
    return {"calibration": found.as_dict(), "predicted over measured, less 1": off, "raw": raw}


if __name__ == "__main__":
    run_parts("fidelity", {"fidelity": fidelity})
