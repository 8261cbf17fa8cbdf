"""TetriInfer simulated: prompts in chunks of one size, sorted a window at a time; decode instances chosen by predicted lengths and what was
last broadcast; three gates; roles that change (Hu et al. 2024). The paper's machines are emulated by a roofline: only signs and orders
of its figures can be looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from minillm.hardware.devices import Link, find_device
from minillm.model.config import ModelConfig
from minillm.policy.admission import GATES, HEAVY, Gate, Predictor, Running
from minillm.policy.handing import Dispatcher, Role
from minillm.policy.queue import PROMPT_ORDERS, Queue, by_length
from minillm.policy.router import LeastTokens
from minillm.policy.spread import PowerOfTwo
from minillm.sim.broadcast import Broadcasting
from minillm.sim.cluster import Cluster, Kind, Together, Wires
from minillm.sim.costs import Costs, Roofline
from minillm.sim.machine import Limits, Machine
from minillm.sim.task import Task
from minillm.trace.workload import Arrival

OPT_13B = ModelConfig("llama", 50272, 5120, 13653, 40, 40, 40, 128, 2048)  # its MLP of two products as three, as large
CHUNK = 512  # tokens of a chunk, OPT-13B on V100
HEAVY_PROMPT = 512
WORKLOADS = {  # (prompts, answers) light or heavy: LPHD is light prompts, heavy decodes
    "LPLD": (False, False), "LPHD": (False, True), "HPLD": (True, False), "HPHD": (True, True),
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """How many instances of each kind, and the switches: `order` of prompts in windows of `window`, the `gate` of decode instances, and the
    `predictor` of lengths (None: it knows them). A gate may be a function of one's own, too. `idle_s` before an instance may change its role (None: never).
    """

    prefills: int = 1
    decodes: int = 1
    order: str = "sjf"
    window: int = 16
    gate: str | Gate = "reserve-dynamic"
    predictor: Predictor | None = Predictor(200, 0.749)
    link: Link | None = None
    idle_s: float | None = None
    cache_tokens: int = 20_000

    def __post_init__(self) -> None:
        for name, known in (("order", PROMPT_ORDERS), ("gate", GATES)):
            if not callable(getattr(self, name)) and getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: give one of {', '.join(known)}")


def v100_pair() -> Costs:
    """OPT-13B on two V100, as the paper has them."""
    return Roofline(OPT_13B, find_device("V100 32GB"), "float16", tp=2)


def admit_by(gate: Gate) -> Callable[[Machine, Task], bool]:
    """Lets requests that come from elsewhere in as a gate says; alone they may start, if they fit."""

    def admits(machine: Machine, task: Task) -> bool:
        running = [
            Running(each.prompt + given, max(1, each.predicted - given)) for each, given in machine.decodes.tasks
        ]
        return not running or gate(task.tokens, max(1, task.predicted - task.given), machine.free, running)

    return admits


class Tetri(Broadcasting):
    """Machines that read, and machines that go on."""

    def __init__(self, setup: Setup, costs: Costs, seed: int = 0) -> None:
        self.setup, self.random = setup, Random(seed)
        admits = admit_by(setup.gate if callable(setup.gate) else GATES[setup.gate])
        count = setup.prefills + setup.decodes
        reads = Limits(setup.cache_tokens, 10_000, CHUNK, chunked=True)
        goes_on = Limits(setup.cache_tokens, 256, CHUNK, chunked=True)
        kinds = [Kind(costs, reads, 2, self._queue)] * setup.prefills + [
            Kind(costs, goes_on, 2, Queue, admits)
        ] * setup.decodes
        roles = [Role.PREFILL] * setup.prefills + [Role.DECODE] * setup.decodes
        spread, token_bytes = PowerOfTwo(count, self.random), OPT_13B.kv_numbers_per_token * 2.0
        dispatcher = Dispatcher(roles, LeastTokens(count), spread)
        super().__init__(kinds, dispatcher, Wires(setup.link, token_bytes), setup.idle_s)

    def arrive(self, task: Task) -> None:
        if self.setup.predictor is not None:
            task.predicted = self.setup.predictor.lower_end(task.new, self.random)
        super().arrive(task)

    def _queue(self) -> Queue[Task]:
        return by_length(self.setup.order, self.setup.window, lambda task: task.prompt)


def baseline(costs: Costs, running: int = 16, cache_tokens: int = 20_000, instances: int = 1) -> Cluster:
    """vLLM as the paper seems to have it: one instance that does both, prompts first, with at most so many requests at once. (The paper says
    "batch 16"; its figures of resource time fit one instance, half of what TetriInfer has.)
    """
    kind = Kind(costs, Limits(cache_tokens, running, 8192, apart=True), 2)
    return Together([kind] * instances, LeastTokens(instances))


def workload(name: str, seed: int, count: int = 128) -> list[Arrival]:
    """So many requests at once, of a kind, or "Mixed": light prompts up to 512 tokens, light answers up to 128, heavy ones up to three times
    as long. Raises `ValueError` for another name.
    """
    if name != "Mixed" and name not in WORKLOADS:
        raise ValueError(f"workload={name!r}: give one of {', '.join(WORKLOADS)}, Mixed")
    random, arrivals = Random(seed), []
    for _ in range(count):
        kinds = WORKLOADS[name] if name != "Mixed" else (random.random() < 0.5, random.random() < 0.5)
        lengths = [
            random.randint(limit + 1, 3 * limit) if heavy else random.randint(8, limit)
            for limit, heavy in zip((HEAVY_PROMPT, HEAVY), kinds)
        ]
        arrivals.append(Arrival(0.0, *lengths))
    return arrivals


def means(tasks: Sequence[Task]) -> tuple[float, float]:
    """Mean TTFT and mean job completion time, in seconds."""
    return sum(task.ttft_s for task in tasks) / len(tasks), sum(task.e2e_s for task in tasks) / len(tasks)
