"""Clusters on a computed clock: machines that do both prefill and decode, or some for each, sent requests by the policies of the engine.

Who gets a request is decided by `policy/router.py` and `policy/handing.py`; the machines are those of `machine.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from minillm.hardware.devices import Link
from minillm.policy.handing import Dispatcher
from minillm.policy.queue import Queue
from minillm.policy.router import Router
from minillm.sim.clock import Clock
from minillm.sim.costs import Costs
from minillm.sim.machine import Limits, Machine
from minillm.sim.task import Task
from minillm.trace.workload import Arrival


@dataclass(frozen=True)
class Kind:
    """A kind of machine: how long its steps take, and what it holds. `waiting` makes the queue of its prompts, `admits` may hold back
    requests that come from elsewhere, and `gpus` are how many it has.
    """

    costs: Costs
    limits: Limits
    gpus: int = 1
    waiting: Callable[[], Queue[Task]] = Queue
    admits: Callable[[Machine, Task], bool] | None = None


class Cluster:
    """Machines, one of each of the `kinds` given. Subclasses say where requests go."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        if not kinds:
            raise ValueError("a cluster of no machines serves nobody: give at least one")
        self.clock = Clock()
        self.kinds = list(kinds)
        self.machines = [
            Machine(number, kind.costs, kind.limits, self.clock, self, kind.waiting(), kind.admits)
            for number, kind in enumerate(kinds)
        ]

    @property
    def gpus(self) -> int:
        """All of them."""
        return sum(kind.gpus for kind in self.kinds)

    def serve(self, arrivals: Sequence[Arrival]) -> list[Task]:
        """Serve these requests; returns them with what happened to each. Raises `ValueError` for one that fits nowhere."""
        tasks = [Task.of(number, arrival) for number, arrival in enumerate(arrivals)]
        self.clock.run(tasks, self.arrive)
        return tasks

    def arrive(self, task: Task) -> None:
        """A request is there."""
        raise NotImplementedError

    def started(self, machine: Machine, task: Task) -> None:
        """A machine begins to read its prompt."""

    def first(self, machine: Machine, task: Task) -> None:
        """A machine has read its prompt, and given the first of several tokens."""

    def finished(self, machine: Machine, task: Task) -> None:
        """It was given its last token."""

    def has_room(self, machine: Machine, task: Task) -> None:
        """A machine has room for its cache."""

    def idle(self, machine: Machine) -> None:
        """A machine has nothing to do."""

    def lendable(self, machine: Machine) -> int:
        """Tokens of cache that others would lend a machine now."""
        return 0

    def short(self, machine: Machine, tokens: int) -> None:
        """A machine lacks room for so many."""

    def away_s(self, machine: Machine) -> float:
        """Seconds that a decode step of a machine takes longer, because caches of its requests are elsewhere."""
        return 0.0


class Together(Cluster):
    """Every machine does both; `router` chooses."""

    def __init__(self, kinds: Sequence[Kind], router: Router) -> None:
        super().__init__(kinds)
        self.router = router

    def arrive(self, task: Task) -> None:
        self.machines[self.router.route(task.request_id, range(task.prompt), task.new)].add(task)

    def first(self, machine: Machine, task: Task) -> None:
        self.router.gave(task.request_id)

    def finished(self, machine: Machine, task: Task) -> None:
        self.router.ended(task.request_id)


@dataclass
class Wires:
    """How caches move: each machine sends over one `link` (None: in no time), `token_bytes` a token; with `layers` layer by layer while a
    prompt is read, where there is room by then (0: all once it is read). `shared`: what leaves a machine at the same time queues
    (off: every transfer has a link to itself).
    """

    link: Link | None = None
    token_bytes: float = 0.0
    layers: int = 0
    shared: bool = True
    _free_s: dict[int, float] = field(default_factory=dict)

    def sent_s(self, task: Task, sender: int, now_s: float) -> float:
        """When a cache is through the link that may leave from now on."""
        if self.link is None:
            return now_s
        begins_s = max(now_s, self._free_s.get(sender, 0.0)) if self.shared else now_s
        self._free_s[sender] = begins_s + self.link.time_s(task.prompt * self.token_bytes)
        return self._free_s[sender]

    def last_layer_s(self, task: Task) -> float:
        """What is left to send at least when the prompt has been read: its last layer."""
        if self.link is None or not self.layers:
            return 0.0
        return self.link.time_s(task.prompt * self.token_bytes / self.layers)


class Apart(Cluster):
    """Machines of which some read prompts, and others go on with them; a `dispatcher` chooses, as it does for the engine, and caches move
    over `wires`.
    """

    def __init__(self, kinds: Sequence[Kind], dispatcher: Dispatcher, wires: Wires) -> None:
        super().__init__(kinds)
        if len(dispatcher.roles) != len(kinds):
            raise ValueError(f"{len(dispatcher.roles)} roles for {len(kinds)} machines: give each of them one")
        self.dispatcher, self.wires = dispatcher, wires
        self._sent: set[int] = set()  # through the link before the prompt was read

    def arrive(self, task: Task) -> None:
        counted = task.predicted if self.dispatcher.guesses else task.new
        reader = self.dispatcher.route(task.request_id, range(task.prompt), counted)
        task.handed = task.new > 1 and self.dispatcher.hands(task.request_id)
        self.machines[reader].add(task)

    def started(self, machine: Machine, task: Task) -> None:
        if task.handed and (onward := self.dispatcher.started(task.request_id)) is not None:
            self.machines[onward].expect(task)

    def first(self, machine: Machine, task: Task) -> None:
        if not task.handed:
            self.dispatcher.gave(task.request_id)
        elif (onward := self.dispatcher.read(task.request_id)) is not None:
            self.machines[onward].expect(task)
        else:
            self.read(task)

    def finished(self, machine: Machine, task: Task) -> None:
        self.dispatcher.ended(task.request_id)

    def read(self, task: Task) -> None:
        """Its prompt has been read: if its cache is through the link but for the last layer, that follows."""
        if task.request_id in self._sent:
            self._sent.remove(task.request_id)
            self.clock.at(self.clock.now_s + self.wires.last_layer_s(task), self._came, task)

    def has_room(self, machine: Machine, task: Task) -> None:
        self.clock.at(
            self.wires.sent_s(task, self.dispatcher.ways[task.request_id].prefill, self.clock.now_s),
            self._through,
            task,
        )

    def _through(self, task: Task) -> None:
        """All that its sender had of a cache is through the link."""
        if task.given:
            self.clock.at(max(self.clock.now_s, task.first_s + self.wires.last_layer_s(task)), self._came, task)
        else:
            self._sent.add(task.request_id)

    def _came(self, task: Task) -> None:
        task.came_s = self.clock.now_s
        if (reader := self.dispatcher.came(task.request_id)) is not None:
            self.machines[reader].release(task.prompt)
        self.machines[self.dispatcher.ways[task.request_id].decode].join(task)
