"""Traces: what is recorded is exact, files come back equal, and broken ones are refused in one line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minillm import LLM, EngineOptions, SamplingParams
from minillm.kv.paged import PagedCache
from minillm.model.cost import pass_cost
from minillm.model.linear import Linear
from minillm.policy.batch import Batch, Chunk
from minillm.trace.allocations import peak_of
from minillm.trace.life import Event, RequestLife
from minillm.trace.recorder import Recorder
from minillm.trace.store import chrome_trace, load_trace, save_chrome_trace, save_trace
from minillm.trace.trace import Category, Clock, Kind, MemorySample, Span, Trace

times = st.floats(0, 1e6, allow_nan=False)
SPANS = st.builds(
    Span, st.integers(0, 7), st.sampled_from(Kind), st.text(max_size=8), times, times, st.integers(0, 99), st.sampled_from(["compute", "link"]),
    st.none() | times, st.integers(0, 99), st.tuples(st.integers(0, 9)), st.integers(0, 2**60),
)  # fmt: skip
SAMPLES = st.builds(MemorySample, st.integers(0, 7), st.sampled_from(Category), times, st.integers(0, 2**50))
LIVES = st.builds(
    RequestLife,
    st.integers(0, 99),
    st.integers(0, 7),
    st.integers(0, 99),
    st.lists(st.tuples(st.sampled_from(Event), times), max_size=4),
    st.integers(0, 99),
)
TRACES = st.builds(
    Trace, st.lists(SPANS, max_size=8), st.lists(SAMPLES, max_size=4), st.sampled_from(Clock), st.just({"model": "m"}), st.lists(LIVES, max_size=3)
)  # fmt: skip


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """With the BLAS for every product: torch's FLOP counter does not know oneDNN's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linear, "packed", False)
        patch.setattr(Linear, "few_rows", False)
        yield LLM(make_checkpoint(tmp_path_factory.mktemp("tiny")))


@given(trace=TRACES)
def test_a_saved_trace_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    file = tmp_path_factory.getbasetemp() / "trace.json.gz"
    save_trace(trace, file)
    assert load_trace(file) == trace


@given(trace=TRACES)
def test_chrome_events_keep_the_format(trace: Trace) -> None:
    """The rules of the Trace Event Format: phases with their fields, microseconds, JSON values."""
    exported = json.loads(json.dumps(chrome_trace(trace)))
    for event in exported["traceEvents"]:
        assert event["ph"] in ("X", "M", "C")
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
    assert sum(event["ph"] == "X" for event in exported["traceEvents"]) == len(trace.spans)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "there is no trace"),
        (b"", "truncated or no trace"),
        (gzip.compress(b'{"format": "minillm trace"')[:-9], "truncated or no trace"),
        (gzip.compress(b"[]"), "is no minillm trace"),
        (gzip.compress(b'{"format": "minillm trace", "version": 99}'), "a trace of version 99; this program reads 4"),
        (gzip.compress(b'{"format": "minillm trace", "version": 4}'), "damaged trace"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes | None, text: str) -> None:
    file = tmp_path / "t"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=text) as caught:
        load_trace(file)
    assert "\n" not in str(caught.value)


def test_a_run_records_steps_tokens_and_memory(llm: LLM, tmp_path: Path) -> None:
    outputs = llm.generate([[1, 2, 3], [4]], SamplingParams(max_tokens=4, ignore_eos=True))
    spans = llm.trace.spans
    assert [span.kind for span in spans] == [Kind.PREFILL] + [Kind.DECODE] * 3
    assert [span.step for span in spans] == [1, 2, 3, 4]
    assert [span.tokens for span in spans] == [4, 2, 2, 2]
    assert [span.request_ids for span in spans] == [(0, 1)] * 4
    assert all(span.start_s <= span.end_s and 0 < span.cpu_s <= span.duration_s + 0.01 for span in spans)
    assert all(a.end_s <= b.start_s for a, b in zip(spans, spans[1:]))
    peaks = llm.trace.peak_bytes(0)
    assert peaks[Category.WEIGHTS] == sum(tensor.nbytes for tensor in llm.model.parameters())
    blocks = sum(-(-len(output.prompt_token_ids + output.token_ids[:-1]) // 16) for output in outputs)
    assert peaks[Category.KV_CACHE] == blocks * 16 * llm.config.kv_bytes_per_token
    assert [sample.bytes for sample in llm.trace.memory if sample.category is Category.KV_CACHE][-1] == 0
    save_chrome_trace(llm.trace, tmp_path / "chrome.json")
    assert json.loads((tmp_path / "chrome.json").read_text())["otherData"]["clock"] == "measured"


def test_without_timing_the_counts_stay(llm: LLM) -> None:
    llm.timing = False
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True))
    llm.timing = True
    assert [(span.tokens, span.start_s, span.cpu_s) for span in llm.trace.spans] == [(3, 0.0, None), (1, 0.0, None)]
    assert all(span.flops > 0 for span in llm.trace.spans)


