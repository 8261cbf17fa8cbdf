"""One call on all ranks: send it, take what comes back, and end it when it cannot end by itself.

While a call runs, `Job` looks at the ranks' boards a few times a second. When a rank died, raised, disagrees or is
missing, it waits until the others stand still, asks `diagnosis` for the culprit, and raises a `RankError`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, cast

import cloudpickle

from minillm.ranks import board
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
from minillm.ranks.places import describe
from minillm.ranks.process import RankProcess

POLL_S = 0.05  # how often the boards are looked at while a call runs
GRACE_S = 1.0  # after the first failure: how long other ranks may take to show where they stand
ANSWER_S = 0.5  # how long a rank may take to say where it stands
_RESTART = "The ranks start afresh at the next call; what they held in memory is gone."


class Job:
    """One call on all ranks, from sending it to its results or its `RankError`."""

    def __init__(
        self,
        processes: list[RankProcess],
        timeout_s: float,
        on_event: Callable[[int, Any], None] | None = None,
        stream: bool = False,
        limit_s: float | None = None,
    ) -> None:
        self.processes = processes
        self.timeout_s = timeout_s
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
        for channel in cast(list[Connection], wait(list(channels), timeout=POLL_S)):
            rank = channels[channel]
            try:
                self._take(rank, channel.recv())
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
        if not settled and now - self.failed_at < min(GRACE_S, self.timeout_s):
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
        limit = self.timeout_s
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
        if now - asked_at < self.timeout_s or any(rank.waits is not None for rank in self.ranks):
            return None
        running = [rank for rank in self.ranks if rank.life is Life.RUNNING]
        self._ask_where(running)
        inside = {rank.number: rank.view.ticks for rank in running if rank.inside_torch}
        self.inside = (now, inside)
        same = [number for number, ticks in inside.items() if before.get(number) == ticks]
        return find_unwatched(self.ranks, same, self.timeout_s) if same else None

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

    def _raise(self, verdict: Verdict) -> NoReturn:
        self._print_lines()
        healthy = all(rank.life in (Life.RETURNED, Life.RAISED) for rank in self.ranks)
        verdict.recoverable = verdict.fault is Fault.RAISED and healthy and find_leftover(self.ranks) is None
        raise RankError(verdict, "" if verdict.recoverable else _RESTART)

    def _interrupted(self) -> NoReturn:
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
