"""Tensor parallelism: the law, bytes sent and held to the byte, faults, and layouts that cannot be."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import EXAMPLES
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from law import OPTIONS, WORK, Made, check_fault, check_law, check_weights
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint

from minillm import LLM, EngineOptions, RankError, Ranks, SamplingParams
from minillm.hardware.devices import find_device, find_link
from minillm.model.config_json import read_config
from minillm.parallel import member
from minillm.parallel.layout import Layout
from minillm.policy.batch import Batch, Chunk
from minillm.ranks.membership import context
from minillm.trace.replay import is_compute, replay
from minillm.trace.trace import Category, Kind

SHOW = [p for p in Phase if p is not Phase.shrink]  # every example takes real processes
SHAPE = {
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "head_dim": 8,
    "intermediate_size": 50, "max_position_embeddings": 512,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True, "attention_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
}
LAYOUTS = ["tp=2", "tp=3", "tp=4", "tp=5", "tp=6", "pp=2,tp=2", "pp=2,tp=3"]
LONG = SamplingParams(max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folders = {
        family: make_checkpoint(tmp_path_factory.mktemp("model") / "model", **SHAPE, **changes)
        for family, changes in FAMILIES.items()
    }
    made = Made(folders)
    yield made
    made.close()


@settings(deadline=None, max_examples=max(25, EXAMPLES // 2), phases=SHOW)
@given(st.sampled_from(list(FAMILIES)), st.sampled_from(LAYOUTS), OPTIONS, WORK)
def test_tokens_are_those_of_one_device(
    made: Made, family: str, layout: str, options: EngineOptions, work: list
) -> None:
    check_law(made.one(family), made.on(family, layout), options, work)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_one_device(made: Made, family: str) -> None:
    """257 words over 2 to 6 ranks: shares of unequal size."""
    text = list(range(3, 40))
    for layout in ("tp=2", "tp=4", "pp=2,tp=3"):
        torch.testing.assert_close(
            made.on(family, layout).score(text), made.one(family).score(text), atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize("layout", ["tp=2", "tp=4", "tp=5", "pp=2,tp=3"])
@pytest.mark.parametrize("family", ["llama", "llama, tied"])
def test_weights_are_what_the_layout_predicts(made: Made, family: str, layout: str) -> None:
    """To the byte: read from the checkpoint, and held."""
    predicted = check_weights(made.on(family, layout), made.folders[family])
    assert max(predicted) < 0.8 * 4 * read_config(made.folders[family]).parameters


def counts(name: str) -> dict[str, tuple[int, int]]:
    """On every rank: calls and bytes of the collectives along tp."""
    found = context().held[name].pipe.tensor.comm.counts
    return {operation: (count.calls, count.bytes) for operation, count in found.items()}


def test_bytes_are_those_of_the_formula(made: Made) -> None:
    """Two sums of tokens x hidden a layer, one for the embedding, and two numbers a rank and row for greedy tokens."""
    llm = made.on("llama", "tp=3")
    before = llm.instance.ranks.run(counts, llm.instance.name)
    llm.generate([[1, 2, 3, 4, 5, 6, 7], [8] * 20], SamplingParams(max_tokens=9, ignore_eos=True))
    spans = [span for span in llm.trace.spans if span.rank == 0 and is_compute(span)]
    tokens, steps = sum(span.tokens for span in spans), len(spans)
    rows = 2 * 9
    sums, sent = steps * (2 * 3 + 1), tokens * 48 * 4 * (2 * 3 + 1)
    for was, now in zip(before, llm.instance.ranks.run(counts, llm.instance.name)):
        got = {name: tuple(a - b for a, b in zip(now[name], was.get(name, (0, 0)))) for name in now}
        assert got == {"all_reduce": (sums, sent), "all_gather": (steps, rows * 16)}
    assert sum(span.message_bytes for span in spans) == sent + rows * 16  # and the trace says so


def test_uneven_heads_are_seen_in_the_cache(made: Made) -> None:
    """Three KV heads over two ranks: two and one. Over five: one each, some of them twice."""
    for layout, heads in (("tp=2", [2, 1]), ("tp=3", [1, 1, 1]), ("tp=5", [1] * 5)):
        llm = made.on("llama", layout)
        llm.generate([[1, 2, 3]], LONG)
        held = [llm.trace.peak_bytes(rank)[Category.KV_CACHE] for rank in range(len(heads))]
        assert [size // min(held) for size in held] == [count // min(heads) for count in heads]


def test_a_trace_for_replay_is_cut_at_the_sums(made: Made) -> None:
    """Pieces and sums in turns; their operations are those of the step; a faster link ends sooner."""
    llm, prompts = made.on("llama", "tp=2"), [[1, 2, 3, 4, 5], [6] * 11]
    llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
    whole = [span for span in llm.trace.spans if span.rank == 1 and is_compute(span)]
    recorded = llm.record_for_replay(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
    mine = [
        span for span in recorded.spans if span.rank == 1 and span.lane == "compute" and span.kind is not Kind.WAITING
    ]
    for step, span in enumerate(whole):
        pieces = [each for each in mine if each.step == span.step and is_compute(each)]
        sums = [each for each in mine if each.step == span.step and each.kind is Kind.COMMUNICATION]
        assert len(sums) == 2 * 3 + 1 + 1 and len(pieces) == len(sums) + 1, step
        assert sum(each.flops for each in pieces) == span.flops
        assert sum(each.memory_bytes for each in pieces) == span.memory_bytes
        assert sum(each.tokens for each in pieces) == span.tokens
        assert sum(each.message_bytes for each in sums) == span.message_bytes
    times = {name: replay(recorded, find_link(name)).end_s for name in ("1 Gbit/s", "NVLink 4")}
    free = replay(recorded).end_s
    assert free < times["NVLink 4"] < times["1 Gbit/s"]
    assert replay(recorded, find_link("NVLink 4"), find_device("A100 80GB"), "float32").end_s < free


def test_sums_in_parts_overlap_with_the_work(made: Made) -> None:
    """The same tokens; and in the stored trace a part's sum is under way while the next part is computed."""
    llm, one = made.on("llama", "tp=2"), made.one("llama")
    prompts = [[number % 250 for number in range(400)], [7] * 70]
    chunked = llm.with_options(EngineOptions(sum_chunks=4))
    some = SamplingParams(max_tokens=3, ignore_eos=True)
    expected = [output.token_ids for output in one.generate(prompts, some)]
    assert [output.token_ids for output in chunked.generate(prompts, some)] == expected
    trace = chunked.measure_messages(prompts, some)
    for rank in (0, 1):
        mine = [span for span in trace.spans if span.rank == rank]
        work = [span for span in mine if is_compute(span)]
        sums = [span for span in mine if span.lane == "wire" and span.name == "all_reduce"]
        assert len(sums) == 2 * 3 * 4
        assert any(one.start_s < each.start_s < one.end_s for one in sums for each in work)  # begins meanwhile
        whole = [span for span in chunked.trace.spans if span.rank == rank and is_compute(span)]
        assert sum(span.flops for span in work) == sum(span.flops for span in whole)
    free, slow = replay(trace).end_s, replay(trace, find_link("1 Gbit/s")).end_s
    assert free < slow
    assert [output.token_ids for output in llm.generate(prompts, some)] == expected  # the other engine sends them whole
    chunked.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_fails_its_requests_and_the_next_ones_run(made: Made, how: signal.Signals) -> None:
    check_fault(made.one("llama"), made.folders["llama"], "tp=3", how)


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ("tp=7", "tp=7 does not fit 6 query heads; the nearest that fits is 'tp=6'"),
        ("tp=0", "tp=0; give a whole number of tensor parallel ranks from 1"),
    ],
)
def test_layouts_that_cannot_be(made: Made, layout: str, text: str) -> None:
    with pytest.raises(ValueError) as error:
        LLM(made.folders["llama"], layout=layout, device="cpu")
    assert text in str(error.value) and "\n" not in str(error.value)


