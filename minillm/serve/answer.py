"""From the engine's pieces to the JSON of OpenAI's API, whole or as a stream of events."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from minillm.engine.request import Piece, Request, with_twins
from minillm.serve.body import Call


@dataclass
class Answer:
    """The answer to one call: an id, a time, and the choices, one for each sample of each prompt."""

    model: str
    call: Call
    requests: Sequence[Request]
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.call.chat else "cmpl-") + token_hex(12)

    def event(self, piece: Piece, first: bool) -> str | None:
        """The event for a piece; none when there is nothing to tell yet. `first` says whose turn it is to speak."""
        if not piece.text and piece.finish_reason is None and not first:
            return None
        choice: dict[str, Any] = {"index": piece.index * self.call.params.n + piece.sample}
        if self.call.chat:
            choice["delta"] = {"role": "assistant"} if first else {}
            choice["delta"] |= {"content": piece.text} if piece.text or first else {}
        else:
            choice["text"] = piece.text
        return event({**self._head(".chunk"), "choices": [{**choice, "logprobs": None, "finish_reason": piece.finish_reason}]})  # fmt: skip

    def last_event(self) -> str:
        """The counts, if asked for, and the end of the stream."""
        counts = event({**self._head(".chunk"), "choices": [], "usage": self.usage()}) if self.call.usage else ""
        return counts + "data: [DONE]\n\n"

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for request in with_twins(self.requests):
            said = (
                {"message": {"role": "assistant", "content": request.text}}
                if self.call.chat
                else {"text": request.text}
            )
            number = request.index * self.call.params.n + request.sample
            choices.append({"index": number, **said, "logprobs": None, "finish_reason": request.finish_reason})
        return {**self._head(""), "choices": sorted(choices, key=lambda choice: choice["index"]), "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens asked and generated; a prompt counts once."""
        prompt = sum(request.prompt_length for request in self.requests)
        new = sum(len(request.token_ids) for request in with_twins(self.requests))
        reused = sum(request.life.reused_tokens for request in self.requests)
        details = {"cached_tokens": reused}
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new, "prompt_tokens_details": details}  # fmt: skip

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self.call.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(values: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


def error_body(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error as OpenAI's API words it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
