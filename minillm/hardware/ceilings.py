"""What this machine really reaches: matrix products a second, and bytes a second from memory.

Measured for one rank's share of it: one CPU thread, as every rank computes, or one GPU. torch is loaded only here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil

from minillm.hardware.devices import Device
from minillm.hardware.machine import processor

_GEMM = 1024
_READ_BYTES = 200_000_000


def measure_ceilings(device: str = "cpu", dtype: str = "float32") -> Device:
    """This machine as a `Device`: the best of several short runs, about a second in all.

    The rate is that of a product of 1024 x 1024 matrices (8192 on a GPU); the bandwidth that of adding up 200 MB (1 GB).
    Raises `ValueError` for a device that is not there, and for other dtypes than those of weights.
    """
    import torch

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r}: give 'float32', 'bfloat16' or 'float16'")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device={device!r}: give 'cpu', or 'cuda' where there is a GPU")
    gpu = device == "cuda"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        flops = _gemm_flops_per_s(torch, device, dtype, 8192 if gpu else _GEMM)
        rate = _bytes_per_s(torch, device, 1_000_000_000 if gpu else _READ_BYTES)
    finally:
        torch.set_num_threads(threads)
    name = torch.cuda.get_device_name() if gpu else "this machine, one thread"
    held = torch.cuda.mem_get_info()[1] if gpu else psutil.virtual_memory().total
    return Device(name, {dtype: flops}, rate, float(held), f"measured here, {name if gpu else processor()}")


def _gemm_flops_per_s(torch: Any, device: str, dtype: str, size: int) -> float:
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    best = _best(lambda: a @ a, torch, device, 8)
    if device == "cpu" and dtype == "float32" and torch.backends.mkldnn.is_available():
        with torch.inference_mode():  # the faster of the two libraries that torch multiplies with
            packed = torch.ops.mkldnn._reorder_linear_weight(a)
            multiply = torch.ops.mkldnn._linear_pointwise
            best = min(best, _best(lambda: multiply(a, packed, None, "none", [], ""), torch, device, 8))
    return 2 * size**3 / best


def _bytes_per_s(torch: Any, device: str, count: int) -> float:
    numbers = torch.ones(count // 4, device=device)
    return count / _best(lambda: numbers.sum(), torch, device, 8)


def _best(job: Callable[[], object], torch: Any, device: str, times: int) -> float:
    """The shortest of several runs: a ceiling is what is reached when nothing else is in the way."""
    best = float("inf")
    for _ in range(times + 1):  # the first warms up
        began = time.perf_counter()
        job()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
