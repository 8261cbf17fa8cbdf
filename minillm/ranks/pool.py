"""`Ranks`: processes that stay, to run functions and cells on."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn, Protocol

import cloudpickle
import torch.distributed as dist

from minillm.hardware.machine import usable_cores
from minillm.ranks.backend import Backend, choose_backend
from minillm.ranks.call import Call
from minillm.ranks.errors import RankError
from minillm.ranks.job import Job
from minillm.ranks.places import cell_sources, remember_cells
from minillm.ranks.process import Here, RankProcess, kill_all, warm_up
from minillm.ranks.signals import uninterrupted
from minillm.ranks.worker import Seat

MAX_RANKS = 256
START_TIMEOUT_S = 120.0


class Place(Protocol):
    """Where a rank can be started; on host number `node` it is number `local_rank`."""

    node: int
    local_rank: int

    def start(self, seat: Seat) -> RankProcess: ...


class Ranks:
    """`world_size` processes, one per rank, each with its own memory and device.

    `device` is "cpu", "cuda" or None for the machine's best; `timeout_s` is how long a rank may keep others waiting
    without getting on; `threads` is how many CPU threads each rank uses; with `shared_memory` sums, gathers and broadcasts of the engine
    go by it where gloo would carry them, on processors that allow it; `beside=(first, total)` says that they are the ones
    from `first` on of `total` ranks that share this host's GPUs. `places` are where the ranks are, if not here (`launch.py`),
    and `address` is where they find this process. The processes start at the first call, stay
    until `close()`, and end with this process whatever happens to it. Raises `ValueError` for a size or device that
    cannot be.
    """

    def __init__(
        self,
        world_size: int,
        *,
        device: str | None = None,
        timeout_s: float = 10.0,
        threads: int = 1,
        shared_memory: bool = True,
        beside: tuple[int, int] | None = None,
        places: Sequence[Place] = (),
        address: str = "127.0.0.1",
    ) -> None:
        if isinstance(world_size, bool) or not isinstance(world_size, int) or not 1 <= world_size <= MAX_RANKS:
            raise ValueError(f"world_size={world_size!r}: give a whole number of ranks from 1 to {MAX_RANKS}")
        if not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s!r}: give a number of seconds above 0")
        if not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads={threads!r}: give a whole number from 1")
        if multiprocessing.current_process().daemon:
            raise ValueError("a rank cannot start ranks of its own: make them in the notebook or script, side by side")
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.threads = threads
        self.backend: Backend = choose_backend(world_size, device, shared_memory, beside)
        self.places = list(places) or [Here(rank) for rank in range(world_size)]
        self._address = address
        self._store: dist.TCPStore | None = None
        self._generation = 0
        self._processes: list[RankProcess] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(
            self, kill_all, self._processes
        )  # also at exit, before multiprocessing waits
        self._closed = False
        self.last_error: RankError | None = None  # of the last call that failed
        warm_up()

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        on_event: Callable[[int, Any], None] | None = None,
        stream: bool = False,
        limit_s: float | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Run `fn(*args, **kwargs)` on every rank; returns what each returned, in rank order.

        `fn` may be defined in a cell. Lines that the ranks print appear in rank order when the call ends, or at once
        with `stream=True`. `on_event(rank, event)` gets what a rank sends with `context().emit(event)`, while it runs.
        A call that takes longer than `limit_s` is ended, even when no rank waits for another.
        Raises `RankError` when a rank fails or the ranks cannot go on, and `KeyboardInterrupt` when stopped.
        """
        if limit_s is not None and not (isinstance(limit_s, (int, float)) and limit_s > 0):
            raise ValueError(f"limit_s={limit_s!r}: give a number of seconds above 0")
        return self._call(_message(fn, args, kwargs), on_event, stream, limit_s)

    def begin(
        self, fn: Callable[..., Any], *args: Any, on_event: Callable[[int, Any], None] | None = None, **kwargs: Any
    ) -> Call:
        """Start `fn(*args, **kwargs)` on every rank and return at once; the call's `poll` and `result` take what comes.

        Meanwhile the ranks take no other call. Raises `RankError` when they cannot start.
        """
        with uninterrupted(), ExitStack() as held:
            held.enter_context(self._alone())
            job = self._send(_message(fn, args, kwargs), on_event, stream=True)
            return Call(job, held.pop_all())

    def post(self, rank: int, message: Any) -> None:
        """Send something to one rank, which finds it with `context().posted()`, in the call under way or in the next one.

        A rank that is gone does not get it; the call tells.
        """
        if not self._processes:
            self.start()
        self._processes[rank].post(("post", cloudpickle.dumps(message)))

    @property
    def generation(self) -> int:
        """How often the processes were started: what they held before is gone."""
        return self._generation

    def run_cell(self, source: str, filename: str = "<ranks cell>", stream: bool = False) -> list[Any]:
        """Run source text on every rank, in a namespace that persists there; returns each one's last expression.

        The names `rank`, `world_size`, `device`, `torch`, `dist` and `context` are there from the start.
        """
        remember_cells({filename: source})  # so that errors quote its lines
        return self._call(("cell", source, {filename: source}), None, stream)

    def close(self) -> None:
        """End the processes. Safe to call twice."""
        self._closed = True
        kill_all(self._processes)
        self._store = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("Ranks stay where they were made: in a function that runs on ranks, use context() instead")

    def __repr__(self) -> str:
        return f"Ranks({self.world_size}, {self.backend.describe()})"

    def describe(self) -> str:
        """What a picture's caption says of these ranks: "4 CPU processes on 2 cores, gloo"."""
        if self.backend.device_type == "cpu":
            return f"{self.world_size} CPU processes on {usable_cores()} cores, gloo"
        return f"{self.world_size} ranks, {self.backend.describe()}"

    @property
    def pids(self) -> list[int]:
        """The processes' ids, in rank order; empty before the first call."""
        return [process.pid for process in self._processes]

    def start(self) -> None:
        """Start the processes now rather than at the first call."""
        if self.alive:
            return
        with self._alone():
            self._start()

    def _start(self) -> None:
        if self._closed:
            raise ValueError("these ranks are closed; make new ones with Ranks(…)")
        if self.alive:
            return
        kill_all(self._processes)  # one has ended while none was called
        if self._store is None:
            self._store = _new_store(self._address)
        self._generation += 1
        port, environment = self._store.port, dict(os.environ)
        nodes = tuple(place.node for place in self.places)
        for rank, place in enumerate(self.places):
            seat = Seat(
                rank, self.world_size, place.local_rank, nodes, self.backend, self._address, port, self._generation, self.threads,
                environment,
            )  # fmt: skip
            self._processes.append(place.start(seat))
        Job(self._processes, self.timeout_s, limit_s=START_TIMEOUT_S, starting=True).finish()

    @property
    def alive(self) -> bool:
        """Whether the processes were started, and none has ended."""
        return bool(self._processes) and all(process.alive for process in self._processes)

    def _call(
        self,
        message: tuple[Any, ...],
        on_event: Callable[[int, Any], None] | None,
        stream: bool,
        limit_s: float | None = None,
    ) -> list[Any]:
        with self._alone():
            return self._send(message, on_event, stream, limit_s).finish()

    def _send(
        self,
        message: tuple[Any, ...],
        on_event: Callable[[int, Any], None] | None,
        stream: bool,
        limit_s: float | None = None,
    ) -> Job:
        self._start()
        job = Job(self._processes, self.timeout_s, on_event, stream, limit_s)
        job.send(message)
        return job

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One call at a time; one that fails ends the processes, unless all of them can go on."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("these ranks are busy with another call; wait for it, or make other Ranks")
        try:
            yield
        except BaseException as error:
            self.last_error = error if isinstance(error, RankError) else None
            if not (isinstance(error, RankError) and error.verdict.recoverable):
                kill_all(self._processes)
            raise
        finally:
            self._lock.release()


def _message(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a rank gets to run a function. Raises `ValueError` for what is none."""
    if not callable(fn):
        raise ValueError(f"run takes a function, not a {type(fn).__name__}: write ranks.run(function, arguments …)")
    code = getattr(fn, "__code__", None)
    sources = cell_sources({code.co_filename} if code else set())
    return "call", cloudpickle.dumps((fn, args, kwargs)), sources


def _new_store(address: str) -> dist.TCPStore:
    """Where ranks find each other: a port of the system's choice, on the loopback interface alone if they are all here."""
    listener = socket.socket()
    listener.bind((address if address == "127.0.0.1" else "", 0))
    listener.listen()
    port = listener.getsockname()[1]
    return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
