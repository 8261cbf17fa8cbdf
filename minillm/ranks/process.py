"""Starting and ending rank processes. It knows pipes, pids and the fork server, and nothing of collectives."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from queue import Queue
from typing import Any, cast

import psutil

JOIN_S = 5.0  # how long killed processes may take to be gone
_hiding = threading.Lock()
PRELOAD = ["minillm.ranks.worker", "minillm.parallel.member"]  # what every rank will need


def start_method() -> str:
    """ "forkserver" where the system has it, else "spawn" (slower: every rank imports torch for itself)."""
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def warm_up() -> None:
    """Start the fork server, which imports torch while this process goes on. Returns at once."""
    if start_method() == "forkserver":
        multiprocessing.set_forkserver_preload(PRELOAD)
        with _no_main():
            forkserver.ensure_running()


@contextmanager
def _no_main() -> Iterator[None]:
    """Hide the main module's file, so that a new process does not run the user's script a second time."""
    with _hiding:  # pools start side by side
        main: Any = sys.modules["__main__"]
        hidden: dict[str, Any] = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
        main.__spec__ = None
        try:
            yield
        finally:
            vars(main).update(hidden)


@dataclass
class RankProcess:
    """One rank as the launching process holds it. `board` is the memory that the rank writes, or a copy of it.

    `exit_code` is None while it runs. Subclasses say where the process is.
    """

    calls: Connection
    control: Connection
    board: memoryview
    _outbox: Queue[Any] = field(default_factory=Queue, init=False)
    _sending: threading.Lock = field(default_factory=threading.Lock, init=False)
    _poster: threading.Thread | None = field(default=None, init=False)

    @property
    def pid(self) -> int:
        """Its process id, on its host."""
        raise NotImplementedError

    @property
    def exit_code(self) -> int | None:
        """What it exited with, or minus the signal that killed it; None while it runs."""
        raise NotImplementedError

    @property
    def sentinel(self) -> Any:
        """What `multiprocessing.connection.wait` can wait for, until it has ended."""
        raise NotImplementedError

    @property
    def stopped(self) -> bool:
        """Whether the process is stopped (SIGSTOP, a debugger)."""
        raise NotImplementedError

    @property
    def cpu_s(self) -> float:
        """CPU seconds the process has used; 0 when it is gone."""
        raise NotImplementedError

    def join(self, timeout_s: float) -> None:
        """Wait until it has ended."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Have `board` as the rank has it now, where it is a copy."""

    def end(self) -> None:
        """Kill the process, and do not wait."""
        raise NotImplementedError

    @property
    def alive(self) -> bool:
        return self.exit_code is None

    @property
    def exit_text(self) -> str:
        """ "killed by SIGKILL", "exited with status 3"."""
        code = self.exit_code
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exited with status {code}"

    def send(self, message: Any) -> None:
        """Send a message on `calls`, whole, after all that was posted before; waits while the rank does not read."""
        self._outbox.join()
        with self._sending:
            self.calls.send(message)

    def post(self, message: Any) -> None:
        """Send a message on `calls` some time, and return at once: a rank that waits for us to read may not read itself.

        A rank that is gone does not get it.
        """
        if self._poster is None:
            self._poster = threading.Thread(target=self._post_all, name="minillm posts", daemon=True)
            self._poster.start()
        self._outbox.put(message)

    def _post_all(self) -> None:
        for message in iter(self._outbox.get, None):
            with self._sending, suppress(OSError, ValueError):  # closed
                self.calls.send(message)
            self._outbox.task_done()
        self._outbox.task_done()

    def kill(self, wait_s: float = JOIN_S) -> None:
        """End the process at once and close its pipes."""
        if self.alive:
            self.end()
        self.join(wait_s)
        if self._poster is not None:
            self._outbox.put(None)
        self.close_pipes()

    def close_pipes(self) -> None:
        """Let go of what leads to it."""
        self.calls.close()
        self.control.close()


@dataclass
class LocalProcess(RankProcess):
    """A rank on this host, a child of the fork server."""

    process: Any
    lifeline: Connection

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        return self.process.exitcode

    @property
    def sentinel(self) -> Any:
        return self.process.sentinel

    @property
    def stopped(self) -> bool:
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        except psutil.Error:
            return False

    @property
    def cpu_s(self) -> float:
        try:
            times = psutil.Process(self.pid).cpu_times()
            return times.user + times.system
        except psutil.Error:
            return 0.0

    def join(self, timeout_s: float) -> None:
        self.process.join(timeout_s)

    def end(self) -> None:
        self.process.kill()

    def close_pipes(self) -> None:
        super().close_pipes()
        self.lifeline.close()


def kill_all(processes: list[RankProcess]) -> None:
    """End all of them, together, and empty the list."""
    for process in processes:
        if process.alive:
            process.end()
    deadline = time.monotonic() + JOIN_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    while processes:
        processes.pop().kill(0.0)


class Here:
    """A place for a rank on this host: its number among those here, and the host's number in the job."""

    def __init__(self, local_rank: int, node: int = 0) -> None:
        self.local_rank, self.node = local_rank, node

    def start(self, seat: Any) -> RankProcess:
        """Start the process that sits on `seat` (a `worker.Seat`)."""
        context: Any = torch_context()
        calls, calls_there = context.Pipe()
        control, control_there = context.Pipe()
        return start_rank(seat, (calls, calls_there), (control, control_there))


def torch_context() -> Any:
    """Python's multiprocessing, with torch's ways to send tensors."""
    import torch.multiprocessing as torch_multiprocessing

    return torch_multiprocessing.get_context(start_method())


def start_rank(seat: Any, calls: tuple[Connection, Connection], control: tuple[Connection, Connection]) -> LocalProcess:
    """Start the process that sits on `seat`, with our end and its own of each pipe."""
    import torch

    from minillm.ranks.board import BOARD_BYTES
    from minillm.ranks.worker import main

    context = torch_context()
    lifeline_there, lifeline = context.Pipe(duplex=False)
    board = torch.zeros(BOARD_BYTES, dtype=torch.uint8).share_memory_()
    process = context.Process(target=main, args=(seat, calls[1], control[1], lifeline_there, board), daemon=True)
    with _no_main():
        process.start()
    for pipe in (calls[1], control[1], lifeline_there):
        pipe.close()
    return LocalProcess(calls[0], control[0], memoryview(cast(Any, board.numpy())), process, lifeline)
