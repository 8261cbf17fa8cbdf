"""Publishes every communication on the rank's board before it waits, whoever calls it.

The engine's `comm.Comm` publishes by itself. For a learner's own `torch.distributed` calls, `watch_torch` puts a thin
wrapper round each function, so that a plain `dist.all_reduce(x)` in a cell is diagnosed just the same.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from minillm.ranks.board import Board, Operation, State

FROM_ANYONE = "recv from anyone"
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
LIBRARY = (
    _HERE,
    _TORCH,
    os.path.dirname(os.path.abspath(inspect.__file__)) + os.sep + "multiprocessing" + os.sep,
    "<frozen",
)


def caller() -> str:
    """file:line of the innermost frame that is neither torch's nor this package's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARY):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def wait_for_device() -> None:
    """NCCL returns before the message is through: wait for it here, where the board says that the rank waits."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()


def shape_of(tensor: torch.Tensor) -> str:
    """ "[4, 576] float32"."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


@dataclass
class _Rule:
    """How to read one torch.distributed function: what all members must agree on."""

    tensor: str = ""  # the argument whose shape and dtype must be equal everywhere
    root: str = ""  # the argument that names the one special rank
    peer: str = ""  # "dst" or "src": a send or a receive


_RULES = {
    "all_reduce": _Rule("tensor"),
    "broadcast": _Rule("tensor", "src"),
    "reduce": _Rule("tensor", "dst"),
    "all_gather": _Rule("tensor"),
    "all_gather_into_tensor": _Rule("input_tensor"),
    "reduce_scatter": _Rule("output"),
    "reduce_scatter_tensor": _Rule("output"),
    "gather": _Rule("tensor", "dst"),
    "scatter": _Rule("tensor", "src"),
    "all_to_all": _Rule(),
    "all_to_all_single": _Rule(),
    "barrier": _Rule(),
    "monitored_barrier": _Rule(),
    "all_gather_object": _Rule(),
    "gather_object": _Rule("", "dst"),
    "broadcast_object_list": _Rule("", "src"),
    "scatter_object_list": _Rule("", "src"),
    "new_group": _Rule(),
    "send": _Rule("tensor", peer="dst"),
    "isend": _Rule("tensor", peer="dst"),
    "recv": _Rule("tensor", peer="src"),
    "irecv": _Rule("tensor", peer="src"),
}


class WatchedWork:
    """A torch `Work` that says on the board when its rank starts to wait for it."""

    def __init__(self, work: Any, board: Board, operation: Operation, index: int) -> None:
        self._work, self._board, self._operation, self._index = work, board, operation, index
        self._polled: int | None = None  # the notice of a loop that asks is_completed()

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for the operation, on the board too."""
        number = self._polled or self._board.wait(self._operation, self._index)
        try:
            result = self._work.wait(*args, **kwargs)
            wait_for_device()
        except BaseException:
            self._board.fail(number)
            raise
        self._board.leave(number)
        return result

    def is_completed(self) -> bool:
        """Ask without waiting; a rank that asks again and again counts as waiting."""
        done = self._work.is_completed()
        if not done and self._polled is None:
            self._polled = self._board.wait(self._operation, self._index)
        if done and self._polled is not None:
            self._board.leave(self._polled)
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def p2p_channels(group: str, sender: int, receiver: int, tag: int = 0) -> tuple[str, str]:
    """The two series of a direction: (what the sender has sent, what the receiver has received)."""
    name = f"{group}:{sender}>{receiver}:{tag}"
    return f"send {name}", f"recv {name}"


def watch_torch(board: Board, rank: int) -> None:
    """Wrap the communication functions of `torch.distributed` in this process, once."""
    nested = threading.local()  # object collectives call tensor collectives: only the outermost call is published
    for name, rule in _RULES.items():
        wrapped = _wrap(getattr(c10d, name), name, rule, board, rank, nested)
        setattr(c10d, name, wrapped)
        if hasattr(dist, name):
            setattr(dist, name, wrapped)


def _wrap(
    function: Callable[..., Any], name: str, rule: _Rule, board: Board, rank: int, nested: threading.local
) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if getattr(nested, "inside", False) or not dist.is_initialized():
            return function(*args, **kwargs)
        values = signature.bind(*args, **kwargs).arguments
        operation = _operation(name, rule, values, rank)
        asynchronous = bool(values.get("async_op")) or name in ("isend", "irecv")
        number, index = board.enter(operation, State.ISSUED if asynchronous else State.WAITING)
        nested.inside = True
        try:
            result = function(*args, **kwargs)
            if not asynchronous:
                wait_for_device()
        except BaseException as error:  # refused arguments were no communication; a RuntimeError may be the transport's
            board.fail(number, "" if isinstance(error, RuntimeError) else operation.channel)
            raise
        finally:
            nested.inside = False
        if asynchronous:
            return WatchedWork(result, board, operation, index) if result is not None else None
        if operation.name == FROM_ANYONE and result is not None:
            board.advance(p2p_channels(_label(values), result, rank, values.get("tag") or 0)[1])
        board.leave(number)
        return result

    return watched


def _label(values: dict[str, Any]) -> str:
    group: Any = values.get("group") or c10d.GroupMember.WORLD
    return "world" if group is c10d.GroupMember.WORLD else c10d._get_process_group_name(group)


def _operation(name: str, rule: _Rule, values: dict[str, Any], rank: int) -> Operation:
    group: Any = values.get("group") or c10d.GroupMember.WORLD
    if group == c10d.GroupMember.NON_GROUP_MEMBER:
        return Operation(name, "", f"outside {name}", "", (rank,), caller())
    tensor = values.get(rule.tensor)
    agreed = shape_of(tensor) if isinstance(tensor, torch.Tensor) else ""
    if rule.peer:
        return _p2p(name, rule, values, rank, group, _label(values), agreed)
    if rule.root:
        agreed += f" {rule.root}={_global_rank(values, rule.root, group, default=0)}"
    if "op" in values:
        agreed += f" {values['op']}".replace("RedOpType.", "")
    members = tuple(dist.get_process_group_ranks(group))
    label = _label(values)
    if name == "new_group":
        agreed = f"ranks={values.get('ranks')}"
        if values.get("use_local_synchronization"):
            members = tuple(values.get("ranks") or members)
            label = f"of {members}"
    return Operation(name, agreed.strip(), f"group {label}", "", members, caller())


def _p2p(name: str, rule: _Rule, values: dict[str, Any], rank: int, group: Any, label: str, shape: str) -> Operation:
    peer = _global_rank(values, rule.peer, group, default=None)
    if peer is None:  # recv from anyone
        others = tuple(number for number in dist.get_process_group_ranks(group) if number != rank)
        return Operation(FROM_ANYONE, shape, f"recv {label} any {rank}", "", others, caller())
    ranks = dist.get_process_group_ranks(group)
    if peer not in ranks or peer == rank:
        choices = ", ".join(str(number) for number in ranks if number != rank)
        raise ValueError(
            f"{name}({rule.peer}={peer!r}) on rank {rank}: there is no such other rank; give one of {choices}"
        )
    tag = values.get("tag") or 0
    if rule.peer == "dst":
        mine, theirs = p2p_channels(label, rank, peer, tag)
    else:
        theirs, mine = p2p_channels(label, peer, rank, tag)
    return Operation(name, shape, mine, theirs, (peer,), caller())


def _global_rank(values: dict[str, Any], key: str, group: Any, default: int | None) -> int | None:
    if values.get(f"group_{key}") is not None:
        return dist.get_global_rank(group, values[f"group_{key}"])
    return values[key] if values.get(key) is not None else default
