"""How much memory a piece of work takes while it runs, beyond what was held before: the peak of its activations.

On a CPU torch's profiler reports every allocation; that takes about half a second more, so it is a pass of its own. On
a GPU the allocator keeps the figure anyway.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def peak_of(job: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """Run `job()`; returns its result, and the most bytes that were allocated in it at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return job(), torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler announces itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        result = job()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return result, peak
