"""The replay clock: a recorded trace laid out again, one device per rank, with a link of one's choice between them.

Every stretch of computing takes the time it took its own thread, or the roofline's time on a named device; messages take
the link's time; what has to happen before what stays as it was: program order on a rank, a message sent before it is
received, a collective entered by all before it ends. So ranks that shared two cores, and took turns, stand side by side as
if each had a device to itself. Record for it with `LLM.record_for_replay`. The file loads no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from minillm.hardware.devices import Device, Link
from minillm.trace.collectives import collective_time_s
from minillm.trace.life import Event, RequestLife
from minillm.trace.trace import Clock, Kind, Span, Trace

COMPUTE, WIRE = "compute", "wire"
Message = tuple[str, int, int, int]  # group, sender, receiver, number in its series


def replay(trace: Trace, link: Link | None = None, device: Device | None = None, dtype: str | None = None) -> Trace:
    """The trace on the replay clock, from second 0; its requests' lives and its memory are left out.

    Host time between spans counts, what waiting for a message cost this machine does not. Without a `link` messages take no
    time. With a `device` a step takes the slower of its operations and its bytes in
    `dtype`, the trace's own by default, and what the host does between steps is left out. Deterministic.
    Raises `ValueError` for a trace in which a rank waits for something that no rank does.
    """
    if trace.spans and trace.end_s == 0.0:
        raise ValueError("this trace has no times: record it with timing on")
    dtype = dtype or trace.about.get("dtype", "float32")
    duration = _own_time(trace) if device is None else _roofline(device, dtype)
    ranks = {rank: _Rank(rank, _program(trace, rank)) for rank in trace.ranks}
    _Run(ranks, link, duration, host=device is None).go()
    spans = sorted((span for rank in ranks.values() for span in rank.done), key=lambda span: (span.end_s, span.rank))
    about = {key: value for key, value in trace.about.items() if key not in ("ranks", "cores")}  # one device each
    about |= {"link": link.name if link else "no delay", **({"device": device.name} if device else {})}
    return Trace(spans, clock=Clock.REPLAYED, about=about)


def replayed_lives(recorded: Trace, replayed: Trace) -> list[RequestLife]:
    """The lives of a recorded run's requests on the replay clock, where all of them arrive at second 0.

    A request gets its n tokens with the last n steps that it is in: those before hold only its prompt. So it must not have
    been preempted. A step ends when the last of its ranks is through.
    """
    ends: dict[int, dict[tuple[int, int], float]] = defaultdict(lambda: defaultdict(float))  # request -> step -> end
    first = {life.request_id: life.rank for life in recorded.lives}
    for span in replayed.spans:
        if is_compute(span):
            for request in span.request_ids:
                step = (first[request], span.step)
                ends[request][step] = max(ends[request][step], span.end_s)
    lives = []
    for life in recorded.lives:
        times = sorted(ends[life.request_id].values())[-len(life.token_s) :]
        moments = [(Event.ARRIVED, 0.0), *((Event.TOKEN, when) for when in times), (Event.FINISHED, times[-1])]
        lives.append(replace(life, moments=[moments[0], (Event.STARTED, 0.0), *moments[1:]]))
    return lives


def is_compute(span: Span) -> bool:
    """Whether its time was spent on computing."""
    return span.kind not in (Kind.COMMUNICATION, Kind.WAITING)


def bubble_share(trace: Trace) -> float:
    """The share of all ranks' time in which they do not compute, from the first to the last moment that somebody does.

    For p equal stages and m equal micro-batches it is (p - 1) / (m + p - 1) (GPipe, section 2.3).
    """
    working = [span for span in trace.spans if is_compute(span)]
    length = max((span.end_s for span in working), default=0.0) - min((span.start_s for span in working), default=0.0)
    if not length:
        raise ValueError("nothing was computed in this trace, or without a clock")
    return 1 - sum(span.duration_s for span in working) / (length * len({span.rank for span in working}))


@dataclass
class _Rank:
    """Where a rank's program stands: the next span, and the clock of its device."""

    number: int
    program: list[Span]
    at: int = 0
    begun: int = -1  # the span whose host time before it is spent
    now_s: float = 0.0
    done: list[Span] = field(default_factory=list)

    @property
    def next(self) -> Span | None:
        return self.program[self.at] if self.at < len(self.program) else None


