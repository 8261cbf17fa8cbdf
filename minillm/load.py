"""Load on an engine: requests that come at their own times, whether it keeps up or not (an open loop)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from random import Random

from minillm.engine.session import WAIT_S
from minillm.llm import LLM
from minillm.model.sampling import SamplingParams
from minillm.trace.trace import Trace
from minillm.trace.workload import Arrival


def drive(llm: LLM, arrivals: Sequence[Arrival], seed: int = 0, prefix: Sequence[int] = ()) -> Trace:
    """Serve the requests as they come, and return the trace with their lives.

    Prompts are random tokens of the lengths asked, after the shared `prefix`; a request arrives when it was meant to,
    also while a step runs. Raises `ValueError` for a request that can never fit, before anything runs.
    """
    random = Random(seed)
    vocabulary = range(llm.config.vocab_size // 2)
    ordered = sorted(arrivals, key=lambda arrival: arrival.time_s)
    prompts = [[*prefix, *random.choices(vocabulary, k=arrival.prompt_tokens)] for arrival in ordered]
    params = [SamplingParams(max_tokens=arrival.new_tokens, ignore_eos=True) for arrival in ordered]
    requests = llm.prepare(prompts, params)
    coming = deque(zip((arrival.time_s for arrival in ordered), requests))
    llm.new_trace()
    began_s = time.monotonic()
    try:
        while coming or llm.engine.requests:
            while coming and coming[0][0] <= time.monotonic() - began_s:
                at_s, request = coming.popleft()
                llm.submit([request], began_s + at_s)
            next_s = max(0.0, began_s + coming[0][0] - time.monotonic()) if coming else WAIT_S
            if llm.engine.requests:
                llm.step(min(next_s, WAIT_S))
            else:
                time.sleep(next_s)
    finally:  # an interrupt ends them all
        llm.cancel(requests)
    return llm.trace