def test_ranks_with_different_checkpoints(made: Made, ranks2: Ranks, tmp_path: Path) -> None:
    """The same shapes, other weights: found by a hash before anything is read, both named; and two dtypes too."""
    folder = made.folders["llama"]
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    save_file({name: values + 1.0 for name, values in tensors.items()}, other / "model.safetensors")

    def load(folders: list[Path], dtypes: list[torch.dtype]) -> None:
        rank = context().rank
        member.load("uneven", folders[rank], Layout(tp=2), dtypes[rank])

    with pytest.raises(RankError) as error:
        ranks2.run(load, [folder, other], [torch.float32] * 2)
    assert f"rank 0 has the checkpoint {folder}, rank 1 another one, {other}" in str(error.value)
    with pytest.raises(RankError, match="rank 0 computes in float32, rank 1 in bfloat16"):
        ranks2.run(load, [folder, folder], [torch.float32, torch.bfloat16])
    ranks2.run(load, [folder, Path(shutil.copytree(folder, tmp_path / "same"))], [torch.float32] * 2)


def test_greedy_among_equals_takes_the_first(made: Made) -> None:
    """As on one device, over the borders between ranks."""
    llm = made.on("llama", "tp=3")

    def places(name: str) -> list[int]:
        group = context().held[name].pipe.tensor
        everywhere = torch.tensor([[0.0, 1.0, 1.0] * 86, [0.0] * 258, [-3.0] * 256 + [5.0, 0.0]])[:, :257]
        words = group.words[group.comm.rank]
        return group.argmax(everywhere[:, words.start : words.stop]).tolist()

    assert llm.instance.ranks.run(places, llm.instance.name) == [[1, 0, 256]] * 3


def test_one_forward_by_hand(made: Made) -> None:
    """`apply_tensor_parallel` on a plain model, without engine or scheduler: the same logits."""
    folder, one = made.folders["qwen2"], made.one("qwen2")
    token_ids = [5, 6, 7, 8]

    def forward() -> torch.Tensor:
        from minillm.kv.paged import PagedCache
        from minillm.parallel.loading import load_part
        from minillm.parallel.mesh import DeviceMesh
        from minillm.parallel.wire import Wire

        part = load_part(folder, DeviceMesh(Layout(tp=2), context()), Wire(), torch.float32)
        cache = PagedCache(part.model.config, 1, 4, torch.device("cpu"), torch.float32)
        return part.tensor.whole(part.model(Batch((Chunk(0, 0, tuple(token_ids), (0,)),)), cache, every_row=True))

    logits = made.on("qwen2", "tp=2").instance.ranks.run(forward)
    for each in logits:
        torch.testing.assert_close(each, one.score(token_ids), atol=2e-5, rtol=1e-5)