class _Run:
    """All ranks' programs, run side by side until each is through."""

    def __init__(
        self, ranks: dict[int, _Rank], link: Link | None, duration: Callable[[Span], float], host: bool
    ) -> None:  # fmt: skip
        self.ranks, self.link, self.duration, self.host = ranks, link, duration, host
        self.arrivals: dict[Message, float] = {}
        self.free_s: dict[tuple[int, int], float] = defaultdict(float)  # when a wire has taken the last message in
        self.members = _members(span for rank in ranks.values() for span in rank.program)
        self.entered: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
        self.over: dict[tuple[str, int], tuple[float, float]] = {}  # when a collective begins and ends
        self.busy_s: dict[str, float] = defaultdict(float)  # until when a group's last collective lasts

    def go(self) -> None:
        """Advance ranks in turn; raise when none can go on."""
        while any(rank.next is not None for rank in self.ranks.values()):
            if not any([self._advance(rank) for rank in self.ranks.values()]):
                stuck = next(rank for rank in self.ranks.values() if rank.next is not None)
                span = stuck.next
                assert span is not None
                what = f"{span.name!r} from rank {span.peer}" if span.peer >= 0 else f"the others in {span.name!r}"
                raise ValueError(f"the trace is not whole: rank {stuck.number} waits for {what}, which never comes")

    def _advance(self, rank: _Rank) -> bool:
        """Run a rank until it has to wait; returns whether it moved."""
        moved = False
        while (span := rank.next) is not None:
            if self.host and rank.begun < rank.at:
                rank.begun, rank.now_s = rank.at, rank.now_s + (span.gap_cpu_s or 0.0)
            if not self._run(rank, span):
                break
            rank.at += 1
            moved = True
        return moved

    def _run(self, rank: _Rank, span: Span) -> bool:
        """One span; False when it cannot end yet."""
        if span.kind is Kind.WAITING and span.peer >= 0:
            return self._receive(rank, span)
        if span.kind is Kind.WAITING:
            return span.sequence < 0 or self._await_sum(rank, span)  # idle for want of work: nothing to replay
        if span.kind is Kind.COMMUNICATION and span.peer >= 0:
            return self._send(rank, span)
        if span.kind is Kind.COMMUNICATION:
            return self._start(rank, span) if span.lane == WIRE else self._collective(rank, span)
        self._keep(rank, span, rank.now_s + self.duration(span))
        return True

    def _send(self, rank: _Rank, span: Span) -> bool:
        """The message leaves once the wire is free; a blocking sender waits until it has arrived."""
        wire = (rank.number, span.peer)
        start = max(rank.now_s, self.free_s[wire])
        arrival = start + (self.link.time_s(span.message_bytes) if self.link else 0.0)
        self.free_s[wire] = start + (span.message_bytes / self.link.bytes_per_s if self.link else 0.0)
        self.arrivals[message_of(span)] = arrival
        rank.done.append(replace(span, start_s=start, end_s=arrival, cpu_s=None, gap_cpu_s=None))
        if span.lane != WIRE:
            rank.now_s = arrival
        return True

    def _receive(self, rank: _Rank, span: Span) -> bool:
        arrival = self.arrivals.get(message_of(span))
        if arrival is None:
            return False
        if arrival > rank.now_s:
            self._keep(rank, span, arrival)
        return True

    def _collective(self, rank: _Rank, span: Span) -> bool:
        self.entered[_key(span)].setdefault(rank.number, rank.now_s)
        over = self._over(_key(span))
        if over is not None:
            self._keep(rank, span, over[1])
        return over is not None

    def _start(self, rank: _Rank, span: Span) -> bool:
        """A collective that is under way while the rank goes on."""
        self.entered[_key(span)][rank.number] = rank.now_s
        return True

    def _await_sum(self, rank: _Rank, span: Span) -> bool:
        over = self._over(_key(span))
        if over is None:
            return False
        sent = self.members[_key(span)][rank.number]
        rank.done.append(replace(sent, start_s=over[0], end_s=over[1], cpu_s=None, gap_cpu_s=None))
        if over[1] > rank.now_s:
            self._keep(rank, span, over[1])
        return True

    def _over(self, key: tuple[str, int]) -> tuple[float, float] | None:
        """When a collective begins and ends: once all are there, and the group's one before it is over; None before that."""
        entered, members = self.entered[key], self.members[key]
        if len(entered) < len(members):
            return None
        if key not in self.over:
            one = next(iter(members.values()))
            longest = max(span.message_bytes for span in members.values())
            time_s = collective_time_s(one.name, len(entered), longest, self.link) if self.link else 0.0
            start = max(*entered.values(), self.busy_s[key[0]])
            self.over[key] = start, start + time_s
            self.busy_s[key[0]] = start + time_s
        return self.over[key]

    def _keep(self, rank: _Rank, span: Span, end_s: float) -> None:
        """The span has run from now to `end_s`."""
        rank.done.append(replace(span, start_s=rank.now_s, end_s=end_s, cpu_s=None, gap_cpu_s=None))
        rank.now_s = end_s


def _program(trace: Trace, rank: int) -> list[Span]:
    """What a rank did, in the order in which it began it."""
    return sorted((span for span in trace.spans if span.rank == rank), key=lambda span: span.start_s)


def _key(span: Span) -> tuple[str, int]:
    """Which collective a span is, or waits for."""
    return span.group, span.sequence


def message_of(span: Span) -> Message:
    """Which message a span sends (communication) or waits for (waiting)."""
    ends = (span.rank, span.peer) if span.kind is Kind.COMMUNICATION else (span.peer, span.rank)
    return span.group, *ends, span.sequence


def _members(spans: Iterable[Span]) -> dict[tuple[str, int], dict[int, Span]]:
    """Every collective, and each member's span of it."""
    members: dict[tuple[str, int], dict[int, Span]] = defaultdict(dict)
    for span in spans:
        if span.kind is Kind.COMMUNICATION and span.peer < 0:
            members[_key(span)][span.rank] = span
    return members


def _own_time(trace: Trace) -> Callable[[Span], float]:
    """What a span took its own thread; on a GPU, for which spans wait when they are recorded for replay, all its time."""
    if trace.about.get("device") == "cuda":
        return lambda span: span.duration_s
    return lambda span: span.cpu_s if span.cpu_s is not None else span.duration_s


def _roofline(device: Device, dtype: str) -> Callable[[Span], float]:
    rate = device.flops_per_s(dtype)
    return lambda span: max(span.flops / rate, span.memory_bytes / device.bytes_per_s)
