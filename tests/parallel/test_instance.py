"""An instance and those who use it: slow readers, several users, calls given up at a bad moment."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import EXAMPLES, gone
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint

from minillm import LLM, EngineOptions, Ranks, SamplingParams
from minillm.trace.trace import Category, Span, Trace

LONG = SamplingParams(max_tokens=40, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=4000, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("two"), max_position_embeddings=8192)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Iterator[LLM]:
    """Two stages with little patience."""
    with Ranks(2, device="cpu", timeout_s=1) as ranks, LLM(folder, layout="pp=2", device="cpu", ranks=ranks) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    with LLM(folder, device="cpu") as one:
        return one.generate([[1, 2, 3]], LONG)[0].token_ids


def test_two_models_on_the_same_ranks(folder: Path, tmp_path: Path, expected: list[int]) -> None:
    """Each answers with its own weights, in any order, and lets go of them alone."""
    other = make_checkpoint(tmp_path / "other", hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    with LLM(other, device="cpu") as one:
        theirs = one.generate([[1, 2, 3]], LONG)[0].token_ids
    with Ranks(2, device="cpu") as ranks:
        a, b = (LLM(each, layout="pp=2", device="cpu", ranks=ranks) for each in (folder, other))
        for _ in range(2):
            assert a.generate([[1, 2, 3]], LONG)[0].token_ids == expected
            assert b.generate([[1, 2, 3]], LONG)[0].token_ids == theirs
        b.close()
        assert a.generate([[1, 2, 3]], LONG)[0].token_ids == expected
        a.close()
        assert ranks.run(_held) == [0, 0]


def _held() -> int:
    from minillm import context

    return len(context().held)


def test_a_reader_who_pauses(pipe: LLM, expected: list[int]) -> None:
    """Longer than the ranks' patience, with a long answer under way; then more comes than a pipe holds."""
    pids = pipe.instance.ranks.pids
    stream = pipe.stream([[1, 2, 3]], ENDLESS)
    got = [next(stream).token_id]
    time.sleep(2.5)
    outputs = pipe.generate([[7] * 3000] * 12 + [[1, 2, 3]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert outputs[-1].token_ids == expected[:3]
    got += [next(stream).token_id for _ in range(39)]
    stream.close()
    assert got == expected
    assert pipe.instance.ranks.pids == pids


def test_a_request_given_up_before_it_began(pipe: LLM, expected: list[int]) -> None:
    requests = pipe.prepare([[9, 9]], ENDLESS)
    pipe.submit(requests)
    pipe.cancel(requests)
    began = time.monotonic()
    assert pipe.generate([[1, 2, 3]], LONG)[0].token_ids == expected
    assert time.monotonic() - began < 20  # nobody computes what nobody wants
    assert pipe.engine.load.used_blocks == 0


def test_requests_of_twins_stay_apart(pipe: LLM, expected: list[int]) -> None:
    """One waits under its own engine while a twin's is served."""
    waiting = pipe.prepare([[1, 2, 3]], LONG)
    pipe.submit(waiting)
    twin = pipe.with_options(EngineOptions(block_size=4))
    assert twin.generate([[1, 2, 3]], LONG)[0].token_ids == expected
    while waiting[0].finish_reason is None:
        pipe.step()
    assert waiting[0].token_ids == expected
    twin.close()


def test_forgotten_twins_leave_the_ranks(pipe: LLM) -> None:
    for _ in range(3):
        pipe.with_options(EngineOptions(block_size=4)).generate([[1]], SamplingParams(max_tokens=2))
    pipe.generate([[1]], SamplingParams(max_tokens=2))
    pipe.with_options(EngineOptions(block_size=4)).generate([[1]], SamplingParams(max_tokens=2))
    assert pipe.instance.ranks.run(_seats)[0] <= 2


def _seats() -> int:
    from minillm import context

    return max(len(member.seats) for member in context().held.values())


def test_a_stage_dies_as_the_last_stream_closes(pipe: LLM, expected: list[int]) -> None:
    stream = pipe.stream([[1, 2]], ENDLESS)
    next(stream)
    pids = pipe.instance.ranks.pids
    os.kill(pids[1], signal.SIGKILL)
    stream.close()
    assert pipe.generate([[1, 2, 3]], LONG)[0].token_ids == expected
    assert gone(pids)


def test_a_rank_that_dies_idle_costs_nothing(pipe: LLM, expected: list[int]) -> None:
    pipe.generate([[1]], SamplingParams(max_tokens=2))
    os.kill(pipe.instance.ranks.pids[0], signal.SIGKILL)
    time.sleep(0.2)
    assert pipe.generate([[1, 2, 3]], LONG)[0].token_ids == expected


def test_the_stop_button_at_any_time(pipe: LLM, expected: list[int]) -> None:
    """A real signal, at twenty moments or more; every next call is right, and no rank is lost."""
    pids = pipe.instance.ranks.pids
    for number in range(max(20, EXAMPLES // 5)):
        timer = threading.Timer(0.003 * (number % 20), lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            timer.start()
            pipe.generate([[4, 5]] * 3, ENDLESS)
        except KeyboardInterrupt:
            pass
        assert pipe.generate([[1, 2, 3]], LONG)[0].token_ids == expected
    assert pipe.instance.ranks.pids == pids


def test_a_long_prompt_is_no_fault(tmp_path: Path) -> None:
    """Computed in one step that takes longer than the ranks' patience."""
    shape = {"hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8}
    folder = make_checkpoint(tmp_path / "slow", **shape, intermediate_size=512, max_position_embeddings=8192)
    whole = EngineOptions(chunked_prefill=False)
    with Ranks(2, device="cpu", timeout_s=1) as ranks:
        llm = LLM(folder, layout="pp=2", device="cpu", ranks=ranks, options=whole)
        output = llm.generate([[3] * 7000], SamplingParams(max_tokens=2, ignore_eos=True))[0]
        assert len(output.token_ids) == 2
        computing = [span.duration_s for span in llm.trace.spans if span.name == "prefill"]
        assert max(computing) > 1.2, "the prompt was too short for this test"
        assert llm.score([3] * 3000).shape == (3000, 257)
        assert llm.trace.spans[0].name == "score"


def test_steps_count_on_in_one_trace(pipe: LLM) -> None:
    pipe.new_trace()
    for _ in range(3):
        requests = pipe.prepare([[1, 2]], SamplingParams(max_tokens=3, ignore_eos=True))
        pipe.submit(requests)
        while requests[0].finish_reason is None:
            pipe.step()
    steps = [span.step for span in pipe.trace.spans if span.name in ("prefill", "decode") and span.rank == 0]
    assert steps == list(range(1, 10))


def test_who_listens_to_spans_may_fail(pipe: LLM, expected: list[int]) -> None:
    pids = pipe.instance.ranks.pids

    def fail(span: Span) -> None:
        raise ZeroDivisionError

    pipe.on_span = fail
    with pytest.raises(ZeroDivisionError):
        pipe.generate([[1, 2, 3]], LONG)
    pipe.on_span = None
    assert pipe.generate([[1, 2, 3]], LONG)[0].token_ids == expected
    assert pipe.instance.ranks.pids == pids


def test_a_checkpoint_that_does_not_fit_its_config(tmp_path: Path) -> None:
    """In one line, as on one device, and no rank stays."""
    folder = make_checkpoint(tmp_path / "extra")
    tensors = load_file(folder / "model.safetensors")
    for change in (
        {**tensors, "model.extra.weight": tensors["model.norm.weight"].clone()},
        {k: v for k, v in tensors.items() if "norm" not in k},
    ):
        save_file(change, folder / "model.safetensors")
        texts = []
        for layout in ("", "pp=2"):
            with pytest.raises(ValueError) as error:
                LLM(folder, layout=layout, device="cpu")
            texts.append(str(error.value))
        assert "\n" not in texts[1]


def test_a_window_of_a_trace_keeps_the_weights_of_every_rank(pipe: LLM) -> None:
    pipe.generate([[1, 2, 3]], LONG)
    trace = Trace(list(pipe.trace.spans), list(pipe.trace.memory))
    trace.trim(5, 5)
    assert len(trace.spans) == 5 and len(trace.memory) < 20
    assert all(trace.peak_bytes(rank)[Category.WEIGHTS] > 0 for rank in range(2))
