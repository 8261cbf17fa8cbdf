"""The life of one rank process: join the job, then run one call after the other until told to leave.

It answers two pipes. On `calls` it gets functions and cells and sends back lines, events and results. On `control` a
thread of its own says where the rank stands when asked, and ends the process when the launching one is gone.
"""

from __future__ import annotations

import ast
import io
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

import cloudpickle
import torch
import torch.distributed as dist

from minillm.ranks.backend import Backend
from minillm.ranks.membership import RankContext, context, join
from minillm.ranks.places import Spot, inside_torch, remember_cells, spots_of_frame, spots_of_traceback


@dataclass(frozen=True)
class Seat:
    """What a new rank process is told."""

    rank: int
    world_size: int
    backend: Backend
    store_port: int
    generation: int
    threads: int


@dataclass(frozen=True)
class Failure:
    """An exception of a rank, as far as another process can use it."""

    kind: str
    text: str
    spots: list[Spot]
    library: str  # the traceback's last frames, when the user's own are not the innermost

    @property
    def headline(self) -> str:
        return f"{self.kind}: {self.text}" if self.text else self.kind


class _Pickler(cloudpickle.Pickler):
    """Sends CUDA tensors as CPU tensors, so that the notebook kernel never needs a CUDA context."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.is_cuda:
            return obj.detach().cpu().__reduce_ex__(2)
        return super().reducer_override(obj)


def dumps(value: Any) -> bytes:
    """Pickle a result: functions and classes of cells by value, CUDA tensors as CPU tensors."""
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


class _Lines(io.TextIOBase):
    """A rank's stdout or stderr: whole lines go to the launching process."""

    def __init__(self, calls: Connection, name: str) -> None:
        self._calls, self._name, self._rest = calls, name, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._calls.send(("line", self._name, line))
        return len(text)

    def finish(self) -> None:
        """Send what has no newline yet."""
        if self._rest:
            self.write("\n")


def main(seat: Seat, calls: Connection, control: Connection, board: torch.Tensor) -> None:
    """Entry of a rank process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the stop button interrupts the kernel, which then ends the ranks
    threading.Thread(target=_answer, args=(control, threading.main_thread().ident), daemon=True).start()
    torch.set_num_threads(seat.threads)
    sys.stdout, sys.stderr = _Lines(calls, "stdout"), _Lines(calls, "stderr")
    try:
        store = dist.TCPStore("127.0.0.1", seat.store_port, is_master=False)
        scoped = dist.PrefixStore(str(seat.generation), store)
        memory = memoryview(cast(Any, board.numpy()))
        here = join(seat.rank, seat.world_size, seat.rank, seat.backend, scoped, memory)
    except Exception as error:
        calls.send(("raised", _failure(error)))
        return
    here.send_event = lambda event: calls.send(("event", dumps(event)))
    here.namespace.update(
        rank=here.rank, world_size=here.world_size, device=here.device, torch=torch, dist=dist, context=context
    )
    calls.send(("returned", dumps(None)))
    while _one_call(here, calls):
        pass
    os._exit(0)  # skip torch's and gloo's teardown: the other ranks may be gone already


def _one_call(here: RankContext, calls: Connection) -> bool:
    """Take one message from the launching process; False when it was the last."""
    try:
        message = calls.recv()
    except (EOFError, OSError):
        return False
    if message[0] == "leave":
        return False
    kind, payload, sources = message
    remember_cells(sources)
    reply: tuple[str, Any]
    try:
        if kind == "call":
            function, args, kwargs = cloudpickle.loads(payload)
            reply = ("returned", dumps(function(*args, **kwargs)))
        else:
            reply = ("returned", dumps(_execute(payload, next(iter(sources)), here.namespace)))
    except BaseException as error:  # SystemExit too: a rank that leaves is a fault to report
        reply = ("raised", _failure(error))
    for stream in (sys.stdout, sys.stderr):
        stream.finish()  # type: ignore[union-attr]
    calls.send(reply)
    return True


def _execute(source: str, filename: str, namespace: dict[str, Any]) -> Any:
    """Run a cell; its value is that of its last line, when that is an expression."""
    tree = ast.parse(source, filename)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
    exec(compile(tree, filename, "exec"), namespace)
    return eval(compile(last, filename, "eval"), namespace) if last is not None else None


def _failure(error: BaseException) -> Failure:
    spots = spots_of_traceback(error.__traceback__)
    frames = traceback.extract_tb(error.__traceback__)
    inner = (
        frames[-1] if frames and (frames[-1].filename, frames[-1].lineno) != (spots[-1] if spots else None) else None
    )
    library = f"{os.path.basename(inner.filename)}:{inner.lineno} {inner.name}" if inner else ""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return Failure("SyntaxError", error.msg, [(error.filename, error.lineno)], "")
    return Failure(type(error).__name__, str(error), spots, library)


def _answer(control: Connection, main_thread: int) -> None:
    """Say where the main thread stands, each time the launching process asks; when that is gone, end."""
    while True:
        try:
            control.recv()
            frame = sys._current_frames().get(main_thread)
            control.send((spots_of_frame(frame), inside_torch(frame)))
        except (EOFError, OSError):
            os.kill(os.getpid(), signal.SIGKILL)
