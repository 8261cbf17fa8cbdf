"""From logits to the next token: greedy, or drawn with temperature, top-k and top-p.

The noise of a draw is a function of (seed, request, position) alone, so that sampled text, too, is the same in every
batch and every layout.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_FEW = 512


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1.0 keep all tokens; `seed` None draws a new seed. Generation ends
    after `max_tokens` (reason "length"), or (reason "stop") at the checkpoint's end-of-text tokens unless `ignore_eos`,
    at one of `stop_token_ids`, or when the text holds one of the `stop` strings, which is cut off. `n` continuations are
    drawn, which share the prompt's KV cache.
    Raises `ValueError` for values outside their ranges.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        _need(_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", self.max_tokens, "a whole number from 1")
        _need(_is_int(self.n) and self.n >= 1, "n", self.n, "a whole number from 1")
        _need(
            _is_finite(self.temperature) and self.temperature >= 0,
            "temperature",
            self.temperature,
            "0 (greedy) or above",
        )
        _need(
            _is_int(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "a whole number from 1, or 0 for all tokens"
        )
        _need(
            isinstance(self.top_p, (int, float)) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1"
        )
        _need(self.seed is None or _is_int(self.seed), "seed", self.seed, "a whole number, or None")
        _need(all(isinstance(text, str) and text for text in self.stop), "stop", self.stop, "texts that are not empty")
        _need(all(_is_int(token) for token in self.stop_token_ids), "stop_token_ids", self.stop_token_ids, "token ids")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floating-point ones
        return False


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _need(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: give {allowed}")


def sample(logits: torch.Tensor, params: SamplingParams, seed: int, request: int | str, position: int) -> int:
    """The next token for one request. `logits` [vocab]; `position` is the new token's place in its sequence."""
    if params.greedy:
        return int(logits.argmax())
    scores = logits.double().cpu()
    scores = keep_likely((scores - scores.max()) / params.temperature, params.top_k, params.top_p)
    return int((scores + gumbel_noise(scores.numel(), seed, request, position)).argmax())


@dataclass(frozen=True)
class Draw:
    """How one token is drawn: everything `sample` needs beside the logits."""

    params: SamplingParams
    seed: int
    request: int | str
    position: int


def draw(logits: torch.Tensor, draws: Sequence[tuple[Draw, ...]]) -> list[list[int]]:
    """The next tokens of each row of `logits` [rows, vocab]: one for each of its draws; the likeliest where there is none."""
    likeliest = logits.argmax(-1).tolist()
    return [
        [sample(row, each.params, each.seed, each.request, each.position) for each in wanted] or [token]
        for row, token, wanted in zip(logits, likeliest, draws, strict=True)
    ]


def keep_likely(scores: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set to -inf all but the `top_k` highest scores, and of those all but the smallest set with probability `top_p`.

    The likeliest token always stays. scores [vocab] -> [vocab].
    """
    if 0 < top_k < scores.numel():
        kept = scores.topk(top_k).indices  # by place, so that ties do not make them more
        scores = torch.full_like(scores, -torch.inf).index_copy(0, kept, scores[kept])
    if top_p < 1.0:
        ordered, order = scores.topk(min(_FEW, scores.numel()))  # mostly enough, and much faster than sorting all
        if (ordered - scores.logsumexp(-1)).exp().sum() < top_p:
            ordered, order = scores.sort(descending=True, stable=True)
        shares = (ordered - scores.logsumexp(-1)).exp()
        kept = order[shares.cumsum(-1) - shares < top_p]  # by the probability of all likelier tokens
        scores = torch.full_like(scores, -torch.inf).index_copy(0, kept, scores[kept])
    return scores


def gumbel_noise(size: int, seed: int, request: int | str, position: int) -> torch.Tensor:
    """Standard Gumbel noise [size]: argmax(log p + noise) is a draw from p (Gumbel, 1954; Maddison et al., 2014)."""
    digest = hashlib.blake2b(f"{seed}/{request}/{position}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    uniform = torch.rand(size, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    return -torch.log(-torch.log(uniform))
