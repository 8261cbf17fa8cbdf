"""What steps take on this machine, as users feel it, fitted to the coefficients that the simulator takes: prompts a + b · n + c · n², decode
steps a + b · context + c · batch, moves of a cache α + β · bytes. Runs an engine on a grid of small loads.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import numpy as np

from minillm.disagg.layout import SplitLayout
from minillm.engine.request import Request
from minillm.hardware.profiles import Fit
from minillm.llm import LLM
from minillm.model.sampling import SamplingParams
from minillm.trace.life import Event, RequestLife

PROMPTS = (16, 48, 96, 160, 256, 384)
BATCHES = (1, 2, 4, 8)
CONTEXTS = (16, 128, 320)
STEPS = 8
DECODES = 12  # in the time of a step that reads prompts, at most
ROUNDS = 3


@dataclass(frozen=True)
class Measure:
    """One point: what was asked, and how many seconds it took."""

    terms: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """The fit, in ms for the simulator, its mean error over the points it was fitted to, and what a move takes: seconds, and seconds a byte."""

    fit: Fit
    prompt_error: float
    decode_error: float
    transfer: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, object]:
        """All figures, for JSON."""
        return {
            "prompt_ms": self.fit.prompt, "decode_ms": self.fit.small, "prompt_error": self.prompt_error,
            "decode_error": self.decode_error, "transfer_s": self.transfer,
        }  # fmt: skip

    def as_text(self) -> str:
        """The formulas with their numbers."""
        (a, b, c), (d, e, f) = self.fit.prompt, self.fit.small
        lines = [
            f"a step with n prompt tokens: {a:.3g} + {b:.3g} · n + {c:.3g} · n² ms (mean error {self.prompt_error:.0%})",
            f"a decode step: {d:.3g} + {e:.3g} · context + {f:.3g} · batch ms (mean error {self.decode_error:.0%})",
        ]
        if self.transfer is not None:
            lines.append(f"a cache moves: {1e3 * self.transfer[0]:.3g} ms + {1e9 * self.transfer[1]:.3g} ms/MB")
        return "\n".join(lines)


def calibrate(
    llm: LLM,
    rounds: int = ROUNDS,
    prompts: Sequence[int] = PROMPTS,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
) -> Calibration:
    """Run the grid, one or two minutes on a laptop, and fit. Where prefill and decode are on different ranks, each is measured while the other
    one is busy, as it is under load: they share the machine's memory. Moves of caches are measured, too. With fewer `rounds`, `prompts`,
    `batches` and `contexts` (tokens) it takes less, and says less.
    """
    llm.new_trace()  # whoever has the last one keeps it as it is
    grid = _Grid(llm)
    grid.serve(1, 32)
    for _ in range(rounds):
        grid.read_prompts(prompts)
        grid.decode(batches, contexts)
    prompt, prompt_error = _fitted(grid.reads)
    decode, decode_error = _fitted(grid.steps)
    transfer = _fitted(grid.moves)[0] if grid.moves else None
    thousand = lambda each: tuple(1e3 * value for value in each)  # noqa: E731
    fit = Fit(thousand(prompt), thousand(decode), thousand(decode))  # type: ignore[arg-type]
    return Calibration(fit, prompt_error, decode_error, (transfer[0], transfer[1]) if transfer else None)


class _Grid:
    """Loads of one kind each, and what they took."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.random, self.split = llm, Random(0), isinstance(llm.layout, SplitLayout)
        self.longest = llm.config.max_positions - STEPS - 1
        self.reads: list[Measure] = []
        self.steps: list[Measure] = []
        self.moves: list[Measure] = []

    def read_prompts(self, lengths: Sequence[int]) -> None:
        """Prompts, one at a time; other ranks decode meanwhile, if there are any."""
        others = self.begin(4, min(96, self.longest // 2), min(400, self.longest // 2)) if self.split else []
        for length in (each for each in lengths if each <= min(self.longest, self.llm.options.max_step_tokens)):
            (life,) = self.serve(1, length, 2)
            self.reads.append(Measure((1.0, length, length * length), life.ttft_s))
            if self.split:
                size = length * self.llm.config.kv_numbers_per_token * self.llm.dtype.itemsize
                took_s = life.first(Event.CAME) - max(life.first(Event.TRANSFER), life.first(Event.TOKEN))
                self.moves.append(Measure((1.0, size), max(1e-4, took_s)))
        self.llm.cancel(others)

    def decode(self, batches: Sequence[int], contexts: Sequence[int]) -> None:
        """Batches of equal requests; other ranks read prompts meanwhile, if there are any."""
        for batch in batches:
            for length in (each for each in contexts if each <= self.longest):
                reads = -(
                    -batch * length // self.llm.options.max_step_tokens
                )  # steps, in which the first ones decode already
                meanwhile = reads * (DECODES if self.split else 1)
                lives = self.serve(batch, length, STEPS, prompts=2 if self.split else 0, meanwhile=meanwhile)
                last = max(lives, key=lambda life: life.token_s[0])
                for before_s, now_s in pairwise(last.token_s[1 : STEPS - 1]):
                    had, have = ([bisect_right(life.token_s, when) for life in lives] for when in (before_s, now_s))
                    if all(now == before + 1 for now, before in zip(have, had)):  # one step gave a token to all
                        self.steps.append(Measure((1.0, batch * length + sum(had), batch), now_s - before_s))

    def begin(self, batch: int, length: int, new: int) -> list[Request]:
        """Let so many requests begin to decode."""
        prompts = [self.random.choices(range(self.llm.config.vocab_size // 2), k=length) for _ in range(batch)]
        requests = self.llm.prepare(prompts, SamplingParams(max_tokens=new, ignore_eos=True))
        self.llm.submit(requests)
        while not all(request.token_ids for request in requests):
            self.llm.step()
        return requests

    def serve(
        self, batch: int, length: int, new: int = STEPS, prompts: int = 0, meanwhile: int = 0
    ) -> list[RequestLife]:
        """Serve so many requests until each has `new` tokens, and as many `prompts` after the first ones; their lives. The first may be given
        so many tokens more `meanwhile`.
        """
        requests = self.begin(batch, length, new + meanwhile)
        others = [each for _ in range(prompts) for each in self._long_prompt()]
        while any(len(request.token_ids) < new for request in requests):
            self.llm.step()
        self.llm.cancel([*requests, *others])
        return [request.life for request in requests]

    def _long_prompt(self) -> list[Request]:
        prompt = self.random.choices(range(self.llm.config.vocab_size // 2), k=min(300, self.longest))
        requests = self.llm.prepare([prompt], SamplingParams(max_tokens=1))
        self.llm.submit(requests)
        return requests


def _fitted(measures: Sequence[Measure]) -> tuple[tuple[float, ...], float]:
    """Coefficients, none below 0, with the least squares of relative errors over the median of each point's rounds; and their mean error."""
    points: dict[tuple[float, ...], list[float]] = {}
    for each in measures:
        points.setdefault(each.terms, []).append(each.seconds)
    terms = np.array(list(points))
    seconds = np.array([float(np.median(each)) for each in points.values()])
    used = list(range(terms.shape[1]))
    while True:  # a coefficient below 0 would be noise: leave its term out
        found, *_ = np.linalg.lstsq(terms[:, used] / seconds[:, None], np.ones(len(seconds)), rcond=None)
        if (found >= 0).all() or len(used) == 1:
            break
        used.pop(int(np.argmin(found)))
    coefficients = np.zeros(terms.shape[1])
    coefficients[used] = found
    error = float(np.mean(np.abs(terms @ coefficients / seconds - 1)))
    return tuple(float(each) for each in coefficients), error
