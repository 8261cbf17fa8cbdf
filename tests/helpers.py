"""What several tests need: processes that must be gone, errors that must be raised."""

from __future__ import annotations

import os
import time

import psutil
import torch
import torch.distributed as dist
from hypothesis import strategies as st

from minillm.policy.queue import PROMPT_ORDERS


def gone(pids: list[int], within_s: float = 5.0) -> bool:
    """Whether none of these processes runs any more (a zombie has ended)."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def total() -> float:
    """Sum the rank numbers over all ranks."""
    x = torch.full((4,), float(dist.get_rank()))
    dist.all_reduce(x)
    return x[0].item()


EXAMPLES = int(os.environ.get("MINILLM_EXAMPLES", "60"))  # more in `make soak`
SWITCHES = {
    **{name: st.booleans() for name in ("continuous", "chunked_prefill", "preemption", "prefix_reuse")},
    "prompt_order": st.sampled_from(list(PROMPT_ORDERS)),
    "prompt_window": st.integers(1, 4),
}
