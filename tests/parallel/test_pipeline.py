"""The law for pipelines: whatever the stages, the company and the memory, a request's tokens are those of one device."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from helpers import EXAMPLES, gone
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from law import OPTIONS, WORK, check_fault, check_law, started
from tiny import make_checkpoint

from minillm import LLM, EngineOptions, Layout, Ranks, SamplingParams
from minillm.model.config_json import read_config
from minillm.parallel.shards import Shard
from minillm.trace.life import Event
from minillm.trace.trace import Category, Kind

SHOW = [p for p in Phase if p is not Phase.shrink]  # every example takes real processes
LAYOUTS = ["pp=2", "pp=3", "pp=1+4+1", "pp=4", "pp=5", "pp=6"]
LONG = SamplingParams(max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("six"), num_hidden_layers=6, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def pipes(folder: Path) -> Iterator[dict[str, LLM]]:
    """A pipeline of each layout, started when it is first asked for."""
    with started(folder) as llms:
        yield llms


@settings(deadline=None, max_examples=max(20, EXAMPLES // 2), phases=SHOW)
@given(st.sampled_from(LAYOUTS), OPTIONS, WORK)
def test_tokens_are_those_of_one_device(
    one: LLM, pipes: dict[str, LLM], layout: str, options: EngineOptions, work: list
) -> None:
    check_law(one, pipes[layout], options, work)


def test_thirty_stages(tmp_path: Path) -> None:
    """One layer on each of thirty ranks."""
    folder = make_checkpoint(tmp_path / "thirty", num_hidden_layers=30)
    prompts = [[number, 2, 3] for number in range(5)]
    with LLM(folder, device="cpu") as one:
        expected = [output.token_ids for output in one.generate(prompts, SamplingParams(max_tokens=5))]
    with LLM(folder, layout="pp=30", device="cpu") as pipe:
        assert [output.token_ids for output in pipe.generate(prompts, SamplingParams(max_tokens=5))] == expected
        assert pipe.trace.ranks == list(range(30))


@pytest.mark.parametrize("layout", ["pp=3", "pp=1+4+1"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_what_the_layout_predicts(tmp_path: Path, layout: str, tied: bool) -> None:
    """To the byte: read from the checkpoint, and held."""
    folder = make_checkpoint(tmp_path / "model", num_hidden_layers=6, tie_word_embeddings=tied)
    config = read_config(folder)
    with LLM(folder, layout=layout, device="cpu") as pipe:
        predicted = [Shard(config, pipe.layout, rank).weight_bytes(4) for rank in range(3)]
        assert [loaded.weight_bytes for loaded in pipe.instance.loaded] == predicted
        assert [loaded.bytes_read for loaded in pipe.instance.loaded] == predicted
        pipe.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
        assert [pipe.trace.peak_bytes(rank)[Category.WEIGHTS] for rank in range(3)] == predicted
    assert sum(predicted) == 4 * (config.parameters + tied * config.vocab_size * config.hidden_size)


def test_logits_are_those_of_one_device(one: LLM, pipes: dict[str, LLM]) -> None:
    text = list(range(3, 40))
    for layout in ("pp=2", "pp=1+4+1"):
        torch.testing.assert_close(pipes[layout].score(text), one.score(text), atol=1e-5, rtol=1e-5)


def test_several_batches_are_under_way(pipes: dict[str, LLM]) -> None:
    """Stages compute different steps at the same time; one batch in flight never does. Messages leave meanwhile."""
    prompts = [[number] * 40 for number in range(9)]
    for in_flight, expected in ((None, 3), (1, 1)):
        llm = pipes["pp=3"].with_options(EngineOptions(in_flight=in_flight))
        llm.generate(prompts, LONG)
        computing = [span for span in llm.trace.spans if span.kind in (Kind.PREFILL, Kind.DECODE)]
        steps = {span.step: [] for span in computing}
        for span in computing:
            steps[span.step].append(span)
        assert all(sorted(span.rank for span in spans) == [0, 1, 2] for spans in steps.values())
        first = {step: min(span.start_s for span in spans) for step, spans in steps.items()}
        last = {step: max(span.end_s for span in spans) for step, spans in steps.items()}
        most = max(sum(first[other] <= first[step] < last[other] for other in steps) for step in steps)
        assert most == expected
        messages = [
            span for span in llm.trace.spans if span.kind is Kind.COMMUNICATION and span.name == "hidden states"
        ]
        sizes = {step: 4 * llm.config.hidden_size * spans[0].tokens for step, spans in steps.items()}
        assert len(messages) == 2 * len(steps)
        assert all(span.message_bytes == sizes[span.step] for span in messages)
        llm.close()


def test_memory_of_each_stage(one: LLM, pipes: dict[str, LLM]) -> None:
    """Layers add up: the stages' caches are together that of one device."""
    prompts = [[1, 2, 3], [4] * 20]
    one.generate(prompts, LONG)
    whole = one.trace.peak_bytes(0)[Category.KV_CACHE]
    pipes["pp=1+4+1"].generate(prompts, LONG)
    parts = [pipes["pp=1+4+1"].trace.peak_bytes(rank)[Category.KV_CACHE] for rank in range(3)]
    assert sum(parts) == whole and parts[1] == 4 * parts[0] == 4 * parts[2]
    trace = pipes["pp=1+4+1"].measure_memory(prompts, SamplingParams(max_tokens=4))
    assert all(trace.peak_bytes(rank)[Category.ACTIVATIONS] > 0 for rank in range(3))


