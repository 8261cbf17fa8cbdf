"""What recording costs: decode steps of the engine with the trace's clocks on and off, and a step's counts alone.

`python bench/trace.py`, one thread, SmolLM2 float32; raw figures in results/trace.json.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from harness import ratio, save, side_by_side, summary, timed

from minillm import LLM, SamplingParams
from minillm.engine.engine import Engine
from minillm.engine.runner import LocalRunner, step_span
from minillm.trace.recorder import Recorder

ROUNDS, STEPS = 15, 24


def prefilled(llm: LLM, count: int, params: SamplingParams, timing: bool) -> Engine:
    """An engine in which `count` requests decode."""
    engine = Engine(LocalRunner(llm.model, llm.options), llm.options, Recorder(timing=timing))
    requests = llm.prepare([[5] * 64] * count, params)
    for number, request in enumerate(requests):
        request.scheduled.request_id = number
    engine.add(requests)
    while any(request.scheduled.remaining > 1 for request in requests):
        engine.step()
    return engine


def decode_step(llm: LLM, count: int, timing: bool) -> Any:
    """A job: `STEPS` decode steps of `count` sequences through schedule, run and postprocess."""
    params = SamplingParams(max_tokens=STEPS * (ROUNDS + 1) + 2, ignore_eos=True)
    engine = prefilled(llm, count, params, timing)

    def job() -> None:
        for _ in range(STEPS):
            engine.step()

    return job


def recording_alone(llm: LLM, count: int) -> float:
    """Seconds that one step's span takes by itself, its formulas included."""
    engine = prefilled(llm, count, SamplingParams(max_tokens=9), True)
    work, runner = engine.schedule(), engine.runner

    def job() -> None:
        for _ in range(1000):
            with step_span(runner.recorder, llm.config, work, llm.model.dtype):
                pass

    return statistics.median(timed(job) for _ in range(5)) / 1000


def main() -> None:
    """Measure, print, and store."""
    torch.set_num_threads(1)
    llm = LLM(device="cpu")
    figures: dict[str, Any] = {}
    for count in (1, 16):
        jobs = {"timing on": decode_step(llm, count, True), "timing off": decode_step(llm, count, False)}
        seconds = side_by_side(jobs, ROUNDS)
        step_s = statistics.median(seconds["timing on"]) / STEPS
        alone_s = recording_alone(llm, count)
        row = {
            "step": {name: summary([each / STEPS for each in all_of]) for name, all_of in seconds.items()},
            "on over off": ratio(seconds["timing on"], seconds["timing off"]),
            "recording alone, us": alone_s * 1e6,
            "recording alone, share of a step": alone_s / step_s,
            "raw_s": seconds,
        }
        figures[f"decode, batch {count}"] = row
        print(
            f"batch {count}: a step {step_s * 1e3:.1f} ms, clocks on over off {row['on over off']['median']:.3f}"
            f" ({row['on over off']['min']:.3f}–{row['on over off']['max']:.3f}), recording alone {alone_s * 1e6:.0f} us,"
            f" {alone_s / step_s:.2%} of a step"
        )
    save("trace", figures)


if __name__ == "__main__":
    main()
