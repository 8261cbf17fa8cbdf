"""Exercises of lesson 14: which prompts share a step, the mean TTFT of a pipeline and of tensor parallel ranks, and a placement that is found
with few simulations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from minillm.lesson.exercise import Case, Exercise, Outcome, RuleError
from minillm.sim import distserve
from minillm.sim.distserve import Parallelism, Placement, Setting
from minillm.trace.metrics import SLO
from minillm.trace.workload import Lengths

SIZES = (1, 2, 4)
NEARLY = 0.93  # of the best goodput for each GPU: seeds differ by as much
MOST = 50  # simulations
PATIENCE = 5 * MOST
LOWEST, HIGHEST = 0.2, 12.0  # requests/s for each GPU that are looked at


def batch_spec(case: Case) -> list[int]:
    """In order, as long as the sum stays within L_m; a longer prompt goes alone."""
    waiting, saturating = case.inputs
    total = count = 0
    for tokens in waiting:
        if count and total + tokens > saturating:
            break
        total, count = total + tokens, count + 1
    return [count]


def means_spec(case: Case) -> list[float]:
    """Formulas (2) and (3) of the paper."""
    rate, service_s, gain = case.inputs
    load = rate * service_s
    inter = service_s + rate * service_s**2 / (4 * (2 - load)) if load < 2 else float("inf")
    intra = service_s / gain + rate * service_s**2 / (2 * gain * (gain - load)) if load < gain else float("inf")
    return [inter, intra]


@lru_cache(512)
def _within(setting: Setting, prefill: int, decode: int, rate: float) -> float:
    """The share of requests within both goals, of a pair of instances at a rate for each GPU."""
    placement = Placement(Parallelism(prefill), Parallelism(decode))
    tasks = distserve.build(placement, setting).serve(distserve.load(setting, rate * placement.gpus, 0))
    return distserve.attainment(tasks, setting.slo)


@lru_cache(64)
def _goodput(setting: Setting, prefill: int, decode: int) -> float:
    """The highest rate for each GPU at which nine in ten are within both goals."""
    low, high = LOWEST, HIGHEST
    if _within(setting, prefill, decode, low) < 0.9:
        return 0.0
    while high > 1.04 * low:
        rate = (low * high) ** 0.5
        low, high = (rate, high) if _within(setting, prefill, decode, rate) >= 0.9 else (low, rate)
    return low


def drive_place(function: Callable[..., Any], case: Case) -> Outcome:
    """The output: whether the pair found is nearly the best; the work: simulations. Raises `RuleError` for no pair, and for one that is worse."""
    (setting,) = case.inputs
    used = 0

    def simulate(prefill: int, decode: int, rate: float) -> float:
        nonlocal used
        if prefill not in SIZES or decode not in SIZES:
            raise RuleError(f"simulate({prefill!r}, {decode!r}, …): instances have 1, 2 or 4 ranks")
        if not isinstance(rate, (int, float)) or not 0 < rate <= 2 * HIGHEST:
            raise RuleError(f"simulate(…, {rate!r}): give requests/s for each GPU, above 0 and up to {2 * HIGHEST:g}")
        used += 1
        if used > PATIENCE:
            raise RuleError(f"{PATIENCE} simulations, and no end: the target is {MOST}; a pair may be out after one")
        return _within(setting, prefill, decode, float(rate))

    found = function(simulate)
    if not (isinstance(found, tuple) and len(found) == 2 and all(each in SIZES for each in found)):
        raise RuleError(f"return (prefill ranks, decode ranks), each 1, 2 or 4, not {found!r:.60}")
    serves = _goodput(setting, *found)
    others = [(one, other) for one in SIZES for other in SIZES if (one, other) != found]
    if better := [pair for pair in others if _within(setting, *pair, max(LOWEST, serves / NEARLY)) >= 0.9]:
        most = max(_goodput(setting, *pair) for pair in better)
        raise RuleError(
            f"{found} serves {serves:.2f} requests/s for each GPU within the goals; another pair serves {most:.2f}"
        )
    return Outcome([True], used)


FEW = Setting(requests=250)
WORKLOADS = {
    "a chat, TTFT 0.2 s, TPOT 0.1 s": FEW,
    "the first token may take 1 s, TPOT 0.03 s": replace(FEW, slo=SLO(1.0, 0.03)),
    "short prompts, TTFT 0.8 s, TPOT 0.03 s": replace(FEW, lengths=Lengths(400, 0.4, 100, 0.4), slo=SLO(0.8, 0.03)),
    "long prompts, short answers": replace(FEW, lengths=Lengths(1100, 0.3, 20, 0.9)),
    "longer answers, TTFT 0.3 s, TPOT 0.06 s": replace(FEW, lengths=Lengths(400, 0.4, 250, 0.4), slo=SLO(0.3, 0.06)),
}  # fmt: skip

BATCH = Exercise(
    name="14.batch",
    function="batch",
    minutes=5,
    spec=batch_spec,
    names=("prompts in the step",),
    cases=(
        Case("one that fits", ([100], 512)),
        Case("two that fit together", ([200, 300], 512)),
        Case("the second is too much", ([300, 300], 512)),
        Case("exactly L_m", ([212, 300], 512)),
        Case("a long one goes alone", ([900, 100], 512)),
        Case("a long one waits its turn", ([100, 900, 100], 512)),
        Case("nobody overtakes", ([400, 200, 50], 512)),
        Case("many short ones", ([64] * 12, 512)),
        Case("nobody waits", ([], 512)),
        Case("another device", ([100, 100, 100], 256)),
    ),
    starter='''\
def batch(waiting, saturating):
    """How many of the waiting prompts, from the first on, the next step reads (DistServe, section
    4.3).

    waiting: their tokens, in order of arrival. Together they have at most `saturating` tokens (L_m,
    from which on the GPU computes all the time); a prompt that is longer by itself goes alone.
    Nobody overtakes.
    """
    return min(1, len(waiting))  # MEND (about 6 lines)
''',
    solution='''\
def batch(waiting, saturating):
    """The first always; then as long as the sum stays within L_m."""
    total = count = 0
    for tokens in waiting:
        if count and total + tokens > saturating:
            break
        total, count = total + tokens, count + 1
    return count
''',
    hints=(
        "The first prompt goes in any case, however long. What must be true for the next one?",
        "Keep a sum and a count; stop at the first prompt, other than the very first, that takes the sum above saturating.",
    ),
)

MEANS = Exercise(
    name="14.means",
    function="means",
    minutes=10,
    spec=means_spec,
    drive=lambda function, case: Outcome(list(function(*case.inputs))),
    names=("the pipeline", "tensor parallel ranks"),
    cases=(
        Case("hardly anybody there", (0.1, 1.0, 1.5)),
        Case("a busy queue", (1.2, 1.0, 1.5)),
        Case("short prompts, as busy", (12.0, 0.1, 1.5)),
        Case("tensor parallel ranks that gain much", (1.2, 1.0, 1.9)),
        Case("only the pipeline keeps up", (1.7, 1.0, 1.6)),
        Case("at the limit of tensor parallel ranks", (1.5, 1.0, 1.5)),
        Case("neither keeps up", (2.5, 1.0, 1.9)),
        Case("at the limit of the pipeline", (2.0, 1.0, 1.9)),
        Case("just below it", (1.95, 1.0, 1.9)),
    ),
    starter='''\
def means(rate, service_s, gain):
    """[mean TTFT of a pipeline of two stages, mean TTFT of two tensor parallel ranks], in seconds.

    rate prompts come in a second (R), each takes service_s on one device (D). The pipeline takes as
    long for one prompt, but begins the next one after half of it: D + R D² / (4 (2 - R D)). Two
    tensor parallel ranks read it `gain` times as fast (K): D/K + R D² / (2 K (K - R D)). Where a
    queue grows for ever: math.inf.
    """
    return [service_s, service_s / gain]  # MEND (about 6 lines)
''',
    solution='''\
def means(rate, service_s, gain):
    """Both formulas, where their queues are stable."""
    load = rate * service_s
    inter = intra = math.inf
    if load < 2:
        inter = service_s + rate * service_s**2 / (4 * (2 - load))
    if load < gain:
        intra = service_s / gain + rate * service_s**2 / (2 * gain * (gain - load))
    return [inter, intra]
''',
    hints=(
        "R D is how many devices would be busy. From which load on does each of the two fall behind? There its formula means nothing.",
        "The pipeline takes in two prompts per D: it keeps up while R·D < 2. The two ranks take in K: while R·D < K. Else math.inf.",
    ),
)

PLACE = Exercise(
    name="14.place",
    function="place",
    minutes=25,
    spec=lambda case: [True],
    drive=drive_place,
    target=lambda case: MOST,
    unit="simulations",
    plain=False,
    names=("nearly the best",),
    cases=tuple(Case(name, (setting,)) for name, setting in WORKLOADS.items()),
    starter='''\
def place(simulate):
    """(prefill ranks, decode ranks), each 1, 2 or 4: the pair that serves most requests/s for each
    GPU.

    simulate(prefill, decode, rate) is the share of requests within both goals at so many requests/s
    for each GPU; at its goodput that falls below 0.9. There are nine pairs. Target: at most 50
    simulations. A pair within 7 % of the best counts.
    """
    pairs = [(p, d) for p in (1, 2, 4) for d in (1, 2, 4)]
    return max(pairs, key=lambda pair: simulate(*pair, 1.0))  # MEND (about 8 lines)
''',
    solution='''\
def place(simulate):
    """A champion climbs until it fails; whoever serves the rate at which it failed takes its place."""
    best, rate = None, 0.5
    for pair in [(p, d) for p in (1, 2, 4) for d in (1, 2, 4)]:
        while simulate(*pair, rate) >= 0.9:
            best, rate = pair, 1.15 * rate
    return best
''',
    hints=(
        "A pair that fails at a rate which another one serves is out, with one simulation. Do not look for every pair's goodput, nor compare shares at a rate that nobody serves.",
        "A champion climbs, by a seventh at a time, until its share is below 0.9. Whoever serves the rate at which it failed takes its place, and climbs on.",
    ),
)  # fmt: skip

EXERCISES = (BATCH, MEANS, PLACE)
