"""The life of one rank process: join the job, then run one call after the other until told to leave.

It answers two pipes. On `calls` it gets functions and cells and sends back lines, events and results. On `control` a
thread of its own says where the rank stands when asked, and ends the process when the launching one is gone.
"""

from __future__ import annotations

import ast
import fcntl
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
    """What a new rank process is told. `nodes` are the hosts of all ranks, by number; `local_rank` counts on its own."""

    rank: int
    world_size: int
    local_rank: int
    nodes: tuple[int, ...]
    backend: Backend
    store_host: str
    store_port: int
    generation: int
    threads: int
    environment: dict[str, str]  # of the launching process, as it is now


@dataclass(frozen=True)
class Failure:
    """An exception of a rank, as far as another process can use it."""

    kind: str
    text: str
    spots: list[Spot]
    library: str  # the traceback's last frames, when the user's own are not the innermost
    fatal: bool = False  # the rank ends with it

    @property
    def headline(self) -> str:
        first = next(iter(self.text.splitlines()), "")
        return f"{self.kind}: {first}" if first else self.kind


class _Pickler(cloudpickle.Pickler):
    """Sends CUDA tensors as CPU tensors, so that the notebook kernel never needs a CUDA context."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.is_cuda:
            return obj.detach().cpu().__reduce_ex__(2)
        if isinstance(obj, torch.Tensor) and obj.untyped_storage().nbytes() > 2 * obj.nbytes and not obj.requires_grad:
            return obj.clone().__reduce_ex__(2)  # a small view of something large
        return super().reducer_override(obj)


def dumps(value: Any) -> bytes:
    """Pickle a result: functions and classes of cells by value, CUDA tensors as CPU tensors."""
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


class Channel:
    """The pipe to the launching process, for several threads."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()
        self.recv, self.poll = pipe.recv, pipe.poll

    def send(self, message: Any) -> None:
        """Send one message whole."""
        with self._lock:
            self._pipe.send(message)


class _Lines(io.TextIOBase):
    """A rank's stdout or stderr: whole lines go to the launching process."""

    def __init__(self, calls: Channel, name: str) -> None:
        self._calls, self._name, self._rest = calls, name, ""
        self._lock = threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._calls.send(("line", self._name, line))
        return len(text)

    def finish(self) -> None:
        """Send what has no newline yet."""
        if self._rest:
            self.write("\n")


def main(seat: Seat, pipe: Connection, control: Connection, lifeline: Connection, board: torch.Tensor) -> None:
    """Entry of a rank process."""
    end_with(lifeline)
    os.environ.clear()
    os.environ.update(seat.environment, **_launcher_names(seat))
    calls = Channel(pipe)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the stop button interrupts the kernel, which then ends the ranks
    threading.Thread(target=_answer, args=(control, threading.main_thread().ident), daemon=True).start()
    torch.set_num_threads(seat.threads)
    streams = _Lines(calls, "stdout"), _Lines(calls, "stderr")
    sys.stdout, sys.stderr = streams
    try:
        store = dist.TCPStore(seat.store_host, seat.store_port, is_master=False)
        scoped = dist.PrefixStore(str(seat.generation), store)
        memory = memoryview(cast(Any, board.numpy()))
        here = join(seat.rank, seat.nodes, seat.local_rank, seat.backend, scoped, memory, leader=seat.store_host)
    except Exception as error:
        calls.send(("raised", _failure(error)))
        return
    here.send_event = lambda event: calls.send(("event", dumps(event)))
    here.take_posts = lambda timeout_s: _take_posts(here, calls, timeout_s)
    here.namespace.update(
        rank=here.rank, world_size=here.world_size, device=here.device, torch=torch, dist=dist, context=context
    )
    calls.send(("returned", dumps(None)))
    while _one_call(here, calls, streams):
        pass
    os._exit(0)  # skip torch's and gloo's teardown: the other ranks may be gone already


