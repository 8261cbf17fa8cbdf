"""`Ranks`: processes that stay, to run functions and cells on; and the watch that ends a job that cannot end.

A call sends a function to every rank and waits for all replies. While it waits it looks at the ranks' boards; when a
rank died, raised, disagrees or is missing, `diagnosis` names the culprit and a `RankError` ends the call.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import cloudpickle
import torch.distributed as dist

from minillm.ranks import board
from minillm.ranks.backend import Backend, choose_backend
from minillm.ranks.diagnosis import (
    Life,
    Rank,
    blockers,
    find_disagreement,
    find_fault,
    find_late,
    find_leftover,
    find_unwatched,
    stuck_ranks,
)
from minillm.ranks.errors import Fault, RankError, Verdict
from minillm.ranks.places import cell_sources, describe
from minillm.ranks.process import RankProcess, start_rank, warm_up
from minillm.ranks.worker import Seat

MAX_RANKS = 256
START_TIMEOUT_S = 120.0
POLL_S = 0.05  # how often the boards are looked at while a call runs
GRACE_S = 1.0  # after the first failure: how long other ranks may take to show where they stand
ANSWER_S = 0.5  # how long a rank may take to say where it stands
_RESTART = "The ranks start afresh at the next call; what they held in memory is gone."


class Ranks:
    """`world_size` processes, one per rank, each with its own memory and device.

    `device` is "cpu", "cuda" or None for the machine's best; `timeout_s` is how long a rank may keep others waiting
    without getting on; `threads` is how many CPU threads each rank uses. The processes start at the first call, stay
    until `close()`, and end with this process whatever happens to it. Raises `ValueError` for a size or device that
    cannot be.
    """

    def __init__(self, world_size: int, *, device: str | None = None, timeout_s: float = 10.0, threads: int = 1) -> None:
        if isinstance(world_size, bool) or not isinstance(world_size, int) or not 1 <= world_size <= MAX_RANKS:
            raise ValueError(f"world_size={world_size!r}: give a whole number of ranks from 1 to {MAX_RANKS}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s!r}: give a number of seconds above 0")
        if threads < 1:
            raise ValueError(f"threads={threads!r}: give at least 1")
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.threads = threads
        self.backend: Backend = choose_backend(world_size, device)
        self._store: dist.TCPStore | None = None
        self._generation = 0
        self._processes: list[RankProcess] = []
        self._lock = threading.Lock()
        self._closed = False
        warm_up()

    def run(
        self, fn: Callable[..., Any], *args: Any, on_event: Callable[[int, Any], None] | None = None,
        stream: bool = False, **kwargs: Any,
    ) -> list[Any]:
        """Run `fn(*args, **kwargs)` on every rank; returns what each returned, in rank order.

        `fn` may be defined in a cell. Lines that the ranks print appear in rank order when the call ends, or at once
        with `stream=True`. `on_event(rank, event)` gets what a rank sends with `context().emit(event)`, while it runs.
        Raises `RankError` when a rank fails or the ranks cannot go on, and `KeyboardInterrupt` when stopped.
        """
        payload = cloudpickle.dumps((fn, args, kwargs))
        code = getattr(fn, "__code__", None)
        sources = cell_sources({code.co_filename} if code else set())
        return self._call(("call", payload, sources), on_event, stream)

    def run_cell(self, source: str, filename: str = "<ranks cell>", stream: bool = False) -> list[Any]:
        """Run source text on every rank, in a namespace that persists there; returns each one's last expression.

        The names `rank`, `world_size`, `device`, `torch`, `dist` and `context` are there from the start.
        """
        return self._call(("cell", source, {filename: source}), None, stream)

    def close(self) -> None:
        """End the processes. Safe to call twice."""
        self._closed = True
        self._end()
        self._store = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_processes", None) and not sys.is_finalizing():
            self._end()

    def __repr__(self) -> str:
        return f"Ranks({self.world_size}, {self.backend.describe()})"

    @property
    def pids(self) -> list[int]:
        """The processes' ids, in rank order; empty before the first call."""
        return [process.process.pid for process in self._processes]

    def start(self) -> None:
        """Start the processes now rather than at the first call."""
        if self._closed:
            raise ValueError("these ranks are closed; make new ones with Ranks(…)")
        if self._processes:
            return
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._generation += 1
        for rank in range(self.world_size):
            seat = Seat(rank, self.world_size, self.backend, self._store.port, self._generation, self.threads)
            self._processes.append(start_rank(seat))
        _Job(self, None, stream=False, limit_s=START_TIMEOUT_S).finish()

    def _end(self) -> None:
        processes, self._processes = self._processes, []
        for process in processes:
            if process.alive:
                process.process.kill()
        for process in processes:
            process.kill()

    def _call(self, message: tuple[Any, ...], on_event: Callable[[int, Any], None] | None, stream: bool) -> list[Any]:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("these ranks are busy with another call; wait for it, or make other Ranks")
        try:
            self.start()
            job = _Job(self, on_event, stream)
            job.send(message)
            return job.finish()
        except BaseException as error:
            if not (isinstance(error, RankError) and error.verdict.recoverable):
                self._end()
            raise
        finally:
            self._lock.release()


