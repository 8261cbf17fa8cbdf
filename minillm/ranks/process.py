"""Starting and ending rank processes. It knows pipes, pids and the fork server, and nothing of collectives."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from queue import Queue
from typing import Any, cast

import psutil

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
    main: Any = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


@dataclass
class RankProcess:
    """One rank as the launching process holds it. `board` is the shared memory that the rank writes."""

    process: Any
    calls: Connection
    control: Connection
    lifeline: Connection
    board: memoryview
    _outbox: Queue[Any] = field(default_factory=Queue)
    _sending: threading.Lock = field(default_factory=threading.Lock)
    _poster: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        return self.process.exitcode is None

    @property
    def exit_text(self) -> str:
        """ "killed by SIGKILL", "exited with status 3"."""
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exited with status {code}"

    @property
    def stopped(self) -> bool:
        """Whether the process is stopped (SIGSTOP, a debugger)."""
        try:
            return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
        except psutil.Error:
            return False

    @property
    def cpu_s(self) -> float:
        """CPU seconds the process has used; 0 when it is gone."""
        try:
            times = psutil.Process(self.process.pid).cpu_times()
            return times.user + times.system
        except psutil.Error:
            return 0.0

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

    def kill(self) -> None:
        """End the process at once and close its pipes."""
        if self.alive:
            self.process.kill()
        self.process.join(5)
        if self._poster is not None:
            self._outbox.put(None)
        for pipe in (self.calls, self.control, self.lifeline):
            pipe.close()


def kill_all(processes: list[RankProcess]) -> None:
    """End all of them, together, and empty the list."""
    for process in processes:
        if process.alive:
            process.process.kill()
    while processes:
        processes.pop().kill()


def start_rank(seat: Any) -> RankProcess:
    """Start the process that sits on `seat` (a `worker.Seat`)."""
    import torch
    import torch.multiprocessing as torch_multiprocessing

    from minillm.ranks.board import BOARD_BYTES
    from minillm.ranks.worker import main

    context: Any = torch_multiprocessing.get_context(start_method())
    calls, calls_there = context.Pipe()
    control, control_there = context.Pipe()
    lifeline_there, lifeline = context.Pipe(duplex=False)
    board = torch.zeros(BOARD_BYTES, dtype=torch.uint8).share_memory_()
    process = context.Process(target=main, args=(seat, calls_there, control_there, lifeline_there, board), daemon=True)
    with _no_main():
        process.start()
    for pipe in (calls_there, control_there, lifeline_there):
        pipe.close()
    return RankProcess(process, calls, control, lifeline, memoryview(cast(Any, board.numpy())))
