"""A request from its arrival to its end: what was asked, what came out so far, and when."""

from __future__ import annotations

from dataclasses import dataclass, field

from minillm.model.sampling import SamplingParams
from minillm.model.tokenizer import TextStream
from minillm.trace.life import Event, RequestLife


@dataclass(frozen=True)
class RequestOutput:
    """What a request gave. `finish_reason` is "stop" or "length"; None while it runs. `text` has no special tokens.

    `metrics` holds its time stamps, and TTFT, TPOT and the like.
    """

    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str | None
    metrics: RequestLife


@dataclass(frozen=True)
class Piece:
    """What a step added to a request: one token, and the text that became certain with it."""

    index: int
    token_id: int
    text: str
    finish_reason: str | None


@dataclass
class Request:
    """A prompt under way. `stops` are token ids that end it; `room` is how long its sequence may become."""

    index: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    stops: frozenset[int]
    room: int
    decoder: TextStream
    life: RequestLife
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    shown: int = 0  # characters of `text` handed out already
    finish_reason: str | None = None
    _cut: bool = False  # at a stop string

    @property
    def length(self) -> int:
        """Tokens of the sequence so far, prompt included."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def longest(self) -> int:
        """The most tokens the sequence can have."""
        return min(self.room, len(self.prompt) + self.params.max_tokens)

    def append(self, token_id: int, now_s: float) -> Piece:
        """Take the next token; finish the request if it ends here."""
        self.token_ids.append(token_id)
        self.life.note(Event.TOKEN, now_s)
        if token_id in self.stops:
            self.finish_reason = "stop"
        else:
            self.text += self.decoder.step(token_id)
            if self._cut_at_stop_text():
                self.finish_reason = "stop"
            elif self.length >= self.longest:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            self.life.note(Event.FINISHED, now_s)
            if not self._cut:
                self.text += self.decoder.rest(self.text)
        return Piece(self.index, token_id, self._show(), self.finish_reason)

    def output(self) -> RequestOutput:
        """The request as its user sees it."""
        return RequestOutput(self.index, self.prompt, self.token_ids, self.text, self.finish_reason, self.life)

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
                (n for stop in self.params.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0
            )
        piece, self.shown = self.text[self.shown : end], max(self.shown, end)
        return piece
