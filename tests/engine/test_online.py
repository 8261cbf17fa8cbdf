"""Requests that come while others run, and go before they end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from operator import attrgetter
from unittest.mock import Mock

import pytest
from tiny import make_checkpoint

from minillm import LLM, EngineOptions, SamplingParams
from minillm.load import drive
from minillm.trace.life import Event
from minillm.trace.workload import Arrival


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Eight blocks of four tokens."""
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny"))
    options = EngineOptions(block_size=4, num_blocks=8, max_running=4, max_step_tokens=16)
    with LLM(folder, device="cpu", options=options) as llm:
        yield llm


LONG = SamplingParams(max_tokens=10, ignore_eos=True)


def test_streams_run_together(llm: LLM) -> None:
    """The second stream joins the first one's steps; both give what they give alone."""
    alone = [[piece.token_id for piece in llm.stream([prompt], LONG)] for prompt in ([1, 2, 3], [4, 5])]
    first, second = llm.stream([[1, 2, 3]], LONG), llm.stream([[4, 5]], LONG)
    got = [[next(first).token_id], [next(second).token_id]]
    got[1] += [piece.token_id for piece in second]
    got[0] += [piece.token_id for piece in first]
    assert got == alone
    assert any(span.request_ids == (0, 1) and span.name == "decode" for span in llm.trace.spans)
    assert len(llm.trace.lives) == 2


def test_a_closed_stream_frees_its_blocks_at_once(llm: LLM) -> None:
    pool = llm.engine.scheduler.pool
    keep, drop = llm.stream([[1, 2, 3]], LONG), llm.stream([[4] * 9], LONG)
    kept = [next(keep).token_id]
    next(drop)
    used = pool.num_used
    drop.close()
    assert pool.num_used < used
    kept += [piece.token_id for piece in keep]
    assert kept == llm.generate([[1, 2, 3]], LONG)[0].token_ids
    assert pool.num_used == 0


def test_a_cancelled_life(llm: LLM) -> None:
    stream = llm.stream([[1, 2, 3]], LONG)
    next(stream)
    stream.close()
    assert llm.trace.lives[0].moments[-1][0] is Event.CANCELLED


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "place", ["runner.compute", "runner.start", "schedule", "postprocess", "_note_cache", "scheduler.schedule"]
)
def test_an_interrupt_loses_only_its_call(llm: LLM, place: str) -> None:
    """The stop button anywhere in a step: the other stream goes on to its own end, and the next call works."""
    expected = llm.generate([[1, 2, 3]], LONG)[0].token_ids
    other = llm.stream([[1, 2, 3]], LONG)
    got = [next(other).token_id]
    where, _, name = f"engine.{place}".rpartition(".")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attrgetter(where)(llm), name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[4, 5]], LONG)
    got += [piece.token_id for piece in other]
    assert got == expected
    assert not llm.engine.scheduler.has_work
    assert llm.engine.scheduler.pool.num_used == 0
    assert llm.generate([[1, 2, 3]], LONG)[0].token_ids == expected


def test_a_cancel_while_the_batch_is_under_way(llm: LLM) -> None:
    keep, drop = llm.prepare([[1, 2, 3]], LONG), llm.prepare([[4, 5]], LONG)
    llm.new_trace()
    llm.submit([*keep, *drop])
    work = llm.engine.schedule()
    llm.engine.runner.start(work)
    llm.cancel(drop)
    llm.engine.postprocess(work.batch, work.by_chunk(llm.engine.runner.finish()))
    while llm.engine.requests:
        llm.step()
    assert keep[0].token_ids == llm.generate([[1, 2, 3]], LONG)[0].token_ids
    assert drop[0].finish_reason == "cancelled"
    assert llm.engine.scheduler.pool.num_used == 0


def test_submitted_requests_are_in_the_trace(llm: LLM) -> None:
    fresh, seen = llm.with_options(EngineOptions()), []
    fresh.on_span = seen.append
    fresh.submit(fresh.prepare([[1, 2, 3]], LONG))
    while fresh.engine.requests:
        fresh.step()
    assert len(fresh.trace.spans) == len(seen) == 10
    assert fresh.step() == []