class _Job:
    """One call on all ranks, from sending it to its results or its `RankError`."""

    def __init__(
        self, ranks: Ranks, on_event: Callable[[int, Any], None] | None, stream: bool, limit_s: float | None = None
    ) -> None:
        self.pool = ranks
        self.processes = ranks._processes
        self.on_event, self.stream, self.limit_s = on_event, stream, limit_s
        views = [board.read(process.board) for process in self.processes]
        self.since = [view.written for view in views]  # notices of earlier calls do not count
        self.ranks = [Rank(n, Life.RUNNING, view) for n, view in enumerate(views)]
        self.results: list[Any] = [None] * len(views)
        self.lines: list[list[tuple[str, str]]] = [[] for _ in views]
        self.started = self.looked_at = time.monotonic()
        self.moved_at = [self.started] * len(views)
        self.failed_at: float | None = None
        self.steady: tuple[int, ...] | None = None  # ticks of all boards at the last look at which ranks were stuck
        self.inside: tuple[float, dict[int, int]] = (self.started, {})  # ranks in unwatched waits: their ticks then

    def send(self, message: tuple[Any, ...]) -> None:
        """Hand the message to every rank; one that died since the last call counts as dead."""
        for rank, process in zip(self.ranks, self.processes):
            try:
                process.calls.send(message)
            except OSError:
                self._died(rank)

    def finish(self) -> list[Any]:
        """Wait for every rank; returns the results or raises."""
        try:
            while any(rank.life is Life.RUNNING for rank in self.ranks):
                self._listen()
                verdict = self._look() if time.monotonic() - self.looked_at > POLL_S else None
                if verdict is not None:
                    self._raise(verdict)
        except KeyboardInterrupt:
            self._interrupted()
        for rank in self.ranks:
            self._read(rank)
        verdict = find_fault(self.ranks) or self._connection_lost() or find_leftover(self.ranks)
        if verdict is not None:
            self._raise(verdict)
        self._print_lines()
        return [cloudpickle.loads(result) for result in self.results]

    def _read(self, rank: Rank) -> None:
        rank.view = board.read(self.processes[rank.number].board, self.since[rank.number])

    def _listen(self) -> None:
        """Take what the ranks have sent, for at most one poll."""
        channels = {self.processes[rank.number].calls: rank for rank in self.ranks if rank.life is Life.RUNNING}
        for channel in wait(list(channels), timeout=POLL_S):
            rank = channels[channel]  # type: ignore[index]
            try:
                self._take(rank, channel.recv())  # type: ignore[union-attr]
            except (EOFError, OSError):
                self._died(rank)

    def _take(self, rank: Rank, message: tuple[Any, ...]) -> None:
        kind, body = message[0], message[1]
        if kind == "returned":
            rank.life, self.results[rank.number] = Life.RETURNED, body
        elif kind == "raised":
            rank.life, rank.failure = Life.RAISED, body
            self._note_failure()
        elif kind == "event" and self.on_event is not None:
            self.on_event(rank.number, cloudpickle.loads(body))
        elif kind == "line" and self.stream:
            _print(rank.number, body, message[2])
        elif kind == "line":
            self.lines[rank.number].append((body, message[2]))

    def _died(self, rank: Rank) -> None:
        process = self.processes[rank.number]
        process.process.join(1)
        rank.life, rank.exit_text = Life.DIED, process.exit_text
        self._note_failure()

    def _note_failure(self) -> None:
        if self.failed_at is None:
            self.failed_at = time.monotonic()

    def _look(self) -> Verdict | None:
        """Read the boards; the verdict once there is one that will not change."""
        now = self.looked_at = time.monotonic()
        for rank in self.ranks:
            before = rank.view.ticks
            self._read(rank)
            if rank.view.ticks != before:
                self.moved_at[rank.number] = now
        if find_disagreement(self.ranks) is not None:
            self._note_failure()
        settled = self._settled()
        if self.failed_at is not None:
            return self._after_failure(now, settled)
        if stuck_ranks(self.ranks) and settled:
            return find_fault(self.ranks)
        return self._too_slow(now) or self._late(now) or self._unwatched(now)

    def _settled(self) -> bool:
        """Whether ranks are stuck or done, none computes, and nothing moved since the last look."""
        ticks = tuple(rank.view.ticks for rank in self.ranks)
        stuck = stuck_ranks(self.ranks)
        before, self.steady = self.steady, ticks if stuck or self.failed_at is not None else None
        if before != ticks:
            return False
        computing = [r for r in self.ranks if r.life is Life.RUNNING and r.waits is None]
        return not computing or (bool(stuck) and self.failed_at is None)

    def _after_failure(self, now: float, settled: bool) -> Verdict | None:
        """A rank failed: give the others a moment to arrive where they will wait for it."""
        assert self.failed_at is not None
        if not settled and now - self.failed_at < min(GRACE_S, self.pool.timeout_s):
            return None
        self._ask_where([rank for rank in self.ranks if rank.life is Life.RUNNING and rank.waits is None])
        return find_fault(self.ranks) or self._connection_lost()

    def _connection_lost(self) -> Verdict | None:
        """Every failed rank lost a connection and none says why."""
        raised = [rank for rank in self.ranks if rank.failure is not None]
        if not raised:
            return None
        text = f"rank {raised[0].number} raised {raised[0].failure.headline}"  # type: ignore[union-attr]
        places = {rank.number: rank.describe() for rank in self.ranks}
        return Verdict(Fault.RAISED, [rank.number for rank in raised], text, places=places)

    def _too_slow(self, now: float) -> Verdict | None:
        """The ranks do not get ready."""
        if self.limit_s is None or now - self.started < self.limit_s:
            return None
        late = [rank.number for rank in self.ranks if rank.life is Life.RUNNING]
        text = f"the ranks were not ready within {self.limit_s:g} s"
        return Verdict(Fault.LATE, late, text, places={rank.number: rank.describe() for rank in self.ranks})

    def _late(self, now: float) -> Verdict | None:
        """A verdict when some rank has waited too long for ranks that do not get on."""
        limit = self.pool.timeout_s
        idle = [now - moved > limit for moved in self.moved_at]
        late: set[int] = set()
        stalled = False
        for rank in self.ranks:
            if rank.waits is None or not idle[rank.number]:
                continue
            ends = blockers(rank, self.ranks)
            if ends and all(idle[n] for n in ends):
                late |= ends
            stalled |= not ends and all(idle[n] for n in rank.waits.members)
        if not late and not stalled:
            return None
        silent = self._ask_where([rank for rank in self.ranks if rank.life is Life.RUNNING])
        return find_late(self.ranks, sorted(late), silent, limit)

    def _unwatched(self, now: float) -> Verdict | None:
        """A verdict when ranks sit in one of torch's own waits, which no board shows, at two looks `timeout_s` apart."""
        asked_at, before = self.inside
        if now - asked_at < self.pool.timeout_s or any(rank.waits is not None for rank in self.ranks):
            return None
        running = [rank for rank in self.ranks if rank.life is Life.RUNNING]
        self._ask_where(running)
        inside = {rank.number: rank.view.ticks for rank in running if rank.inside_torch}
        self.inside = (now, inside)
        same = [number for number, ticks in inside.items() if before.get(number) == ticks]
        return find_unwatched(self.ranks, same, self.pool.timeout_s) if same else None

    def _ask_where(self, ranks: list[Rank]) -> list[int]:
        """Ask running ranks where their main thread stands; returns those that do not answer."""
        silent = []
        for rank in ranks:
            try:
                self.processes[rank.number].control.send("where")
            except OSError:
                continue
        end = time.monotonic() + ANSWER_S
        for rank in ranks:
            process = self.processes[rank.number]
            if process.control.poll(max(0.0, end - time.monotonic())):
                spots, rank.inside_torch = process.control.recv()
                rank.place = f"runs {describe(*spots[-1])}" if spots else "runs"
            else:
                rank.place = "does not answer: its process is stopped" if process.stopped else "does not answer"
                silent.append(rank.number)
        return silent

    def _print_lines(self) -> None:
        for number, lines in enumerate(self.lines):
            for stream, text in lines:
                _print(number, stream, text)
            lines.clear()

    def _raise(self, verdict: Verdict) -> None:
        self._print_lines()
        healthy = all(rank.life in (Life.RETURNED, Life.RAISED) for rank in self.ranks)
        verdict.recoverable = verdict.fault is Fault.RAISED and healthy and find_leftover(self.ranks) is None
        raise RankError(verdict, "" if verdict.recoverable else _RESTART)

    def _interrupted(self) -> None:
        """The stop button: say where everyone was."""
        running = [rank for rank in self.ranks if rank.life is Life.RUNNING]
        for rank in running:
            self._read(rank)
        self._ask_where(running)
        self._print_lines()
        places = "\n".join(f"  rank {rank.number}  {rank.describe()}" for rank in self.ranks)
        raise KeyboardInterrupt(f"the ranks were stopped; they stood at\n{places}\n\n{_RESTART}") from None


def _print(rank: int, stream: str, text: str) -> None:
    print(f"rank {rank}: {text}", file=sys.stderr if stream == "stderr" else sys.stdout, flush=True)
