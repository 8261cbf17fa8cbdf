"""The simulated engine: closed forms, and the same schedule as the real one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_checkpoint

from minillm import LLM, EngineOptions, SamplingParams
from minillm.hardware.devices import DEVICES, find_device
from minillm.model.cost import pass_cost
from minillm.model.shapes import SHAPES
from minillm.policy.batch import Batch, Chunk
from minillm.policy.router import ROUTERS
from minillm.sim.engine import simulate
from minillm.trace.trace import Clock
from minillm.trace.workload import Arrival

SMALL = SHAPES["SmolLM2-135M"]


def test_one_request_takes_the_sum_of_its_steps() -> None:
    device = find_device("H100")
    trace = simulate([Arrival(5.0, 100, 3)], SMALL, device, "float16")
    steps = [
        Batch((Chunk(0, 0, (0,) * 100, ()),)),
        Batch((Chunk(0, 100, (0,), ()),)),
        Batch((Chunk(0, 101, (0,), ()),)),
    ]
    costs = [
        pass_cost(SMALL, step, 2).total.time_s(device.flops_per_s("float16"), device.bytes_per_s) for step in steps
    ]
    assert trace.clock is Clock.PLANNED
    assert trace.lives[0].ttft_s == pytest.approx(costs[0])
    assert trace.lives[0].e2e_s == pytest.approx(sum(costs))
    assert trace.spans[0].start_s == 5.0


WORK = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=8)
OPTIONS = st.builds(
    EngineOptions, block_size=st.sampled_from([4, 16]), num_blocks=st.sampled_from([8, 40]), max_running=st.integers(1, 5),
    max_step_tokens=st.integers(5, 30), continuous=st.booleans(), chunked_prefill=st.booleans(), preemption=st.booleans(),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@settings(deadline=None, max_examples=25)
@given(OPTIONS, WORK)
def test_real_and_simulated_engine_take_the_same_steps(folder: Path, options: EngineOptions, work: list) -> None:
    """The same object schedules both: who is in which step, with how many tokens."""
    llm = LLM(folder, device="cpu", options=options)
    params = [SamplingParams(max_tokens=new, ignore_eos=True) for _, new in work]
    try:
        llm.generate([[7] * prompt for prompt, _ in work], params)
    except ValueError:
        with pytest.raises(ValueError, match="KV cache has room"):
            simulate([Arrival(0.0, *each) for each in work], llm.config, find_device("H100"), "float32", options)
        return
    planned = simulate([Arrival(0.0, *each) for each in work], llm.config, DEVICES["T4"], "float32", options)
    assert [(s.tokens, s.request_ids) for s in planned.spans] == [(s.tokens, s.request_ids) for s in llm.trace.spans]
    events = [[event for event, _ in life.moments] for life in llm.trace.lives]
    assert [[event for event, _ in life.moments] for life in planned.lives] == events


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="the weights take 141.1 GB, and of the 16 GB of T4 90% are used"):
        simulate([Arrival(0.0, 1, 1)], SHAPES["Llama-3.1-70B"], find_device("T4"), "float16")
    few = replace(EngineOptions(), num_blocks=1)
    with pytest.raises(ValueError, match="room for 16"):
        simulate([Arrival(0.0, 99, 1)], SMALL, find_device("T4"), "float16", few)


def test_no_torch() -> None:
    text = "import sys, minillm.sim.engine; print([m for m in ('torch', 'matplotlib', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout.strip() == "[]"


@settings(deadline=None, max_examples=25)
@given(OPTIONS, WORK, st.integers(1, 4), st.sampled_from(sorted(ROUTERS)))
def test_replicas_serve_what_was_routed_to_them_as_if_alone(
    options: EngineOptions, work: list, replicas: int, router: str
) -> None:
    """Each one's steps are those of a device that gets the same requests and no others."""
    arrivals = [Arrival(0.003 * number, *each) for number, each in enumerate(work)]
    options, device = replace(options, num_blocks=60), find_device("T4")
    together = simulate(arrivals, SMALL, device, "float32", options, replicas=replicas, router=router)
    assert sum(len(life.token_s) for life in together.lives) == sum(new for _, new in work)
    for replica in range(replicas):
        mine = [number for number, life in enumerate(together.lives) if life.rank == replica]
        alone = simulate([arrivals[number] for number in mine], SMALL, device, "float32", options)
        assert [alone.lives[place].moments for place in range(len(mine))] == [
            together.lives[number].moments for number in mine
        ]


def test_one_prompt_at_a_time_waits_as_in_a_queue_with_one_server() -> None:
    """M/D/1: Poisson arrivals, equal service times s; the mean wait is ρ s / 2 (1 - ρ) (Pollaczek and Khinchine)."""
    random, device = Random(1), find_device("T4")
    options = EngineOptions(max_running=1, max_step_tokens=64)
    service_s = simulate([Arrival(0.0, 64, 1)], SMALL, device, "float32", options).lives[0].e2e_s
    for load in (0.3, 0.7):
        time_s, arrivals = 0.0, []
        for _ in range(8000):
            time_s += random.expovariate(load / service_s)
            arrivals.append(Arrival(time_s, 64, 1))
        lives = simulate(arrivals, SMALL, device, "float32", options).lives
        mean_s = sum(life.queue_s for life in lives) / len(lives)
        assert mean_s == pytest.approx(load * service_s / 2 / (1 - load), rel=0.15)
