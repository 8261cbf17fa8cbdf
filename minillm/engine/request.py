"""A request from its arrival to its end: what was asked, what came out so far, and when."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from minillm.model.sampling import SamplingParams
from minillm.model.tokenizer import TextStream
from minillm.policy.request import ScheduledRequest
from minillm.trace.life import Event, RequestLife


@dataclass(frozen=True)
class RequestOutput:
    """What a request gave. `finish_reason` is "stop", "length", "cancelled" or "failed"; None while it runs. `text` has no special
    tokens.

    `metrics` holds its time stamps, and TTFT, TPOT and the like. `samples` holds the outputs of all n samples, of which this
    is the first.
    """

    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str | None
    metrics: RequestLife
    samples: tuple[RequestOutput, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Piece:
    """What a step added to a request: one token, and the text that became certain with it. `sample` counts up to n - 1.

    `request_id` is the request's number in the engine.
    """

    index: int
    token_id: int
    text: str
    finish_reason: str | None
    sample: int = 0
    request_id: int = -1


@dataclass(eq=False)
class Request:
    """A prompt under way: `index` among those of its call, `sample` among the n of its prompt.

    Its tokens are in `scheduled`. `stops` are token ids that end it; `twins` are the other samples, which fork from it
    with the first token; what it gives is also put into `inbox`.
    """

    index: int
    scheduled: ScheduledRequest
    prompt_length: int
    params: SamplingParams
    seed: int
    stops: frozenset[int]
    decoder: TextStream
    life: RequestLife
    inbox: deque[Piece]
    sample: int = 0
    twins: list[Request] = field(default_factory=list)
    text: str = ""
    shown: int = 0  # characters of `text` handed out already
    finish_reason: str | None = None
    moves: int = 0  # replicas that it has lost
    epoch: int = 0  # which of the times that it was sent to an engine this is
    _cut: bool = False  # at a stop string

    @property
    def request_id(self) -> int:
        """Its number in the engine."""
        return self.scheduled.request_id

    @property
    def prompt(self) -> list[int]:
        """What was asked."""
        return self.scheduled.tokens[: self.prompt_length]

    @property
    def token_ids(self) -> list[int]:
        """What was generated."""
        return self.scheduled.tokens[self.prompt_length :]

    @property
    def noise_key(self) -> str:
        """What tells its draws from those of the other requests of its call."""
        return f"{self.index}.{self.sample}" if self.sample else str(self.index)

    def take(self, token_id: int, now_s: float) -> Piece:
        """The scheduler appended this token; finish the request if it ends here."""
        self.life.note(Event.TOKEN, now_s)
        if token_id in self.stops:
            self.finish_reason = "stop"
        else:
            self.text += self.decoder.step(token_id)
            if self._cut_at_stop_text():
                self.finish_reason = "stop"
            elif len(self.scheduled.tokens) >= self.scheduled.longest:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            self.life.note(Event.FINISHED, now_s)
            if not self._cut:
                self.text += self.decoder.rest(self.text)
        piece = Piece(self.index, token_id, self._show(), self.finish_reason, self.sample, self.request_id)
        self.inbox.append(piece)
        return piece

    def repeat(self, piece: Piece) -> None:
        """Take a piece that this request's double on another rank has given."""
        self.scheduled.tokens.append(piece.token_id)
        self.text += piece.text
        self.finish_reason = piece.finish_reason
        self.inbox.append(piece)

    def fail(self, now_s: float) -> None:
        """What served it is gone."""
        self.finish_reason = "failed"
        self.life.note(Event.FAILED, now_s)

    def cancel(self, now_s: float) -> None:
        """It ends as it stands."""
        self.finish_reason = "cancelled"
        self.life.note(Event.CANCELLED, now_s)

    def output(self) -> RequestOutput:
        """The request as its user sees it."""
        first = RequestOutput(self.index, self.prompt, self.token_ids, self.text, self.finish_reason, self.life)
        return replace(first, samples=(first, *(twin.output() for twin in self.twins)))

    def _cut_at_stop_text(self) -> bool:
        found = [at for stop in self.params.stop if (at := self.text.find(stop, max(0, self.shown - len(stop)))) >= 0]
        if found:
            self.text, self._cut = self.text[: min(found)], True
        return self._cut

    def _show(self) -> str:
        """New text that no stop string can take back any more."""
        end = len(self.text)
        if self.finish_reason is None:
            end -= max(
                (
                    n
                    for stop in self.params.stop
                    for n in range(1, min(len(stop), end + 1))
                    if self.text.endswith(stop[:n])
                ),
                default=0,
            )
        piece, self.shown = self.text[self.shown : end], max(self.shown, end)
        return piece


def with_twins(requests: Iterable[Request]) -> list[Request]:
    """Requests and the other samples of their prompts."""
    return [each for first in requests for each in [first, *first.twins]]


def number(requests: Iterable[Request], next_id: int) -> int:
    """Give requests their ids from `next_id` on; returns the first one that is free."""
    for request in with_twins(requests):
        request.scheduled.request_id = request.life.request_id = next_id
        next_id += 1
    return next_id
