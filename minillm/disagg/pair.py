"""A process group of two ranks of different instances, gloo's or NCCL's, by which parts of a KV cache go from the one to the other."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minillm.ranks.backend import Backend
from minillm.ranks.comm import make_group
from minillm.ranks.watch import wait_for_device

LIMIT = timedelta(seconds=10)  # how long one side may keep the other waiting
SENDER, RECEIVER = 0, 1


class Pair:
    """One side of it: `place` is `SENDER` or `RECEIVER`; they meet by a file at `path` when the first part goes. Instances come and go,
    and so do the pairs between their ranks: a group of two is lost with either, and no other group knows. Methods raise
    `RuntimeError` when the other side is gone or keeps us waiting, and `OSError` when the folder is gone.
    """

    def __init__(self, path: Path, place: int, backend: Backend, device: torch.device) -> None:
        self._path, self._place, self._backend = path, place, backend
        self._device = torch.device("cpu") if backend.staged else device  # where the transport finds tensors
        self._group: Any = None

    def _meet(self) -> Any:
        """The group, made when the first part goes. (`cached_property` would let all pairs of a process wait for one that waits.)"""
        if self._group is None:
            self._use_device()
            self._path.touch()  # where the folder is gone, the store would look for it for minutes
            store = dist.FileStore(str(self._path), 2)
            store.set_timeout(LIMIT)
            self._group = make_group(store, self._place, 2, self._backend, local=True, limit=LIMIT)
        return self._group

    def send(self, tensor: torch.Tensor) -> None:
        """Send a tensor; returns when it may be changed."""
        group = self._meet()
        group.send([tensor.to(self._device).contiguous()], RECEIVER, 0).wait()
        wait_for_device()

    def recv(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Receive so many numbers."""
        group, room = self._meet(), torch.empty(count, dtype=dtype, device=self._device)
        group.recv([room], SENDER, 0).wait()
        wait_for_device()
        return room

    def _use_device(self) -> None:
        """The thread that sends or receives works on the rank's GPU, as NCCL wants it."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
