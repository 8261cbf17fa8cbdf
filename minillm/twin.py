"""The simulated twin of an engine: the same instances, options and policies, with steps as long as they were measured on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random

from minillm.calibrate import Calibration
from minillm.disagg.control import make_dispatcher
from minillm.disagg.layout import SplitLayout
from minillm.hardware.devices import Link
from minillm.llm import LLM
from minillm.parallel.data import Replicas
from minillm.policy.admission import GATES
from minillm.policy.options import EngineOptions
from minillm.policy.pooled import PoolDispatcher
from minillm.policy.queue import Queue, by_length
from minillm.policy.router import make_router
from minillm.sim.broadcast import Broadcasting
from minillm.sim.cluster import Cluster, Kind, Together, Wires
from minillm.sim.costs import Fitted
from minillm.sim.machine import Limits
from minillm.sim.task import Task
from minillm.sim.tetri import admit_by
from minillm.trace.life import RequestLife
from minillm.trace.metrics import percentile

KINDS = ("ttft", "tpot")


class Twin(Broadcasting):
    """Prefill and decode instances with the dispatcher, gate, predictor and order of prompts of an engine's options."""

    def __init__(self, llm: LLM, found: Calibration) -> None:
        assert isinstance(llm.layout, SplitLayout)
        options, roles = llm.options, llm.layout.roles
        limits = _limits(llm)
        queue = partial(_queue, options)
        dispatcher = make_dispatcher(roles, options, make_router(llm.router, len(roles)))
        if isinstance(dispatcher, PoolDispatcher):
            dispatcher.pools.cache_tokens = [each.cache_tokens for each in limits]
            dispatcher.pools.most_pending = llm.engine.dispatcher.pools.most_pending  # type: ignore[union-attr]
        self.predictor, self.random = options.predictor, Random(0)
        alpha_s, byte_s = found.transfer or (0.0, 0.0)
        link = Link("calibrated", 1 / byte_s if byte_s else 1e15, alpha_s, "measured here")
        token_bytes = llm.config.kv_numbers_per_token * float(llm.dtype.itemsize)
        admits = None if options.gate == "greedy" else admit_by(GATES[options.gate])
        kinds = [Kind(Fitted(found.fit), each, waiting=queue, admits=admits) for each in limits]
        wires = Wires(link, token_bytes, 1)  # what is seen of a move was measured
        super().__init__(kinds, dispatcher, wires, options.idle_s)

    def arrive(self, task: Task) -> None:
        if self.predictor is not None:
            task.predicted = max(1, self.predictor.lower_end(task.new, self.random))
        super().arrive(task)


def twin_of(llm: LLM, found: Calibration) -> Cluster:
    """The twin of an LLM whose steps were found to take so long: replicas, or prefill and decode instances. Raises `ValueError` for one that
    is neither.
    """
    if isinstance(llm.layout, SplitLayout):
        return Twin(llm, found)
    if llm.layout.instances == 1:
        raise ValueError(
            f"layout {str(llm.layout)!r} is one instance: give one such as 'dp=2' or 'prefill=1xtp=1,decode=1xtp=1'"
        )
    kinds = [Kind(Fitted(found.fit), each, waiting=partial(_queue, llm.options)) for each in _limits(llm)]
    return Together(kinds, make_router(llm.router, len(kinds)))


def _limits(llm: LLM) -> list[Limits]:
    """Of its instances, in order."""
    assert isinstance(llm.engine, Replicas)
    options = llm.options
    chunked, reserve = options.chunked_prefill, not options.preemption
    return [
        Limits(
            each.num_blocks * options.block_size, options.max_running, options.max_step_tokens, chunked=chunked, reserve=reserve
        )
        for each in llm.engine.engines
    ]  # fmt: skip


def _queue(options: EngineOptions) -> Queue[Task]:
    if options.prompt_order == "fcfs":
        return Queue()
    return by_length(options.prompt_order, options.prompt_window, lambda task: task.tokens)


def compare(tasks: Sequence[Task], lives: Sequence[RequestLife], percents: Sequence[int] = (50, 90)) -> str:
    """A table of TTFT and TPOT, simulated and as they were, in ms."""
    lines = [f"{'ms':10}{'simulated':>11}{'real':>8}"]
    for kind in KINDS:
        for percent in percents:
            both = [[getattr(each, f"{kind}_s") for each in some] for some in (tasks, lives)]
            simulated, real = (1e3 * percentile(each, percent).value for each in both)
            lines.append(f"{kind.upper()} P{percent:<5}{simulated:11,.0f}{real:8,.0f}")
    return "\n".join(lines)
