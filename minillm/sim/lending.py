"""Infinite-LLM simulated: machines that lend each other what is idle of their KV caches. A request lives where it was sent; when room runs out
there, the machine with most of it lends some, and each decode step asks there, too (Lin et al. 2024, sections 4 and 5).

Counts tokens, where `policy/lending.py` has blocks, requests and letters; what is lent comes back when the debtor needs less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from minillm.hardware.devices import Link, find_device, find_link
from minillm.model.cost import cache_room_bytes
from minillm.model.shapes import SHAPES
from minillm.policy.router import RoundRobin, Router
from minillm.sim.cluster import Cluster, Kind, Together
from minillm.sim.costs import Roofline
from minillm.sim.limits import Limits
from minillm.sim.machine import Machine
from minillm.sim.task import Task
from minillm.trace.workload import Arrival

KEPT = 0.05  # of its own cache a machine lends not
AT_ONCE = 16  # tokens for each request that decodes, so that not every step has to ask


class Lending(Together):
    """Machines that do both, and borrow. In each of `layers` a query of `query_bytes` for every request with tokens away goes over `link`, and
    an answer as large comes back.
    """

    def __init__(self, kinds: Sequence[Kind], router: Router, link: Link, layers: int, query_bytes: float) -> None:
        super().__init__(kinds, router)
        self.link, self.layers, self.query_bytes = link, layers, query_bytes
        self.debts: dict[tuple[int, int], int] = {}  # (debtor, creditor) -> tokens
        self.most_borrowed = 0

    def lendable(self, machine: Machine) -> int:
        return sum(self._spare(each) for each in self.machines if each is not machine)

    def short(self, machine: Machine, tokens: int) -> None:
        """Borrow, of who has most to spare first; all of it, and something for the next steps, or nothing."""
        if self.lendable(machine) < tokens:
            return
        wanted = min(self.lendable(machine), tokens + AT_ONCE * machine.decodes.batch)
        for creditor in sorted(self.machines, key=self._spare, reverse=True):
            part = min(wanted, self._spare(creditor)) if creditor is not machine else 0
            if part:
                self._lend(creditor, machine, part)
                wanted -= part
        self.most_borrowed = max(self.most_borrowed, sum(self.debts.values()))

    def finished(self, machine: Machine, task: Task) -> None:
        super().finished(machine, task)
        self._give_back(machine)

    def away_s(self, machine: Machine) -> float:
        if not machine.borrowed:
            return 0.0
        share = machine.borrowed / (machine.limits.cache_tokens + machine.borrowed)
        asking = max(1, round(share * machine.decodes.batch))
        return 2 * self.layers * self.link.time_s(asking * self.query_bytes)

    def _spare(self, machine: Machine) -> int:
        """What a machine would lend: who owes, or has prompts that wait, lends nothing."""
        return (
            0
            if machine.borrowed or machine.waiting
            else max(0, machine.idle_tokens - int(KEPT * machine.limits.cache_tokens))
        )

    def _lend(self, creditor: Machine, debtor: Machine, tokens: int) -> None:
        creditor.lent += tokens
        debtor.borrowed += tokens
        key = debtor.number, creditor.number
        self.debts[key] = self.debts.get(key, 0) + tokens

    def _give_back(self, debtor: Machine) -> None:
        """Whatever the debtor does not need any more; machines that wait for room may look again."""
        for key in [each for each in self.debts if each[0] == debtor.number]:
            back = min(self.debts[key], max(0, debtor.free))
            self.debts[key] -= back
            debtor.borrowed -= back
            self.machines[key[1]].lent -= back
            if not self.debts[key]:
                del self.debts[key]
        for machine in self.machines:
            if machine.waiting and machine is not debtor:
                machine.look()


def llama(machines: int, lends: bool) -> Cluster:
    """Llama-2-7B on A100s, as the paper has it, one GPU a machine by roofline, NVLink between them; requests take turns."""
    config, device, link = SHAPES["Llama-2-7B"], find_device("A100 80GB"), find_link("NVLink 3")
    room = int(cache_room_bytes(config, device, "float16") / (config.kv_numbers_per_token * 2))
    kinds = [Kind(Roofline(config, device, "float16"), Limits(room, 256, 8192, chunked=True))] * machines
    if not lends:
        return Together(kinds, RoundRobin(machines))
    return Lending(kinds, RoundRobin(machines), link, config.layers, config.hidden_size * 2.0)


def gain(seed: int, machines: int = 8, spread: float = 0.8) -> float:
    """Tokens/s with lending over those without. Each machine has users of its own, whose answers are around 2,000 tokens times a log-normal factor
    with so much spread, up to 40,000 (the paper's traces 0 to 2 have 1,000 to 60,000); 100 requests for each, all there at once.
    """
    random = Random(seed)
    means = [min(40_000, 2_000 * math.exp(random.gauss(0, spread))) for _ in range(machines)]
    arrivals = [Arrival(0.0, 500, max(1, round(mean * random.uniform(0.8, 1.2)))) for _ in range(100) for mean in means]
    lasts = [max(task.finished_s for task in llama(machines, lends).serve(arrivals)) for lends in (False, True)]
    return lasts[0] / lasts[1]
