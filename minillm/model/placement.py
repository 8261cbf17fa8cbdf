"""Where a model computes, in which numbers, and with how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minillm.model.config import DTYPE_BYTES


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one CPU thread, as every rank does, so that sums come out the same; then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_device(name: str | None) -> torch.device:
    """The device of this name, or for None a GPU if there is one. Raises `ValueError` for one that there is not."""
    if name not in (None, "cpu", "cuda"):
        raise ValueError(f"device={name!r} is not known; choose 'cpu', 'cuda', or None for a GPU if there is one")
    gpu = torch.cuda.is_available() if name != "cpu" else False
    if name == "cuda" and not gpu:
        raise ValueError("device='cuda' was asked for, but torch sees no GPU here; pass device='cpu'")
    return torch.device("cuda" if gpu else "cpu")


def choose_dtype(name: str | None, device: torch.device, stored: str) -> torch.dtype:
    """The dtype of this name; for None float32 on a CPU, and on a GPU that of the checkpoint, `stored`.

    Raises `ValueError` for a name that is none.
    """
    name = str(name).removeprefix("torch.") if name is not None else (stored if device.type == "cuda" else "float32")
    if name not in DTYPE_BYTES:
        raise ValueError(f"dtype={name!r} is not known; choose one of {', '.join(DTYPE_BYTES)}")
    return getattr(torch, name)
