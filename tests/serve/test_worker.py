"""The worker's thread: what it keeps, whom an error hits, who is turned away."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import pytest
from tiny import make_checkpoint

from minillm import LLM, EngineOptions, SamplingParams
from minillm.serve import worker as module
from minillm.serve.worker import Busy, Closing, EngineFailed, Job, Worker

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny"))
    with LLM(folder, device="cpu", options=EngineOptions(block_size=4, max_running=2)) as llm:
        yield llm


def submit(worker: Worker, prompt: list[int]) -> queue.Queue:
    """The pieces of a job, as they come."""
    came: queue.Queue = queue.Queue()
    worker.submit(Job(worker.llm.prepare([prompt], PARAMS), came.put))
    return came


def rest(came: queue.Queue) -> list:
    """All until the end, which is None or an error."""
    items = []
    while True:
        items.append(came.get(timeout=20))
        if items[-1] is None or isinstance(items[-1], Exception):
            return items


def test_a_long_running_server_keeps_a_window(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRACE_SPANS", 10)
    monkeypatch.setattr(module, "TRACE_LIVES", 5)
    worker = Worker(llm)
    for number in range(30):
        assert len(rest(submit(worker, [number, 1]))) == 7
    worker.close()
    worker.join(20)
    trace = llm.engine.recorder.trace
    assert trace is llm.trace
    assert len(trace.spans) <= 20 and len(trace.memory) <= 41 and len(trace.lives) <= 10
    assert trace.memory[0].category.value == "weights"


def test_an_error_hits_who_was_in_the_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two run, one waits: it is served all the same."""
    worker, compute, broken = Worker(llm), llm.engine.runner.compute, []

    def fails_once(batch):
        if len(batch.chunks) == 2 and not broken:
            broken.append(True)
            raise RuntimeError("no memory")
        return compute(batch)

    monkeypatch.setattr(llm.engine.runner, "compute", fails_once)
    with worker._changed:  # all three come together
        came = [submit(worker, [number, 1]) for number in range(3)]
    ends = [rest(each) for each in came]
    assert [type(end[-1]) for end in ends] == [EngineFailed, EngineFailed, type(None)]
    assert len(ends[2]) == 7
    assert llm.engine.scheduler.pool.num_used == 0
    worker.close()
    worker.join(20)


def test_who_is_turned_away(llm: LLM) -> None:
    worker = Worker(llm, max_queue=1)
    with worker._changed:
        first = submit(worker, [1])
        with pytest.raises(Busy, match="1 requests are under way and at most 1 may be"):
            submit(worker, [2])
    rest(first)
    worker.close()
    worker.join(20)
    with pytest.raises(Closing):
        submit(worker, [3])