def test_a_load_that_is_interrupted_leaves_nothing_behind(llm: LLM) -> None:
    arrivals = [Arrival(0.0, 3, 5)] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.engine.runner, "compute", interrupt)
        with pytest.raises(KeyboardInterrupt):
            drive(llm, arrivals)
    assert llm.engine.scheduler.pool.num_used == 0
    assert len(drive(llm, arrivals).lives) == 3


def test_reused_tokens_are_of_the_prompt(llm: LLM) -> None:
    """Also when a preempted request finds its own answer in the cache."""
    reusing = llm.with_options(EngineOptions(block_size=4, num_blocks=8, max_running=4, prefix_reuse=True))
    outputs = reusing.generate([[number, 2, 3] for number in range(4)], LONG)
    assert all(output.metrics.reused_tokens == 0 for output in outputs)


def test_too_many_samples_are_refused_at_once(llm: LLM) -> None:
    with pytest.raises(ValueError, match="n=1000000000 samples, but only 4 can run together"):
        llm.generate([[1]], SamplingParams(n=10**9))


def test_long_stop_strings_are_cheap(llm: LLM) -> None:
    """A stop string longer than any text: nothing is held back, and nothing takes long."""
    stop = SamplingParams(max_tokens=10, ignore_eos=True, stop="x" * 400_000)
    assert llm.generate([[1, 2, 3]], stop)[0].text == llm.generate([[1, 2, 3]], LONG)[0].text


def test_a_closed_llm_says_so(llm: LLM) -> None:
    closed = llm.with_options(EngineOptions())
    stream = closed.stream([[1, 2, 3]], LONG)
    closed.close()
    with pytest.raises(ValueError, match="this LLM is closed"):
        next(stream)


def test_preempted_requests_end_right(llm: LLM) -> None:
    """Four requests of 13 tokens want 16 blocks of the 8."""
    prompts = [[number, 2, 3] for number in range(4)]
    alone = [llm.generate([prompt], LONG)[0].token_ids for prompt in prompts]
    assert [output.token_ids for output in llm.generate(prompts, LONG)] == alone
    moments = [event for life in llm.trace.lives for event, _ in life.moments]
    assert Event.PREEMPTED in moments
    assert moments.count(Event.STARTED) == 4 + moments.count(Event.PREEMPTED)


def test_what_can_never_fit_is_refused_and_nothing_runs(llm: LLM) -> None:
    with pytest.raises(ValueError, match="may need room for 48 tokens, but the KV cache has room for 32"):
        llm.generate([[1], [1] * 39], LONG)
    with pytest.raises(ValueError, match="only 4 can run together"):
        llm.stream([[1]], SamplingParams(n=5))
    assert not llm.engine.requests
    assert llm.generate([[1]], LONG)[0].finish_reason == "length"


def test_a_prefix_is_reused(llm: LLM) -> None:
    options = EngineOptions(block_size=4, prefix_reuse=True)
    reusing = LLM(llm.folder, device="cpu", options=options)
    shared = list(range(9))
    for tail in ([1], [2, 3]):
        output = reusing.generate([[*shared, *tail]], LONG)[0]
        assert output.token_ids == llm.generate([[*shared, *tail]], LONG)[0].token_ids
    assert output.metrics.reused_tokens == 8
    assert reusing.trace.spans[0].tokens == 3


def test_options_of_the_wrong_kind() -> None:
    with pytest.raises(ValueError, match=r"write options=EngineOptions\(max_running=…\)"):
        LLM(options={"max_running": 3})  # type: ignore[arg-type]


def test_a_load_waits_for_ranks_no_longer_than_until_the_next_request() -> None:
    """They may be in the middle of a long step, and would hear of it late."""
    at_s, waits, coming = 0.03, [], [True, True]
    busy = Mock()
    busy.prepare.return_value = ["first", "second"]
    busy.submit.side_effect = lambda requests, arrived_s: coming.pop()

    def step(wait_s: float) -> None:
        waits.append(wait_s if coming else None)
        time.sleep(wait_s)
        busy.engine.requests = bool(coming)

    busy.step, busy.config.vocab_size = step, 10
    drive(busy, [Arrival(0.0, 3, 5), Arrival(at_s, 3, 5)])
    assert not coming and waits[-1] is None and sum(wait for wait in waits if wait is not None) <= at_s
