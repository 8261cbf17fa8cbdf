"""How the papers' claims are measured: one number for a seed each. What is claimed, and what is held to it, is in `claims.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from statistics import mean, median

from minillm.policy.admission import Predictor
from minillm.sim import distserve, lending, splitwise, tetri
from minillm.sim.distserve import BOTH, FIGURE_8, Setting
from minillm.sim.splitwise import A100, H100, H100_CAPPED, Design
from minillm.trace.metrics import SLO
from minillm.trace.workload import PERCENTS, TRACED, Quantiles, find_trace, read_trace

SEEDS = 8


@cache
def _lengths(name: str) -> tuple[tuple[int, int], ...] | Quantiles:
    """The lengths of an Azure trace, or those drawn from what is published of it where the file is not here."""
    file = find_trace(name)
    return TRACED[name] if file is None else tuple((each.prompt_tokens, each.new_tokens) for each in read_trace(file))


def median_length(trace: str, side: int, seed: int) -> float:
    """The median of a trace's prompts (side 0) or answers (1); where the file is not here, of what was computed from it."""
    lengths = _lengths(trace)
    if isinstance(lengths, Quantiles):
        return float((lengths.prompts, lengths.news)[side][PERCENTS.index(50)])
    return float(median(pair[side] for pair in lengths))


@cache
def throughput(design: Design, trace: str, seed: int, as_released: bool = True) -> float:
    """Requests per second of a design that keep all nine objectives, to 2 %; two minutes of a trace's lengths."""
    load = splitwise.poisson_load(_lengths(trace))
    keeps = lambda rate: not splitwise.misses(splitwise.build(design, as_released=as_released).serve(load(rate, seed)))  # noqa: E731
    return splitwise.highest_rate(keeps, 5, 245, 2.5)


AA, HH = Design("Splitwise-AA", A100, 45, A100, 25), Design("Splitwise-HH", H100, 25, H100, 15)
HA = Design("Splitwise-HA", H100, 25, A100, 26)
CAPPED = Design("Splitwise-HHcap", H100, 25, H100_CAPPED, 21)
ALL_A, ALL_H = Design("Baseline-A100", A100, 70), Design("Baseline-H100", H100, 40)
CONVERSATION = "azure-conversation"


def over(one: Design, other: Design, seed: int, as_released: bool = True) -> float:
    """The throughput of one design over that of another, on conversations."""
    return throughput(one, CONVERSATION, seed, as_released) / throughput(other, CONVERSATION, seed, as_released)


def cheapest_for_coding(seed: int, rate: float = 70.0, tokens: Sequence[int] = range(1, 7)) -> tuple[int, int]:
    """The fewest H100 machines, (prompts, tokens), that keep all objectives on the coding trace at a rate, with so many for tokens."""
    load = splitwise.poisson_load(_lengths("azure-code"))(rate, seed)
    best: tuple[int, int] | None = None
    for count in tokens:
        for prompts in range(18, 41):
            if best is not None and prompts + count >= sum(best):
                break
            if not splitwise.misses(splitwise.build(Design("HH", H100, prompts, H100, count)).serve(load)):
                best = (prompts, count)
                break
    return best or (0, 0)


cheapest = cache(cheapest_for_coding)


def power_saved(trace: str, seed: int) -> float:
    """How much less power the least capped cluster draws that serves what Baseline-H100 serves, in percent."""
    load = splitwise.poisson_load(_lengths(trace))(throughput(ALL_H, trace, seed), seed)
    least = ALL_H.power
    for prompts in range(16, 38):
        few, many = (
            0,
            int((least - prompts * H100.power) / H100_CAPPED.power),
        )  # machines for tokens: too few, and more than enough
        while many - few > 1 or few == 0 < many:
            tokens = (few + many + 1) // 2
            design = Design("HHcap", H100, prompts, H100_CAPPED, tokens)
            if splitwise.misses(splitwise.build(design).serve(load)):
                few = tokens
            else:
                many, least = tokens, min(least, design.power)
            if few == many or (few == 0 and many == 1):
                break
    return 100 * (1 - least / ALL_H.power)


CHAT = Setting(slo=SLO(0.2, 0.1))


def chosen(seed: int) -> float:
    """Whether the search takes tensor parallel 2 for prefill, and for decode 1: 1 if so."""
    return float(distserve.place_low(CHAT, 4, seed).placement == BOTH)


@dataclass(frozen=True)
class Longer:
    """Prompts of 1 to 1,900 tokens, each length as likely (910 on average, of those that fit), answers as before."""

    def draw(self, random: Random) -> tuple[int, int]:
        """(prompt tokens, new tokens) of one request."""
        return random.randint(1, 1900), distserve.SHARED_LENGTHS.draw(random)[1]


def per_gpu(seed: int, lengths: distserve.Drawn = CHAT.lengths) -> float:
    """The goodput of that placement for each GPU."""
    setting = replace(CHAT, lengths=lengths)
    return distserve.goodput(lambda: distserve.build(BOTH, setting), setting, seed)


@cache
def vllm_per_gpu() -> float:
    """The goodput of one GPU with vLLM's fitted times, prompts first: the mean over all seeds, for with some it is next to nothing."""
    theirs = replace(FIGURE_8, engine="vLLM")
    return mean(distserve.goodput(lambda: distserve.colocated(theirs, 1), theirs, seed) for seed in range(SEEDS))


def over_vllm(seed: int) -> float:
    """The placement's goodput for each GPU over that, with the SLO of the paper's figure 8."""
    return distserve.goodput(lambda: distserve.build(BOTH, FIGURE_8), FIGURE_8, seed) / vllm_per_gpu()


@cache
def tetri_over_vllm(workload: str, seed: int) -> tuple[float, float]:
    """TTFT and job completion time of TetriInfer over the baseline's, means of 128 requests at once."""
    arrivals, costs = tetri.workload(workload, seed), tetri.v100_pair()
    mine = tetri.means(tetri.Tetri(tetri.Setup(), costs, seed).serve(arrivals))
    base = tetri.means(tetri.baseline(costs).serve(arrivals))
    return mine[0] / base[0], mine[1] / base[1]


def gates(seed: int) -> float:
    """Job completion time with reserve-dynamic over that with greedy, lengths known for sure, heavy answers."""
    arrivals, costs = tetri.workload("LPHD", seed), tetri.v100_pair()
    known = tetri.Setup(predictor=Predictor(1, 1.0, 10_000))
    times = [
        tetri.means(tetri.Tetri(replace(known, gate=gate), costs, seed).serve(arrivals))[1]
        for gate in ("reserve-dynamic", "greedy")
    ]
    return times[0] / times[1]


@cache
def lending_gain(seed: int, machines: int, spread: float) -> float:
    """Tokens per second of machines that lend each other memory over those that do not."""
    return lending.gain(seed, machines, spread)


def lending_grows(seed: int) -> float:
    """Whether that grows with the variance of lengths, and with the number of machines: 1 if so."""
    by_spread = [lending_gain(seed, 8, spread) for spread in (0.0, 0.4, 1.2)]
    by_count = [lending_gain(seed, machines, 1.2) for machines in (2, 8)]
    return float(by_spread == sorted(set(by_spread)) and by_count == sorted(set(by_count)))