def test_lives_are_told(pipes: dict[str, LLM]) -> None:
    outputs = pipes["pp=2"].generate([[1, 2], [3]], LONG)
    for output in outputs:
        events = [event for event, _ in output.metrics.moments]
        assert events[:3] == [Event.ARRIVED, Event.STARTED, Event.TOKEN] and events[-1] is Event.FINISHED
        assert len(output.metrics.token_s) == 60
        times = [when for _, when in output.metrics.moments]
        assert times == sorted(times)
    assert pipes["pp=2"].trace.lives == [output.metrics for output in outputs]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stage_that_dies_fails_its_requests_and_the_next_ones_run(
    one: LLM, folder: Path, how: signal.Signals
) -> None:
    check_fault(one, folder, "pp=3", how)


def test_a_dropped_stream_leaves_the_ranks_free(pipes: dict[str, LLM]) -> None:
    llm = pipes["pp=2"]
    stream = llm.stream([[1, 2, 3]], SamplingParams(max_tokens=500, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm.engine.load.used_blocks == 0
    assert llm.instance.ranks.run(lambda: 1) == [1, 1]


def test_an_interrupt_loses_only_its_call(one: LLM, pipes: dict[str, LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop button while the ranks compute: the other stream goes on, and no rank is lost."""
    llm = pipes["pp=2"]
    pids = llm.instance.ranks.pids
    other = llm.stream([[1, 2, 3]], LONG)
    got = [next(other).token_id]
    begin, prepare = time.monotonic(), llm.engine.step

    def interrupted(wait_s: float) -> list:
        if time.monotonic() - begin > 0.02:
            raise KeyboardInterrupt
        return prepare(wait_s)

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[4, 5]], SamplingParams(max_tokens=2000, ignore_eos=True))
    monkeypatch.undo()
    got += [piece.token_id for piece in other]
    assert got == one.generate([[1, 2, 3]], LONG)[0].token_ids
    assert llm.instance.ranks.pids == pids


def test_no_rank_outlives_its_llm(folder: Path) -> None:
    pipe = LLM(folder, layout="pp=2", device="cpu")
    pids = pipe.instance.ranks.pids
    assert all(psutil.pid_exists(pid) for pid in pids)
    pipe.close()
    assert gone(pids)
    with pytest.raises(ValueError, match="this LLM is closed"):
        pipe.generate([[1]])


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ("pp=7", "pp=7 does not fit 6 layers; the nearest that fits is 'pp=6'"),
        ("pp=3+0+3", "stage 1 has 0 layers; give every stage at least one"),
        ("pp=3+4", "its stages have 7 layers, but the model has 6; the nearest that fits is 'pp=3+3'"),
        ("pp=1+1+1", "the nearest that fits is 'pp=1+1+4'"),
        ("pp=3,pp=3", "pp stands twice"),
        ("pp=2+x", "'pp=2+x' is not understood"),
    ],
)
def test_layouts_that_cannot_be(folder: Path, layout: str, text: str) -> None:
    with pytest.raises(ValueError) as error:
        LLM(folder, layout=layout, device="cpu")
    assert text in str(error.value) and "\n" not in str(error.value)


def test_ranks_that_do_not_fit(folder: Path, ranks2: Ranks) -> None:
    with pytest.raises(ValueError, match="takes 3 ranks, but these are 2"):
        LLM(folder, layout="pp=3", device="cpu", ranks=ranks2)
    with pytest.raises(ValueError, match="leave ranks= out"):
        LLM(folder, device="cpu", ranks=ranks2)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.integers(1, 3))
def test_stages_as_text(stages: list[int], tp: int) -> None:
    layout = Layout(pp=len(stages), tp=tp, stages=tuple(stages))
    assert Layout.parse(str(layout)) == layout
    assert [n for stage in range(layout.pp) for n in layout.layers(sum(stages), stage)] == list(range(sum(stages)))
    for rank in range(layout.world_size):
        assert rank in layout.along("pp", rank) and len(layout.along("pp", rank)) == layout.pp
