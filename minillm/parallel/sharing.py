"""Weights that replicas on one host have together: read from the checkpoint once, and kept in memory that all of them map.

What oneDNN packs can lie only in a process's own memory: it comes here for the time of loading, so that one rank reads the
file for all. The others, such as the embedding and a tied LM head, stay here, once for all replicas. Linux only, for CPUs.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minillm.model.linear import packable


class Memory:
    """Memory of the process that makes it. Others of the same user can map it by its `path`, as long as this object lives; who
    has mapped it keeps it.
    """

    def __init__(self, name: str) -> None:
        self._number = os.memfd_create(name)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._number}")
        weakref.finalize(self, os.close, self._number)

    def __reduce__(self) -> tuple[type[Path], tuple[str]]:
        """Other processes get its path."""
        return Path, (str(self.path),)


@dataclass(frozen=True)
class SharedWeights:
    """Where rank r of every replica finds its part: `kept[r]` and, while replicas load, `passing[r]`; `filled` when a replica
    has put it there. Ranks get the paths.
    """

    kept: tuple[Any, ...]
    passing: tuple[Any, ...] = ()
    filled: bool = False

    def fill(self, model: nn.Module, rank: int) -> int:
        """Move the weights of a rank that has read them here; the model has the kept ones from here. Returns their bytes."""
        kept, passing = _sorted(model)
        for path, parameters in ((self.kept[rank], kept), (self.passing[rank], passing)):
            for parameter, memory in zip(parameters, _map(path, parameters)):
                memory.copy_(parameter.data)
        return self.join(model, rank)

    def take(self, model: nn.Module, rank: int, dtype: torch.dtype) -> int:
        """Give a model, built and not loaded, what another replica's rank has put here. Returns the bytes of the kept ones."""
        _make_room(model, dtype)
        passing = _sorted(model)[1]
        for parameter, memory in zip(passing, _map(self.passing[rank], passing)):
            parameter.data = memory
        return self.join(model, rank)

    def join(self, model: nn.Module, rank: int) -> int:
        """Let a model have the kept weights from here, and drop its own."""
        kept = _sorted(model)[0]
        for parameter, memory in zip(kept, _map(self.kept[rank], kept)):
            parameter.data = memory
        return sum(parameter.nbytes for parameter in kept)


def _sorted(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that can stay here, and those that will be packed; in the same order on every replica."""
    leave = {id(linear.weight) for linear in packable(model)}
    each = list(model.parameters())
    return [one for one in each if id(one) not in leave], [one for one in each if id(one) in leave]


def _make_room(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters of the same shapes on the CPU; memory that is never written costs nothing."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in made:
                made[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=dtype), requires_grad=False)
            module.register_parameter(name, made[id(old)])


def share_weights(ranks: int) -> SharedWeights | None:
    """Memory for replicas of so many ranks; None where the system does not have it."""
    try:
        kept, passing = [tuple(Memory("minillm weights") for _ in range(ranks)) for _ in range(2)]
    except (AttributeError, OSError):  # no Linux, or forbidden
        return None
    return SharedWeights(kept, passing)


def _map(path: Path, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Memory for the parameters, one after the other from the beginning of a file."""
    counts = [parameter.numel() for parameter in parameters]
    if not counts:
        return []
    whole = torch.from_file(str(path), shared=True, size=sum(counts), dtype=parameters[0].dtype)
    return [part.view(each.shape) for part, each in zip(whole.split(counts), parameters)]
