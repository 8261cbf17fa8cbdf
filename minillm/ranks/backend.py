"""Which device and which transport a job of `world_size` ranks gets on this machine.

NCCL when every rank has a GPU of its own; else several ranks on one GPU; else gloo on CPU processes.
Nothing here creates a CUDA context: the notebook kernel may ask.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass

import psutil
import torch

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Backend:
    """Where the ranks compute ("cpu" or "cuda"), and what carries their messages ("gloo" or "nccl").

    With `shared_memory`, ranks of one host whose messages gloo would carry use `shared.py` where it can do it. Of
    `ranks_here` ranks that use this host's GPUs, these begin at the `first`: other jobs have the rest.
    """

    transport: str
    device_type: str
    device_count: int
    shared_memory: bool = True
    first: int = 0
    ranks_here: int = 1

    @property
    def groups(self) -> str:
        """What `torch.distributed.init_process_group` takes. CPU tensors always go by gloo."""
        return "gloo" if self.device_type == "cpu" else f"cpu:gloo,cuda:{self.transport}"

    @property
    def staged(self) -> bool:
        """Whether messages of CUDA tensors are copied through host memory."""
        return self.device_type == "cuda" and self.transport == "gloo"

    def device(self, local_rank: int) -> torch.device:
        """The device of the rank with this number on its host; ranks share GPUs round-robin when there are too few."""
        if self.device_type == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", (self.first + local_rank) % self.device_count)

    @property
    def sharers(self) -> int:
        """How many ranks use one GPU, at most."""
        return -(-self.ranks_here // max(1, self.device_count))

    def describe(self) -> str:
        """One line for people: "gloo on CPU processes"."""
        transport = "NCCL" if self.transport == "nccl" else "gloo"
        if self.device_type == "cpu":
            return f"{transport} on CPU processes"
        return f"{transport} on {self.device_count} GPU{'s' * (self.device_count > 1)}"


def choose_backend(
    world_size: int, device: str | None = None, shared_memory: bool = True, beside: tuple[int, int] | None = None
) -> Backend:
    """The backend for `world_size` ranks; `device` ("cpu" or "cuda") overrides what the machine suggests.

    `beside=(first, total)` says that they are the ones from `first` on of `total` on this host. Raises `ValueError` when
    "cuda" is asked for and there is none.
    """
    if device not in (None, *DEVICES):
        raise ValueError(
            f"device={device!r} is not known; choose one of {', '.join(DEVICES)}, or None for this machine's best"
        )
    gpus = torch.cuda.device_count()
    first, total = beside or (0, world_size)
    if device == "cuda" and gpus == 0:
        raise ValueError("device='cuda' was asked for, but torch sees no GPU here; pass device='cpu'")
    if device == "cpu" or gpus == 0:
        return Backend("gloo", "cpu", 0, shared_memory)
    transport = "nccl" if gpus >= world_size or nccl_shares_gpus() else "gloo"
    return Backend(transport, "cuda", gpus, shared_memory, first, total)


def nccl_shares_gpus() -> bool:
    """Whether this NCCL takes several ranks on one GPU: version 2.30 or newer, and switched on by its variable."""
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        return False
    return tuple(torch.cuda.nccl.version()) >= (2, 30)


def loopback_interface() -> str:
    """The name of the network interface that never leaves this machine."""
    return "lo0" if sys.platform == "darwin" else "lo"


def interface_towards(host: str) -> str | None:
    """The name of the network interface through which this machine reaches another one; None where that cannot be told."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            address = probe.getsockname()[0]
    except OSError:
        return None
    known = psutil.net_if_addrs().items()
    return next((name for name, addresses in known if any(each.address == address for each in addresses)), None)
