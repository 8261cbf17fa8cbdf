"""What steps take on this machine, as users feel it, fitted to the coefficients that the simulator takes: prompts a + b · n + c · n², decode
steps a + b · context + c · batch, moves of a cache α + β · bytes. Runs an engine on a grid of small loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from minillm.hardware.profiles import Fit
from minillm.llm import LLM
from minillm.model.sampling import SamplingParams
from minillm.trace.life import Event

PROMPTS = (16, 48, 96, 160, 256, 384)
BATCHES = (1, 2, 4, 8)
CONTEXTS = (16, 128, 320)
STEPS = 8
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


def calibrate(llm: LLM) -> Calibration:
    """Run the grid, about half a minute on a laptop, and fit; moves are measured where the layout has some."""
    longest = llm.config.max_positions - STEPS - 1
    prompts = [each for each in PROMPTS if each <= min(longest, llm.options.max_step_tokens)]
    random, reads, steps, moves = Random(0), [], [], []
    _serve(llm, 1, 32, random)
    for _ in range(ROUNDS):
        for length in prompts:
            life = _serve(llm, 1, length, random, 2)[0]
            reads.append(Measure((1.0, length, length * length), life.ttft_s))
            if any(event is Event.CAME for event, _ in life.moments):
                size = length * llm.config.kv_numbers_per_token * llm.dtype.itemsize
                moves.append(Measure((1.0, size), max(1e-6, life.first(Event.CAME) - life.first(Event.TRANSFER))))
        for batch in BATCHES:
            for length in (each for each in CONTEXTS if each <= longest):
                lives = _serve(llm, batch, length, random)
                begins = max(life.token_s[0] for life in lives)  # from then on all decode
                for number in range(1, STEPS - 1):
                    ends = [life.token_s[number] for life in lives]
                    before = max(max(life.token_s[number - 1] for life in lives), begins)
                    if max(ends) - min(ends) < 0.5 * (min(ends) - before) and min(ends) > before:
                        steps.append(Measure((1.0, batch * (length + number), batch), min(ends) - before))
    prompt, prompt_error = _fitted(reads)
    decode, decode_error = _fitted(steps)
    transfer = _fitted(moves)[0] if moves else None
    thousand = lambda each: tuple(1e3 * value for value in each)  # noqa: E731
    fit = Fit(thousand(prompt), thousand(decode), thousand(decode))  # type: ignore[arg-type]
    return Calibration(fit, prompt_error, decode_error, (transfer[0], transfer[1]) if transfer else None)


def _serve(llm: LLM, batch: int, length: int, random: Random, new: int = STEPS) -> list:
    """So many prompts of random tokens at once; their lives."""
    prompts = [random.choices(range(llm.config.vocab_size // 2), k=length) for _ in range(batch)]
    llm.generate(prompts, SamplingParams(max_tokens=new, ignore_eos=True))
    return llm.trace.lives


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
