"""Where requests come in: texts or token ids, and how to continue them, are checked and become requests."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from minillm.engine.request import Piece, Request
from minillm.model.config import ModelConfig
from minillm.model.sampling import SamplingParams
from minillm.model.tokenizer import Tokenizer
from minillm.policy.request import ScheduledRequest
from minillm.trace.life import RequestLife

Prompt = str | list[int]


class Checks(Protocol):
    """An engine, as far as it says what can run."""

    def check(self, request: ScheduledRequest) -> None: ...

    def check_samples(self, samples: int) -> None: ...


class Intake:
    """Makes requests for a model. All errors are `ValueError`s of one line, before anything is changed."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer

    def requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        engine: Checks,
    ) -> list[Request]:
        """A request for each prompt, with one inbox for all, which `engine` can run; they have no ids yet."""
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
            raise ValueError("prompts must be a list: write generate([prompt])")
        if not prompts:
            raise ValueError("there are no prompts: give a list of at least one")
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts but {len(each)} sampling parameters: give one for all, or one for each"
            )
        for one in each:
            if not isinstance(one, SamplingParams):
                raise ValueError(f"{one!r} are no sampling parameters: write SamplingParams(max_tokens=…)")
            engine.check_samples(one.n)  # before so many are made
        tokens = [self.encode(prompt, number) for number, prompt in enumerate(prompts)]
        inbox: deque[Piece] = deque()
        requests = [self.request(index, ids, one, inbox) for index, (ids, one) in enumerate(zip(tokens, each))]
        for request in requests:
            engine.check(request.scheduled)
        return requests

    def encode(self, prompt: Prompt, number: int) -> list[int]:
        """The token ids of the `number`-th prompt, which leave room for one more."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt) if prompt else []
        elif isinstance(prompt, list) and all(
            isinstance(token, int) and not isinstance(token, bool) for token in prompt
        ):
            ids = prompt
        else:
            raise ValueError(
                f"prompt {number} is a {type(prompt).__name__}: give a text, or a list of token ids, whole numbers"
            )
        self.check(ids, number, room_for=1)
        return ids

    def check(self, ids: list[int], number: int = 0, room_for: int = 0) -> None:
        """Raise `ValueError` for tokens that the model does not have, or more than its context."""
        if not ids:
            raise ValueError(f"prompt {number} is empty: give at least one token")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise ValueError(f"prompt {number} holds a token id outside 0 … {self.config.vocab_size - 1}")
        if len(ids) + room_for > self.config.max_positions:
            limit = self.config.max_positions - room_for
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens, but the model's context leaves room for {limit}: shorten it"
            )

    def request(self, index: int, prompt: list[int], params: SamplingParams, inbox: deque[Piece]) -> Request:
        """A request and, for n > 1, its twins, from what was checked."""
        ends = frozenset() if params.ignore_eos else frozenset(self.config.eos_token_ids)
        stops = frozenset(params.stop_token_ids) | ends
        seed = secrets.randbits(32) if params.seed is None else params.seed
        longest = min(self.config.max_positions, len(prompt) + params.max_tokens)
        samples = []
        for sample in range(params.n):
            scheduled = ScheduledRequest(-1, list(prompt), longest, samples=params.n if sample == 0 else 1)
            life = RequestLife(-1, prompt_tokens=len(prompt))
            text = self.tokenizer.stream()
            samples.append(Request(index, scheduled, len(prompt), params, seed, stops, text, life, inbox, sample))
        first, *first.twins = samples
        return first
