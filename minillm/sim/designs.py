"""What lesson 15 asks of the simulator: machines by the tokens that they read and give for each watt, and a small cluster whose nine objectives
are looked at one by one (Splitwise, Patel et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minillm.sim import splitwise
from minillm.sim.costs import Measured
from minillm.sim.report import SimReport
from minillm.sim.splitwise import BLOOM, SLOW_DOWNS, TYPES, Design, Hosted
from minillm.trace.workload import TRACED

COST = 8 * 4.76  # of the same, as in the scripts
PROMPT_TOKENS, BATCH = 2048, 32  # of a step that reads, and of one that decodes
SECONDS = 60.0
BUDGET = 352.0  # power of 8 H100 machines, in the scripts' unit: a fifth of the paper's clusters
NAMES = {"A": "A100", "H": "H100", "Hcap": "capped H100"}


def tokens_per_power(model: Hosted = BLOOM) -> dict[str, tuple[float, float]]:
    """Prompt tokens/s and decode tokens/s over the power of a machine of each type, as multiples of an A100 machine's."""
    found = {}
    for name, machine in TYPES.items():
        costs = Measured.published(model.name, machine.gpu, machine.capped)
        read = PROMPT_TOKENS / costs.prompt_s(PROMPT_TOKENS, 0) / machine.power
        found[NAMES[name]] = read, BATCH / costs.decode(BATCH)[0] / machine.power
    first = found["A100"]
    return {name: (read / first[0], give / first[1]) for name, (read, give) in found.items()}


@dataclass(frozen=True)
class Trial:
    """A small cluster under a load: its design, each objective's slow-down over its limit (up to 1 is kept), and how busy it was."""

    design: Design
    over: Mapping[str, float]
    busy: float

    @property
    def kept(self) -> int:
        """Objectives that are kept."""
        return sum(each <= 1 for each in self.over.values())


def budgeted(prompt: str, token: str | None, share: float, budget: float = BUDGET) -> Design:
    """As many machines of two types (keys of `TYPES`) as a power budget allows, `share` of them for prompts; without `token` all do both.

    Raises `ValueError` for a budget that is too small, and for types that are not known.
    """
    if not {prompt, token or prompt} <= TYPES.keys():
        raise ValueError(f"{prompt!r}, {token!r}: machines are {', '.join(TYPES)}")
    first = TYPES[prompt]
    if token is None:
        return Design(f"all {NAMES[prompt]}", first, int(budget / first.power))
    second = TYPES[token]
    count = budget / (share * first.power + (1 - share) * second.power)
    prompts = max(1, min(round(share * count), int((budget - second.power) / first.power)))  # one is left to decode
    tokens = int((budget - prompts * first.power) / second.power)
    return Design(f"{NAMES[prompt]} read, {NAMES[token]} decode", first, prompts, second, tokens)


def trial(
    design: Design,
    rate: float,
    load: str = "azure-conversation",
    as_released: bool = True,
    seed: int = 0,
    mixed: bool = True,
) -> Trial:
    """A minute of a load with a trace's lengths on a design."""
    cluster = splitwise.build(design, as_released=as_released, mixed=mixed)
    tasks = cluster.serve(splitwise.poisson_load(TRACED[load], SECONDS)(rate, seed))
    found = splitwise.slow_downs(tasks)
    over = {
        f"{name.upper()} P{percent}": value / limit
        for name, limits in SLOW_DOWNS.items()
        for percent, limit, value in zip((50, 90, 99), limits, found[name])
    }
    return Trial(design, over, SimReport.of(cluster, tasks).busy)