def _launcher_names(seat: Seat) -> dict[str, str]:
    """What `torchrun` would say to this rank, for libraries that look there, such as accelerate."""
    device = seat.backend.device(seat.local_rank).index  # which is what others take a local rank for
    names = {
        "RANK": seat.rank,
        "WORLD_SIZE": seat.world_size,
        "LOCAL_RANK": seat.local_rank if device is None else device,
        "LOCAL_WORLD_SIZE": seat.nodes.count(seat.nodes[seat.rank]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    return {name: str(value) for name, value in names.items()}


def end_with(lifeline: Connection) -> None:
    """Be killed when the launching process is gone, even while stopped or holding the interpreter: Linux does it.

    The other end of `lifeline` is never written; when its holder ends, the system sends this process SIGKILL.
    """
    if sys.platform == "linux":
        descriptor = lifeline.fileno()
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)


def _one_call(here: RankContext, calls: Channel, streams: tuple[_Lines, _Lines]) -> bool:
    """Take one message from the launching process; False when it was the last."""
    try:
        message = calls.recv()
    except (EOFError, OSError):
        return False
    if message[0] == "post":  # for the next call
        here.posts.append(cloudpickle.loads(message[1]))
        return True
    kind, payload, sources = message
    remember_cells(sources)
    reply: tuple[str, Any]
    try:
        if kind == "call":
            function, args, kwargs = cloudpickle.loads(payload)
            value = function(*args, **kwargs)
        else:
            value = _execute(payload, next(iter(sources)), here.namespace)
        reply = _returned(value)
    except BaseException as error:  # SystemExit too: a rank that leaves is a fault to report
        reply = ("raised", _failure(error))
    if not dist.is_initialized():
        text = "dist.destroy_process_group() was called: leave the default group to Ranks"
        reply = ("raised", Failure("RuntimeError", text, [], "", fatal=True))
    for stream in streams:
        stream.finish()
    calls.send(reply)
    return dist.is_initialized()


def _take_posts(here: RankContext, calls: Channel, timeout_s: float) -> None:
    """Read what was posted, within a call; wait for at most `timeout_s` when there is nothing."""
    while calls.poll(0.0 if here.posts else timeout_s):
        _, payload = calls.recv()
        here.posts.append(cloudpickle.loads(payload))


def _returned(value: Any) -> tuple[str, Any]:
    try:
        return ("returned", dumps(value))
    except Exception as error:
        text = f"what this rank returned, a {type(value).__name__}, cannot be sent: {_text_of(error)}"
        return ("raised", Failure("TypeError", text, [], ""))


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its text cannot be shown)"


def _execute(source: str, filename: str, namespace: dict[str, Any]) -> Any:
    """Run a cell; its value is that of its last line, when that is an expression."""
    tree = ast.parse(source, filename)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
    exec(compile(tree, filename, "exec", dont_inherit=True), namespace)
    return eval(compile(last, filename, "eval", dont_inherit=True), namespace) if last is not None else None


def _failure(error: BaseException) -> Failure:
    spots = spots_of_traceback(error.__traceback__)
    frames = traceback.extract_tb(error.__traceback__)
    inner = (
        frames[-1] if frames and (frames[-1].filename, frames[-1].lineno) != (spots[-1] if spots else None) else None
    )
    library = f"{os.path.basename(inner.filename)}:{inner.lineno} {inner.name}" if inner else ""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return Failure("SyntaxError", error.msg, [(error.filename, error.lineno)], "")
    return Failure(type(error).__name__, _text_of(error), spots[-20:], library)


def _answer(control: Connection, main_thread: int) -> None:
    """Say where the main thread stands, each time the launching process asks; when that is gone, end."""
    while True:
        try:
            question = control.recv()
            frame = sys._current_frames().get(main_thread)
            control.send((question, spots_of_frame(frame), inside_torch(frame)))
        except (EOFError, OSError):
            os.kill(os.getpid(), signal.SIGKILL)
