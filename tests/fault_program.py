"""The program that the fault tests run on ranks: a list of collectives, and one fault on the way. Light to import."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist


def collective(name: str, size: int) -> None:
    x, rank, world = torch.ones(size), dist.get_rank(), dist.get_world_size()
    if name == "all_reduce":
        dist.all_reduce(x)
    elif name == "broadcast":
        dist.broadcast(x, world - 1)
    elif name == "all_gather":
        dist.all_gather([torch.empty(size) for _ in range(world)], x)
    elif name == "reduce":
        dist.reduce(x, 0)
    elif name == "barrier":
        dist.barrier()
    elif rank % 2 == 0 and rank + 1 < world:
        dist.send(x, rank + 1)
        dist.recv(x, rank + 1)
    elif rank % 2 == 1:
        dist.recv(x, rank - 1)
        dist.send(x, rank - 1)


def program(steps: list[str], size: int, fault: str, culprit: int, at: int) -> None:
    for number, name in enumerate(steps):
        if dist.get_rank() == culprit and number == at:
            if fault == "raise":
                raise ValueError("a fault")
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "exit":
                os._exit(3)
            if fault == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault == "sleep":
                time.sleep(600)
            if fault == "return":
                return
            if fault == "skip":
                continue
            if fault == "other":
                name = "all_reduce" if name != "all_reduce" else "barrier"
            if fault == "shape":
                collective(name, size + 3)
                continue
        collective(name, size)