def test_a_span_that_ends_in_an_error_is_recorded() -> None:
    recorder = Recorder(rank=3)
    with pytest.raises(ZeroDivisionError), recorder.span(Kind.DECODE, "decode"):
        _ = 1 // 0
    assert [(span.rank, span.name) for span in recorder.trace.spans] == [(3, "decode")]


CHUNKS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 7)), min_size=1, max_size=3)


def torch_counts(llm: LLM, batch: Batch, every_row: bool) -> int:
    """The operations that torch counts in a forward pass, with the plain products."""
    cache = PagedCache(llm.config, len(batch.chunks), 20, llm.model.device, llm.model.dtype)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # torch counts no fused CPU attention
        llm.model(batch, cache, every_row=every_row)
    return counter.get_total_flops()


@settings(deadline=None)
@given(CHUNKS, st.booleans())
def test_flops_by_formula_are_what_torch_counts(llm: LLM, chunks: list[tuple[int, int]], every_row: bool) -> None:
    """torch counts every pair of a prompt's attention, and every block that single tokens' attention touches; the formula
    counts only what a causal token sees."""
    batch = Batch(tuple(Chunk(slot, start, tuple(range(1, n + 1)), (slot,)) for slot, (start, n) in enumerate(chunks)))
    cost = pass_cost(llm.config, batch, every_row=every_row).total
    pairs = sum(n * (n - 1) // 2 for _, n in chunks)  # above the diagonal
    ends = {slot: start + 1 for slot, (start, n) in enumerate(chunks) if n == 1}
    if len(ends) > 1:  # together: each block as wide as the longest, and others' blocks between them
        span = max(ends) + 1 - min(ends)
        pairs += (span if 2 * len(ends) >= span else len(ends)) * max(ends.values()) - sum(ends.values())
    masked = 4 * llm.config.heads * llm.config.head_dim * pairs * llm.config.layers
    assert torch_counts(llm, batch, every_row) == cost.flops + masked


def test_bytes_by_formula(llm: LLM) -> None:
    """Decode reads every weight but the embedding table once, and the whole context's K and V."""
    one = pass_cost(llm.config, Batch((Chunk(0, 9, (1,), (0,)),)), 4)
    table = llm.model.embed_tokens.weight.nbytes
    norms = sum(p.nbytes for name, p in llm.model.named_parameters() if "norm" in name)
    weights = sum(p.nbytes for p in llm.model.parameters()) - table - norms
    assert weights < one.products.memory_bytes < weights * 1.1
    assert one.attention.memory_bytes - 10 * llm.config.kv_bytes_per_token == 2 * 4 * 32 * llm.config.layers
    assert torch.float32.itemsize == 4


def test_activations_are_measured_to_the_byte(llm: LLM) -> None:
    """The peak of a known program, and the peaks of an engine's steps in a trace of their own."""

    def job() -> int:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(100)
        return second.numel() + third.numel()

    assert peak_of(job, torch.device("cpu")) == (600, 6000)
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True))
    before = llm.trace
    trace = llm.measure_memory([[7] * 32], SamplingParams(max_tokens=3, ignore_eos=True))
    samples = [sample for sample in trace.memory if sample.category is Category.ACTIVATIONS]
    assert [sample.bytes for sample in samples[1::2]] == [0, 0, 0]  # from one step's end to the next one's begin
    assert all(s.start_s <= a.time_s < b.time_s <= s.end_s for s, a, b in zip(trace.spans, samples[::2], samples[1::2]))
    peaks = [sample.bytes for sample in samples[::2]]
    assert peaks[0] > 4 * 32 * llm.config.intermediate_size * 2 > peaks[1] > 0
    assert peaks[1] == peaks[2] or abs(peaks[1] - peaks[2]) < 4096
    assert llm.trace is before


def test_lives(llm: LLM, tmp_path: Path) -> None:
    narrow = LLM(llm.folder, device="cpu", options=EngineOptions(max_running=1))
    outputs = narrow.generate([[1, 2, 3], [4]], SamplingParams(max_tokens=4, ignore_eos=True))
    first, second = narrow.trace.lives
    assert [event for event, _ in first.moments] == [Event.ARRIVED, Event.STARTED, *[Event.TOKEN] * 4, Event.FINISHED]
    assert second.queue_s > first.queue_s  # it waited for the first one's end
    assert sum(first.itl_s) / 3 == pytest.approx(first.tpot_s)
    assert outputs[1].metrics.ttft_s == second.ttft_s
    assert (first.prompt_tokens, second.prompt_tokens) == (3, 1)
    save_trace(narrow.trace, tmp_path / "t")
    assert load_trace(tmp_path / "t") == narrow.trace
    with pytest.raises(ValueError, match="request 7 has not token yet"):
        RequestLife(7).first(Event.TOKEN)


def test_spans_are_told_as_they_end(llm: LLM) -> None:
    told: list[Span] = []
    llm.on_span = told.append
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True))
    llm.on_span = None
    assert told == llm.trace.spans
