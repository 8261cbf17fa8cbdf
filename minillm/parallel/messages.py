"""What the launching process and the ranks of an instance tell each other: requests that come, what they got, what was seen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from minillm.engine.engine import Engine
from minillm.engine.handing import Note
from minillm.engine.intake import Intake
from minillm.engine.request import Piece, Request, number
from minillm.model.sampling import SamplingParams
from minillm.policy.loans import Heartbeat
from minillm.policy.request import Load
from minillm.trace.life import Event, RequestLife
from minillm.trace.trace import MemorySample, Span

Message = Callable[[Engine, Intake], None]


@dataclass(frozen=True)
class Loaded:
    """What a rank says of its part of the model."""

    bytes_read: int
    weight_bytes: int
    shared_bytes: int = 0  # of the weights, with other replicas


@dataclass(frozen=True)
class Recording:
    """How a call is recorded. `fresh`: it begins a trace. `live`: every span is reported at once. With `details` steps are
    cut where something is sent. With `baton`, the path of a file, one rank computes at a time.
    """

    fresh: bool = True
    timing: bool = True
    activations: bool = False
    details: bool = False
    live: bool = False
    baton: str | None = None


@dataclass(frozen=True)
class Source:
    """Where a request's K and V are, or will be: a party with this layout, which of its readings, and of how many tokens."""

    party: int
    layout: str
    reading: int
    tokens: int


@dataclass(frozen=True)
class Added:
    """A request that comes in: what `intake` needs to make it again, and its number.

    One that another engine has begun brings the tokens that it was given, which of the samples it is, and its life. One to be
    `handed` over is kept after its next token; one with a `source` goes on with the cache that is there. Whatever is told of it says in
    which `epoch` it was sent, for it may be dropped and sent again, or its number given again, while word of it is on its way.
    """

    request_id: int
    index: int
    prompt: list[int]
    params: SamplingParams
    priority: float
    arrived_s: float
    given: tuple[int, ...] = ()
    sample: int = 0
    moments: tuple[tuple[Event, float], ...] = ()
    handed: bool = False
    source: Source | None = None
    predicted: int = 0
    epoch: int = 0

    @classmethod
    def of(cls, request: Request) -> Added:
        """What an engine needs to serve a request, or to go on with it."""
        arrived_s, given = request.life.first(Event.ARRIVED), tuple(request.token_ids)
        params = replace(request.params, seed=request.seed, n=1 if given else request.params.n)
        moments = tuple(request.life.moments) if len(request.life.moments) > 1 else ()
        return cls(
            request.request_id, request.index, request.prompt, params, request.scheduled.priority, arrived_s, given, request.sample, moments,
            predicted=request.scheduled.predicted,
        )  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What a step gave a request: the piece, and the moments of its life from the `since`-th on."""

    epoch: int
    piece: Piece
    since: int
    moments: tuple[tuple[Event, float], ...]
    reused_tokens: int


@dataclass(frozen=True)
class Turn:
    """What rank 0 tells after each step."""

    told: list[Told]
    load: Load
    beat: Heartbeat | None = None
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Seen:
    """Spans and memory that a rank has recorded."""

    spans: list[Span]
    memory: list[MemorySample]

    def among_others(self, first_rank: int) -> Seen:
        """The same with the numbers that the ranks have among all replicas, theirs being those from `first_rank` on."""
        if not first_rank:
            return self
        return Seen(
            [
                replace(
                    span, rank=span.rank + first_rank, peer=span.peer + first_rank if span.peer >= 0 else span.peer,
                    group=f"{span.group} from {first_rank}" if span.group else "",  # replicas number theirs alike
                )
                for span in self.spans
            ],
            [replace(sample, rank=sample.rank + first_rank) for sample in self.memory],
        )  # fmt: skip


def add(each: list[Added]) -> Message:
    """A message for rank 0: requests that come in."""

    def message(engine: Engine, intake: Intake) -> None:
        for added in each:
            request = intake.request(added.index, added.prompt, added.params, deque())
            request.scheduled.priority, request.sample = added.priority, added.sample
            number([request], added.request_id)
            for token_id in added.given:
                request.scheduled.tokens.append(token_id)
                request.take(token_id, added.arrived_s)
            request.life.moments = list(added.moments)
            for sample in [request, *request.twins]:
                sample.scheduled.handed, sample.scheduled.predicted = added.handed, added.predicted
                sample.epoch = added.epoch
            if added.source is not None:
                assert engine.handing is not None
                request.scheduled.arriving = added.source.tokens
                engine.handing.transfers.sources[added.request_id] = added.source
            engine.add([request], added.arrived_s)

    return message


def cancel(epochs: dict[int, int]) -> Message:
    """A message for rank 0: requests, sent in these epochs, that nobody wants any more."""

    def message(engine: Engine, intake: Intake) -> None:
        here = [engine.requests[each] for each in epochs if each in engine.requests]
        engine.drop([request for request in here if request.epoch == epochs[request.request_id]])

    return message


def give(request_id: int, tokens: list[int], life: RequestLife, alone: bool) -> Message:
    """A message for rank 0 of an instance that goes on with a request: the tokens that it was given, and its life. What it waits for
    comes or, if it is `alone`, does not.
    """

    def message(engine: Engine, intake: Intake) -> None:
        assert engine.handing is not None
        engine.handing.give(request_id, tokens, life)
        if alone:
            engine.handing.go_on_alone(request_id)

    return message


def follow(view: dict[int, int], beyond: int, moves: list[tuple[int, int, int]]) -> Message:
    """A message for rank 0 of an instance that borrows: what the global manager says."""

    def message(engine: Engine, intake: Intake) -> None:
        assert engine.borrowing is not None
        engine.borrowing.follow(view, beyond, moves)

    return message
