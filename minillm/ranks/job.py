"""One call on all ranks: send it, take what comes back, and end it when it cannot end by itself.

While a call runs, `Job` looks at the ranks' boards a few times a second. When a rank died, raised, disagrees or is
missing, it waits until the others stand still, asks `diagnosis` for the culprit, and raises a `RankError`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, NoReturn

import cloudpickle

from minillm.ranks import board
from minillm.ranks.diagnosis import (
    blockers,
    find_disagreement,
    find_fault,
    find_halted,
    find_late,
    find_leftover,
    find_lost_connection,
    find_unwatched,
    has_open_messages,
    stuck_ranks,
)
from minillm.ranks.errors import Fault, RankError, Stopped, Verdict
from minillm.ranks.inquiry import Inquiry
from minillm.ranks.process import RankProcess
from minillm.ranks.signals import uninterrupted
from minillm.ranks.state import Life, Rank
from minillm.ranks.streams import print_lines

POLL_S = 0.05  # how often the boards are looked at while a call runs
UNATTENDED_S = 0.5
GRACE_S = 1.0  # after the first failure: how long other ranks may take to show where they stand
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
        starting: bool = False,
    ) -> None:
        self.processes = processes
        self.timeout_s = timeout_s
        self.on_event, self.stream, self.limit_s, self.starting = on_event, stream, limit_s, starting
        views = [board.read(process.board) for process in self.processes]
        self.since = [view.written for view in views]  # notices of earlier calls do not count
        self.ranks = [Rank(n, Life.RUNNING, view) for n, view in enumerate(views)]
        self.results: list[Any] = [None] * len(views)
        self.lines: list[list[tuple[str, str]]] = [[] for _ in views]
        self.started = self.looked_at = time.monotonic()
        self.moved_at = [self.started] * len(views)
        self.failed_at: float | None = None
        self.steady: Any = None  # which ranks were stuck at the last look, and their ticks
        self.halted: set[int] = set()  # ranks whose processes were stopped at the last of these looks
        self.inside: tuple[float, dict[int, Any]] = (self.started, {})  # ranks in unwatched waits: how they stood then
        self.inquiry = Inquiry(processes)

    def send(self, message: tuple[Any, ...]) -> None:
        """Hand the message to every rank; one that died since the last call counts as dead."""
        for rank, process in zip(self.ranks, self.processes):
            try:
                process.send(message)
            except (BrokenPipeError, ConnectionError):
                self._died(rank)

    def finish(self) -> list[Any]:
        """Wait for every rank; returns the results or raises."""
        try:
            while not self.over:
                self.turn(POLL_S)
        except KeyboardInterrupt:
            self._interrupted()
        return self.conclude()

    @property
    def over(self) -> bool:
        """Whether every rank has returned, raised or died."""
        return all(rank.life is not Life.RUNNING for rank in self.ranks)

    def turn(self, timeout_s: float) -> None:
        """Take what the ranks have sent, waiting for at most `timeout_s`; raise once they cannot go on."""
        now = time.monotonic()
        if now - self.looked_at > UNATTENDED_S:  # nobody has read what they sent, so they may have waited for us
            self.looked_at, self.moved_at = now, [now] * len(self.ranks)
        self._listen(timeout_s)
        verdict = self._look() if time.monotonic() - self.looked_at > POLL_S else None
        if verdict is not None:
            self._raise(verdict)

    def conclude(self) -> list[Any]:
        """When all is over: the results, or the error."""
        self._refresh()
        verdict = find_fault(self.ranks) or find_lost_connection(self.ranks) or find_leftover(self.ranks)
        if verdict is not None:
            self._raise(verdict)
        self._print_lines()
        return [self._load(number, result) for number, result in enumerate(self.results)]

    def _load(self, number: int, result: bytes) -> Any:
        """Unpickle what a rank sent."""
        try:
            return cloudpickle.loads(result)
        except Exception as error:
            text = f"what rank {number} sent cannot be read here: {type(error).__name__}: {error}"
            self._raise(Verdict(Fault.LOST, [number], text, recoverable=True))

    def _read(self, rank: Rank) -> None:
        rank.view = board.read(self.processes[rank.number].board, self.since[rank.number])

    def sources(self) -> dict[Any, Rank]:
        """What `multiprocessing.connection.wait` can wait for, to hear of each rank that runs."""
        sources: dict[Any, Rank] = {}
        for rank in self.ranks:
            if rank.life is Life.RUNNING:
                process = self.processes[rank.number]
                sources |= {process.calls: rank, process.sentinel: rank}
        return sources

    def _refresh(self) -> None:
        """Read all boards as they are now."""
        for rank in self.ranks:
            self.processes[rank.number].refresh()
            self._read(rank)

    def _listen(self, timeout_s: float) -> None:
        """Take what the ranks have sent, and wait for it at most so long."""
        sources = self.sources()
        ready = {sources[source].number: sources[source] for source in wait(list(sources), timeout_s)}
        for rank in ready.values():
            with uninterrupted():
                self._receive(rank)

    def _receive(self, rank: Rank) -> None:
        """Take what a rank has sent by now; a process that ended without a word has died."""
        process = self.processes[rank.number]
        try:
            some = process.calls.poll()
            while rank.life is Life.RUNNING and process.calls.poll():
                self._take(rank, process.calls.recv())
            if not some and not process.alive:
                self._died(rank)
        except (EOFError, ConnectionError):
            self._died(rank)

    def _take(self, rank: Rank, message: tuple[Any, ...]) -> None:
        kind, body = message[0], message[1]
        if kind == "returned":
            rank.life, self.results[rank.number] = Life.RETURNED, body
        elif kind == "raised":
            rank.life, rank.failure, rank.raised_at_s = Life.RAISED, body, time.monotonic()
            self._note_failure()
        elif kind == "event" and self.on_event is not None:
            self.on_event(rank.number, self._load(rank.number, body))
        elif kind == "line" and self.stream:
            print_lines([(rank.number, body, message[2])])
        elif kind == "line":
            self.lines[rank.number].append((body, message[2]))

    def _died(self, rank: Rank) -> None:
        process = self.processes[rank.number]
        process.join(1)
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
            verdict = self._after_failure(now, settled)
            if verdict is not None or now - self.failed_at < GRACE_S + self.timeout_s:
                return verdict  # what seemed to be a failure, and was none, must not keep us from seeing who is late
        if stuck_ranks(self.ranks) and settled:
            return find_fault(self.ranks)
        return self._too_slow(now) or self._late(now) or self._unwatched(now)

    def _settled(self) -> bool:
        """Whether the ranks that are stuck were so at the last look, and have not moved; being stuck is for ever.

        After a failure, whether none computes any more either. Boards are read one after the other: two looks at which none
        has moved saw them as they were together.
        """
        if stuck_ranks(self.ranks):
            self._refresh()
        stuck = stuck_ranks(self.ranks)
        now = (stuck, [self.ranks[n].view.ticks for n in stuck])
        before, self.steady = self.steady, now
        computing = any(rank.life is Life.RUNNING and rank.waits is None for rank in self.ranks)
        return before == now and (self.failed_at is None or not computing)

    def _after_failure(self, now: float, settled: bool) -> Verdict | None:
        """A rank failed: give the others a moment to arrive where they will wait for it."""
        assert self.failed_at is not None
        if not settled and now - self.failed_at < min(GRACE_S, self.timeout_s):
            return None
        self.inquiry.ask([rank for rank in self.ranks if rank.life is Life.RUNNING and rank.waits is None])
        return find_fault(self.ranks) or find_lost_connection(self.ranks)

    def _too_slow(self, now: float) -> Verdict | None:
        """The ranks do not get ready, or the call takes longer than its caller allows."""
        if self.limit_s is None or now - self.started < self.limit_s:
            return None
        running = [rank for rank in self.ranks if rank.life is Life.RUNNING]
        late = [rank.number for rank in running]
        if self.starting:
            text = f"the ranks were not ready within {self.limit_s:g} s"
        else:
            self.inquiry.ask(running)
            text = f"the call was ended after {self.limit_s:g} s, its limit"
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
        silent = self.inquiry.ask([rank for rank in self.ranks if rank.life is Life.RUNNING])
        return find_late(self.ranks, sorted(late), silent, limit)

    def _unwatched(self, now: float) -> Verdict | None:
        """A verdict when at two looks `timeout_s` apart ranks are stopped, or sit in a wait of torch's own, which no board
        shows.

        A rank sits there if it stands on the same lines and its process has hardly computed in between.
        """
        asked_at, before = self.inside
        limit = self.timeout_s
        if self.starting or now - asked_at < limit:
            return None
        running = [rank for rank in self.ranks if rank.life is Life.RUNNING]
        silent = self.inquiry.ask(running)
        halted, self.halted = self.halted, {number for number in silent if self.processes[number].stopped}
        if halted & self.halted:
            return find_halted(self.ranks, sorted(halted & self.halted), limit)
        if any(rank.waits is not None for rank in self.ranks):  # whoever is late is found by what is waited for
            self.inside = (now, {})
            return None
        spent = {rank.number: self.processes[rank.number].cpu_s for rank in running}
        inside = {r.number: (r.view.ticks, r.spots, spent[r.number]) for r in running if r.inside_torch}
        self.inside = (now, inside)
        same = [
            number
            for number, (ticks, spots, cpu_s) in inside.items()
            if number in before and before[number][:2] == (ticks, spots) and cpu_s - before[number][2] < 0.1 * limit
        ]
        return find_unwatched(self.ranks, same, limit) if same else None

    def _print_lines(self) -> None:
        print_lines([(number, stream, text) for number, lines in enumerate(self.lines) for stream, text in lines])
        for lines in self.lines:
            lines.clear()

    def _raise(self, verdict: Verdict) -> NoReturn:
        self._print_lines()
        replied = all(rank.life in (Life.RETURNED, Life.RAISED) for rank in self.ranks)
        fatal = any(rank.failure is not None and rank.failure.fatal for rank in self.ranks)
        clean = find_leftover(self.ranks) is None and not has_open_messages(self.ranks)
        verdict.recoverable = verdict.fault in (Fault.RAISED, Fault.LOST) and replied and clean and not fatal
        raise RankError(verdict, "" if verdict.recoverable else _RESTART)

    def _interrupted(self) -> NoReturn:
        """The stop button: say where everyone was."""
        running = [rank for rank in self.ranks if rank.life is Life.RUNNING]
        for rank in running:
            self._read(rank)
        self.inquiry.ask(running)
        self._print_lines()
        places = "\n".join(f"  rank {rank.number}  {rank.describe()}" for rank in self.ranks)
        raise Stopped(f"the ranks were stopped; they stood at\n{places}\n\n{_RESTART}") from None
