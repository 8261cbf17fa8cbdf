"""Context parallelism: the law, bytes to the byte, N times the context, faults."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from helpers import EXAMPLES
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from law import OPTIONS, WORK, Made, check_fault, check_law, check_weights
from tiny import make_checkpoint

from minillm import LLM, EngineOptions, SamplingParams
from minillm.distkv.spread import answer_bytes, key_bytes, questions_of, rows_of
from minillm.model.config_json import read_config
from minillm.policy.batch import Batch, Chunk
from minillm.trace.replay import is_compute
from minillm.trace.trace import Category, Kind

SHOW = [p for p in Phase if p is not Phase.shrink]  # every example takes real processes
SHAPE = {
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "head_dim": 8,
    "intermediate_size": 50, "max_position_embeddings": 512,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
LAYOUTS = ["cp=2", "cp=3", "cp=4", "cp=5", "cp=2,tp=2", "cp=2,tp=3", "pp=2,cp=2", "pp=2,cp=2,tp=2", "dp=2,cp=2"]
ONE = SamplingParams(max_tokens=1, ignore_eos=True)


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
@given(st.sampled_from(list(FAMILIES)), st.sampled_from(LAYOUTS), OPTIONS, st.booleans(), WORK)
def test_tokens_are_those_of_one_device(
    made: Made, family: str, layout: str, options: EngineOptions, ring: bool, work: list
) -> None:
    """With preemptions, blocks of earlier requests and blocks that samples share until they write, from rank to rank."""
    if layout.startswith("dp"):
        with LLM(made.folders[family], layout, "cpu") as several:
            check_law(made.one(family), several, EngineOptions(**{**vars(options), "ring_prefill": ring}), work)
    else:
        options = EngineOptions(**{**vars(options), "ring_prefill": ring})
        check_law(made.one(family), made.on(family, layout), options, work)


def test_logits_are_those_of_one_device(made: Made) -> None:
    text = list(range(3, 40))
    for family in FAMILIES:
        for layout in ("cp=2", "cp=5", "pp=2,cp=2,tp=2"):
            got, expected = made.on(family, layout).score(text), made.one(family).score(text)
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_every_rank_holds_all_weights_of_its_stage(made: Made) -> None:
    for layout in ("cp=2", "pp=2,cp=2,tp=2"):
        check_weights(made.on("llama", layout), made.folders["llama"])


@settings(deadline=None, max_examples=EXAMPLES)
@given(st.data(), st.integers(1, 5), st.integers(1, 4))
def test_who_asks_whom(data: st.DataObject, size: int, block_size: int) -> None:
    """Every rank works out the same, each row is computed once, and each asks just those that hold keys before it."""
    chunks = []
    for number in range(data.draw(st.integers(1, 4))):
        start, tokens = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 8))
        blocks = data.draw(st.permutations(range(40)))[: -(-(start + tokens) // block_size)]
        chunks.append(Chunk(number, start, tuple(range(tokens)), tuple(blocks)))
    batch = Batch(tuple(chunks))
    ranks = [questions_of(batch, size, rank, block_size) for rank in range(size)]
    rows = rows_of(batch, size, block_size)
    assert sorted(row.number for each in ranks for row in each.own) == list(range(len(rows)))
    for row in rows:
        table = chunks[row.chunk].block_table
        held = {table[position // block_size] % size for position in range(row.position + 1)}
        assert set(row.asks) | {row.owner} == held
    for asker in range(size):
        for asked in range(size):
            going = [ranks[asker].own[place].number for place in ranks[asker].going[asked]]
            assert going == [row.number for row in ranks[asked].coming[asker]]


def sent(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> dict[str, int]:
    """The bytes of each message's name, of all ranks together."""
    totals: dict[str, int] = {}
    for span in llm.measure_messages(prompts, params).spans:
        if span.kind is Kind.COMMUNICATION:
            totals[span.name] = totals.get(span.name, 0) + span.message_bytes
    return totals


@pytest.mark.parametrize("layout", ["cp=2", "cp=3", "cp=2,tp=3"])
def test_bytes_are_those_of_the_formula(made: Made, layout: str) -> None:
    """A query and its answer for each row and other rank with keys before it; or the keys, to every other rank."""
    llm, config = made.on("llama", layout), read_config(made.folders["llama"])
    size, tp, length = llm.layout.cp, llm.layout.tp, 50
    for ring in (False, True):
        engine = llm.with_options(EngineOptions(block_size=4, ring_prefill=ring))
        got = sent(engine, [list(range(length))], SamplingParams(max_tokens=1, ignore_eos=True))
        others = sum(min(position // 4, size - 1) for position in range(length))  # blocks are dealt in turns
        asking = others * answer_bytes(config.heads // tp, config.head_dim, 4) * tp * config.layers
        passing = length * (size - 1) * key_bytes(config.kv_heads // tp, config.head_dim, 4) * tp * config.layers
        assert got.get("queries", 0) + got.get("answers", 0) == (0 if ring else asking)
        assert got.get("keys", 0) == (passing if ring else 0)
        both = sent(engine, [list(range(length))], SamplingParams(max_tokens=6, ignore_eos=True))
        decode = 5 * (size - 1) * answer_bytes(config.heads // tp, config.head_dim, 4) * tp * config.layers
        assert both["queries"] + both["answers"] == (0 if ring else asking) + decode
        engine.close()


def test_n_ranks_have_room_for_n_times_the_context(made: Made) -> None:
    """A request that no rank alone has room for; one token more than all have is refused by name."""
    options = EngineOptions(block_size=8, num_blocks=6)
    for layout, size in (("cp=2", 2), ("cp=5", 5)):
        llm = made.on("llama", layout).with_options(options)
        prompt = [(7 * place) % 250 for place in range(48 * size - 10)]
        params = SamplingParams(max_tokens=10, ignore_eos=True)
        assert llm.generate([prompt], params)[0].token_ids == made.one("llama").generate([prompt], params)[0].token_ids
        with pytest.raises(ValueError, match="blocks"):
            llm.generate([[*prompt, 1, 2]], params)
        held = [llm.trace.peak_bytes(rank)[Category.KV_CACHE] for rank in range(size)]
        assert (
            max(held) - min(held) <= 0.2 * max(held)
            and sum(held) <= size * 6 * 8 * read_config(made.folders["llama"]).kv_numbers_per_token * 4
        )
        llm.close()


def test_pieces_of_a_trace_cost_what_the_step_does(made: Made) -> None:
    """A trace for replay is cut at the messages, and its pieces have all operations between them."""
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    for layout in ("cp=2", "cp=2,tp=2"):
        llm, prompts = made.on("llama", layout), [[1, 2, 3, 4, 5] * 8, [6] * 33]
        llm.generate(prompts, params)
        whole = {(span.rank, span.step): span.flops for span in llm.trace.spans if is_compute(span)}
        recorded = llm.record_for_replay(prompts, params)
        for (rank, step), flops in whole.items():
            pieces = [each for each in recorded.spans if (each.rank, each.step) == (rank, step) and is_compute(each)]
            assert sum(each.flops for each in pieces) == flops


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_is_named(made: Made, how: signal.Signals) -> None:
    check_fault(made.one("llama"), made.folders["llama"], "cp=3", how)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="cp=2 with ep=2 is not built"):
        LLM("tiny-moe", layout="dp=2,cp=2,ep=2")
    with pytest.raises(ValueError, match="ring_prefill=3: give True or False"):
        EngineOptions(ring_prefill=3)  # type: ignore[arg-type]
