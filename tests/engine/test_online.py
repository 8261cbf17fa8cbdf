"""Requests that come while others run, and go before they end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny import make_checkpoint

from minillm import LLM, EngineOptions, SamplingParams
from minillm.trace.life import Event


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


def test_an_interrupt_loses_only_its_call(llm: LLM) -> None:
    """The stop button in the middle of a step: the other stream goes on to its own end."""
    expected = llm.generate([[1, 2, 3]], LONG)[0].token_ids
    other = llm.stream([[1, 2, 3]], LONG)
    got = [next(other).token_id]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.engine, "sample", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[4, 5]], LONG)
    assert got + [piece.token_id for piece in other] == expected
    assert llm.engine.scheduler.pool.num_used == 0


def test_preempted_requests_end_right(llm: LLM) -> None:
    """Four requests of 13 tokens want 16 blocks of the 8."""
    prompts = [[number, 2, 3] for number in range(4)]
    alone = [llm.generate([prompt], LONG)[0].token_ids for prompt in prompts]
    assert [output.token_ids for output in llm.generate(prompts, LONG)] == alone
    moments = [event for life in llm.trace.lives for event, _ in life.moments]
    assert Event.PREEMPTED in moments
    assert moments.count(Event.STARTED) == 4 + moments.count(Event.PREEMPTED)


def test_what_can_never_fit_is_refused_and_nothing_runs(llm: LLM) -> None:
    with pytest.raises(ValueError, match="may grow to 49 tokens, but the KV cache has room for 32"):
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
