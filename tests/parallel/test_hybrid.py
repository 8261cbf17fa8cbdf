"""Every way to arrange one to eight ranks: the mesh, what is sent along it, and the tokens of one device."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
from helpers import EXAMPLES
from hypothesis import given
from hypothesis import strategies as st
from law import is_tie
from tiny import make_checkpoint

from minillm import LLM, EngineOptions, Layout, Ranks, SamplingParams
from minillm.model.config_json import read_config
from minillm.parallel.hybrid import factorisations, fitting, lines, place_text, sent_bytes
from minillm.trace.collectives import ring_share
from minillm.trace.trace import Kind

SIZES = range(1, 9)
PROMPTS = [[7 * number + place for place in range(3 + 3 * number)] for number in range(9)]
PARAMS = [
    SamplingParams(max_tokens=6 + number, temperature=float(number % 2), seed=number, ignore_eos=True)
    for number in range(9)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers and eight heads, so that all factorisations of eight fit."""
    return make_checkpoint(
        tmp_path_factory.mktemp("eight"), num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=256,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, list[Ranks]]]:
    """Warm ranks by the size of a replica."""
    made: dict[int, list[Ranks]] = {}
    yield made
    for each in made.values():
        for pool in each:
            pool.close()


def test_factorisations() -> None:
    assert [len(factorisations(size)) for size in SIZES] == [1, 3, 3, 6, 3, 9, 3, 10]
    for size in SIZES:
        found = factorisations(size)
        assert all(prod((each.dp, each.pp, each.tp)) == size for each in found) and len(set(found)) == len(found)


RUN = SIZES if EXAMPLES > 100 else (2, 3, 4, 8)  # all of them in `make soak`
ALL = [str(layout) for size in RUN for layout in factorisations(size) if layout.world_size > 1]


@pytest.mark.parametrize("layout", ALL)
def test_tokens_online_and_offline(one: LLM, folder: Path, pools: dict[int, list[Ranks]], layout: str) -> None:
    """All at once, and as they come while others run; greedy and sampled."""
    shape = Layout.parse(layout)
    size = shape.world_size // shape.dp
    warm = pools.setdefault(size, [])
    warm += [Ranks(size, device="cpu") for _ in range(shape.dp - len(warm))]
    expected = [output.token_ids for output in one.generate(PROMPTS, PARAMS)]
    ranks = warm[: shape.dp]
    with LLM(
        folder,
        layout,
        "cpu",
        ranks=ranks,
        router="round-robin",
        options=EngineOptions(max_running=4, max_step_tokens=16),
    ) as llm:
        offline = [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]
        requests = llm.prepare(PROMPTS, PARAMS)
        for request in requests:
            llm.submit([request])
            llm.step()
        while llm.engine.requests:
            llm.step()
        online = [request.token_ids for request in requests]
        assert llm.trace.ranks == list(range(shape.world_size))
    for got in (offline, online):
        for prompt, mine, wanted, params in zip(PROMPTS, got, expected, PARAMS):
            assert mine == wanted or (params.greedy and is_tie(one, prompt, wanted, mine))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_ranks_lie_along_lines(dp: int, pp: int, tp: int) -> None:
    """Each axis cuts all ranks into lines; tp is innermost, dp outermost; a replica's ranks are consecutive."""
    layout = Layout(dp=dp, pp=pp, tp=tp)
    for axis, length, stride in (("tp", tp, 1), ("pp", pp, tp), ("dp", dp, pp * tp)):
        found = lines(layout, axis)
        assert sorted(rank for line in found for rank in line) == list(range(layout.world_size))
        assert all(len(line) == length for line in found)
        assert all(b - a == stride for line in found for a, b in zip(line, line[1:]))
    for rank in range(layout.world_size):
        here = layout.coordinates(rank)
        assert rank == (here["dp"] * pp + here["pp"]) * tp + here["tp"]


def test_places_in_words() -> None:
    layout = Layout(dp=2, pp=2, tp=2)
    assert place_text(layout, 5) == "replica 1, stage 0, slice 1"
    assert place_text(Layout(tp=2), 1) == "slice 1"
    assert place_text(Layout(), 0) == "everything"


def test_what_does_not_fit_is_left_out(folder: Path) -> None:
    config = read_config(folder)
    assert len(fitting(config, 8)) == 10
    assert [str(layout) for layout in fitting(config, 9)] == ["dp=9", "dp=3,tp=3", "dp=3,pp=3", "pp=3,tp=3"]


def test_sent_is_what_the_formula_says(folder: Path) -> None:
    """Counted in a trace: the ranks of the first stage, for a prompt of 20 tokens."""
    with LLM(folder, "pp=2,tp=2", "cpu") as llm:
        trace = llm.measure_messages([list(range(20))], SamplingParams(max_tokens=1))
        predicted = sent_bytes(llm.config, llm.layout, "float32", 20)
    spans = [span for span in trace.spans if span.rank == 0 and span.kind is Kind.COMMUNICATION]
    sums = sum(span.message_bytes for span in spans if span.name == "all_reduce")
    assert sums * ring_share("all_reduce", 2) == predicted["tp"]
    assert sum(span.message_bytes for span in spans if span.name == "hidden states") == predicted["pp"]
    assert predicted["dp"] == 0
