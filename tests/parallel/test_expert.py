"""Expert parallelism: the law on every kind of model and layout, bytes sent and held to the byte, and what goes wrong."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import EXAMPLES
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from law import OPTIONS, WORK, Made, check_fault, check_law, check_weights
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint

from minillm import LLM, EngineOptions, Layout, RankError, Ranks, SamplingParams
from minillm.hardware.devices import find_device, find_link
from minillm.model.config_json import read_config
from minillm.model.tiny_moe import tiny_moe_folder
from minillm.model.upcycle import upcycled_folder
from minillm.parallel.expert import Turns
from minillm.parallel.shards import Shard
from minillm.policy.experts import Placement, even
from minillm.policy.router import Router
from minillm.ranks.membership import context
from minillm.trace.replay import is_compute, replay
from minillm.trace.trace import Category, Kind

SHOW = [p for p in Phase if p is not Phase.shrink]  # every example takes real processes
SHAPE = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
FAMILIES = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
    "mixtral, 9 experts, tied": {
        "model_type": "mixtral", "num_local_experts": 9, "num_experts_per_tok": 3, "tie_word_embeddings": True
    },
    "qwen3_moe, some dense": {
        "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
        "mlp_only_layers": [1],
    },
    "qwen2_moe, a shared expert": {
        "model_type": "qwen2_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 24,
    },
}  # fmt: skip
EVERY = [f"dp={size},ep={size}" for size in range(2, 9)] + ["tp=2,ep=2", "tp=3,ep=3", "tp=4,ep=4", "dp=2,tp=2,ep=4"]
OTHERS = ["dp=2,pp=2,ep=2", "pp=3,tp=2,ep=2", "dp=2,pp=2,tp=2,ep=4", "tp=2", "dp=2", "pp=2,tp=2"]
LAYOUTS = ["dp=2,ep=2", "dp=3,ep=3", "tp=2,ep=2", "dp=2,tp=2,ep=4", "dp=2,pp=2,ep=2"]
EXPERT_OPTIONS = st.builds(
    lambda options, micro, every, more: replace(options, micro_batches=micro, rebalance_steps=every, redundant_experts=more),
    OPTIONS, st.sampled_from([1, 2]), st.sampled_from([None, 1, 3]), st.integers(0, 4),
)  # fmt: skip
LONG = SamplingParams(max_tokens=60, ignore_eos=True)
SOME = SamplingParams(max_tokens=6, ignore_eos=True)
PROMPTS = [[7 * number + place for place in range(1 + 3 * number)] for number in range(7)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folders = {
        family: make_checkpoint(tmp_path_factory.mktemp("model") / "model", **SHAPE, **changes)
        for family, changes in FAMILIES.items()
    }
    made = Made(folders | {"tiny-moe": tiny_moe_folder()})
    yield made
    made.close()


def tokens(llm: LLM) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(PROMPTS, SOME)]


@pytest.mark.parametrize("layout", EVERY + OTHERS)
def test_every_layout_gives_the_tokens_of_one_device(made: Made, layout: str) -> None:
    """On all families; 8 and 9 experts on 1 to 8 ranks, evenly and not."""
    for family in made.folders:
        if Layout.parse(layout).instances > 1:
            with LLM(made.folders[family], layout=layout, device="cpu") as several:
                assert tokens(several) == tokens(made.one(family)), family
        else:
            assert tokens(made.on(family, layout)) == tokens(made.one(family)), family


@settings(deadline=None, max_examples=max(25, EXAMPLES // 2), phases=SHOW)
@given(st.sampled_from(list(FAMILIES)), st.sampled_from(LAYOUTS), EXPERT_OPTIONS, WORK)
def test_tokens_are_those_of_one_device(
    made: Made, family: str, layout: str, options: EngineOptions, work: list
) -> None:
    """As requests come and go, with idle replicas, half batches, and experts that move every step."""
    check_law(made.one(family), made.on(family, layout), options, work)


def test_logits_are_those_of_one_device(made: Made) -> None:
    text = list(range(3, 40))
    for family in FAMILIES:
        for layout in ("dp=2,ep=2", "tp=2,ep=2", "dp=2,pp=2,ep=2", "tp=2"):
            got, expected = made.on(family, layout).score(text), made.one(family).score(text)
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["dp=2,ep=2", "dp=3,ep=3", "dp=2,tp=2,ep=4", "pp=3,tp=2,ep=2", "tp=2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_what_the_layout_predicts(made: Made, family: str, layout: str) -> None:
    """To the byte: read from the checkpoint, and held."""
    predicted = check_weights(made.on(family, layout), made.folders[family])
    assert max(predicted) < 4 * read_config(made.folders[family]).parameters


def test_bytes_are_those_of_the_choices(made: Made) -> None:
    """A token is sent once to each other rank that has some of its experts, and one sum comes back from there."""
    one, folder = made.one("mixtral"), made.folders["mixtral"]
    prompt, row, first = [3, 1, 4, 1, 5, 9, 2, 6], 32 * 4, SamplingParams(max_tokens=1, ignore_eos=True)
    counters = [layer.mlp.chosen for layer in one.model.layers]
    seen: list[torch.Tensor] = []
    for layer in one.model.layers:
        layer.mlp.chosen = seen.append
    one.generate([prompt], first)
    for layer, counter in zip(one.model.layers, counters):
        layer.mlp.chosen = counter
    with LLM(folder, layout="dp=2,ep=2", device="cpu") as two:  # rank 0 has experts 0 to 3, rank 1 those from 4 to 7
        trace = two.measure_messages([prompt], first)
    here = trace.lives[0].rank
    leaving = [row * int(((chosen >= 4) != (here == 1)).any(-1).sum()) for chosen in seen]
    assert 0 < sum(leaving) < 3 * row * len(prompt)
    sent = {(span.rank, span.name): [] for span in trace.spans}
    for span in trace.spans:
        sent[span.rank, span.name].append(span.message_bytes)
    assert sent[here, "dispatch"] == sent[1 - here, "combine"] == leaving
    assert sent[here, "combine"] == sent[1 - here, "dispatch"] == [0, 0, 0]  # the other one had no tokens of its own


def test_idle_replicas_go_along_and_rest_between_calls(made: Made) -> None:
    """One request on four replicas; the others have steps without tokens, and as many."""
    llm = made.on("mixtral", "dp=4,ep=4")
    expected = made.one("mixtral").generate([[5, 6, 7]], SOME)[0].token_ids
    assert llm.generate([[5, 6, 7]], SOME)[0].token_ids == expected
    steps = [[span for span in llm.trace.spans if span.rank == rank and is_compute(span)] for rank in range(4)]
    assert len({len(each) for each in steps}) == 1
    assert sorted(sum(span.tokens for span in each) for each in steps) == [0, 0, 0, 8]
    assert {span.name for each in steps for span in each if not span.tokens} == {"others' tokens"}
    assert llm.engine.at_rest and llm.engine.load.used_blocks == 0


def test_requests_are_shared_out_by_the_router(made: Made) -> None:
    llm = made.on("mixtral", "dp=3,ep=3")
    for router in ("round-robin", "least-tokens"):
        twin = llm.with_options(router=router)
        twin.generate(PROMPTS[:6], SOME)
        assert {life.rank for life in twin.trace.lives} == {0, 1, 2}
        assert twin.engine.router.tokens == [0, 0, 0] and not twin.engine.router.under_way
        twin.close()


def test_a_router_with_a_mistake_leaves_nothing_behind(made: Made) -> None:
    class Lost(Router):
        def prefer(self, present: Sequence[int], prompt: Sequence[int]) -> int:
            return 0 if len(prompt) < 10 else 7

    twin = made.on("mixtral", "dp=3,ep=3").with_options(router=Lost)
    with pytest.raises(ValueError, match="the router chose replica 7; there are 0, 1, 2"):
        twin.generate(PROMPTS, SOME)
    assert not twin.engine.has_work and not twin.engine.router.under_way and twin.engine.router.tokens == [0, 0, 0]
    assert twin.generate(PROMPTS[:1], SOME)[0].token_ids == tokens(made.one("mixtral"))[0]
    twin.close()


def test_choices_are_counted_alike_in_every_layout(made: Made) -> None:
    """As many as on one device, whoever computes them; and who had to compute how many."""
    one = made.one("qwen3_moe, some dense")
    one.expert_choices(clear=True)
    tokens(one)
    expected = one.expert_choices(clear=True).pairs
    assert expected.shape == (2, 8) and expected.sum() == 2 * 3 * sum(len(prompt) + 5 for prompt in PROMPTS)
    for layout in ("dp=2,ep=2", "tp=2,ep=2", "dp=2,pp=2,ep=2", "tp=2", "pp=2,tp=2"):
        llm = made.on("qwen3_moe, some dense", layout)
        llm.expert_choices(clear=True)
        tokens(llm)
        got = llm.expert_choices(clear=True)
        assert torch.equal(got.pairs, expected), layout
        assert got.work.sum(1).tolist() == expected.sum(1).tolist()
    with pytest.raises(ValueError, match="this llama model is dense"):
        LLM(make_checkpoint(made.folders["mixtral"].parent / "dense"), device="cpu").expert_choices()


def test_experts_move_while_they_serve_and_no_token_changes(made: Made) -> None:
    """Copies of the hottest, on other ranks than before, held to the byte; what moved is in the trace."""
    one, llm = made.one("mixtral"), made.on("mixtral", "dp=4,ep=4")
    moving = llm.with_options(EngineOptions(rebalance_steps=4, redundant_experts=4))
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    expected = [output.token_ids for output in one.generate(PROMPTS, params)]
    assert [output.token_ids for output in moving.generate(PROMPTS, params)] == expected
    moved = [span for span in moving.trace.spans if span.name == "rebalance"]
    assert len(moved) >= 4 * 4 and any(span.message_bytes for span in moved)
    placements = llm.instance.ranks.run(placed, llm.instance.name)
    assert all(each == placements[0] for each in placements)
    assert all(sum(map(len, layer.ranks)) == 12 for layer in placements[0])
    config = read_config(made.folders["mixtral"])
    predicted = [Shard(config, llm.layout, rank, placements[0]).weight_bytes(4) for rank in range(4)]
    last = [
        [each for each in moving.trace.memory if each.rank == rank and each.category is Category.WEIGHTS][-1]
        for rank in range(4)
    ]
    assert [sample.bytes for sample in last] == predicted
    assert tokens(llm) == tokens(one)  # the other engine finds them where they are now
    moving.close()


def placed(name: str) -> tuple:
    from minillm import context

    return tuple(context().held[name].pipe.experts.placements)


def test_experts_are_placed_by_hand(made: Made) -> None:
    """Everything on one rank, some twice, and back; what moves is what the placement says, and tokens stay."""
    one = made.one("mixtral")
    expert = 3 * 32 * 48 * 4  # bytes
    for layout in ("dp=2,ep=2", "dp=2,pp=2,ep=2"):
        with LLM(made.folders["mixtral"], layout=layout, device="cpu") as llm:
            lopsided = Placement((tuple(range(8)), (7,)), 8)
            placed, sent = llm.place_experts([lopsided] * 3)
            assert placed == (lopsided,) * 3 and sum(sent) == 3 * 4 * expert
            assert tokens(llm) == tokens(one)
            work = llm.expert_choices().work
            assert (work[:, 0] > 5 * work[:, 1]).all()
            placed, sent = llm.place_experts(redundant=2)
            assert all(sum(map(len, each.ranks)) == 10 for each in placed) and tokens(llm) == tokens(one)
            assert llm.place_experts([even(8, 2)] * 3)[0] == (even(8, 2),) * 3


@pytest.mark.parametrize(
    ("layout", "placements", "redundant", "text"),
    [
        ("dp=2,ep=2", [even(8, 2)], 0, "there are 1 placements, but 3 layers have experts: give one for each"),
        ("dp=2,ep=2", [even(8, 4)] * 3, 0, "is no placement of 8 experts on 2 ranks"),
        ("dp=2,ep=2", [even(9, 2)] * 3, 0, "is no placement of 8 experts on 2 ranks"),
        ("dp=2,ep=2", [], -1, "redundant=-1: give a whole number from 0"),
        ("tp=2", [], 0, "layout 'tp=2' shares out no experts"),
    ],
)
def test_placements_that_cannot_be(
    made: Made, layout: str, placements: list[Placement], redundant: int, text: str
) -> None:
    with pytest.raises(ValueError) as error:
        made.on("mixtral", layout).place_experts(placements, redundant)
    assert text in str(error.value)


def test_half_a_batch_is_under_way_while_the_other_is_computed(made: Made) -> None:
    """The same tokens; in the stored trace a half's all-to-all begins before work that ends after it has begun."""
    one, two = made.one("mixtral"), made.on("mixtral", "dp=2,ep=2")
    prompts = [[number % 250 for number in range(300)], [7] * 70, [9] * 200]
    halves = two.with_options(EngineOptions(micro_batches=2))
    expected = [output.token_ids for output in one.generate(prompts, SOME)]
    assert [output.token_ids for output in halves.generate(prompts, SOME)] == expected
    trace = halves.measure_messages(prompts, SOME)
    for rank in (0, 1):
        mine = [span for span in trace.spans if span.rank == rank]
        work = [span for span in mine if is_compute(span)]
        wires = [span for span in mine if span.lane == "wire"]
        assert {span.name for span in wires} == {"dispatch", "combine"}
        assert any(each.start_s < wire.end_s and wire.start_s < each.end_s for wire in wires for each in work)
        whole = [span for span in halves.trace.spans if span.rank == rank and is_compute(span)]
        assert sum(span.flops for span in work) == sum(span.flops for span in whole)
    free, slow = replay(trace).end_s, replay(trace, find_link("1 Gbit/s")).end_s
    assert free < slow
    halves.close()


def test_a_trace_for_replay_is_cut_at_the_messages(made: Made) -> None:
    for layout in ("dp=2,ep=2", "dp=2,tp=2,ep=4"):
        llm = made.on("qwen2_moe, a shared expert", layout)
        llm.generate(PROMPTS, SOME)
        recorded = llm.record_for_replay(PROMPTS, SOME)
        for rank in range(llm.layout.world_size):
            mine = [span for span in recorded.spans if span.rank == rank]
            whole = [span for span in llm.trace.spans if span.rank == rank and is_compute(span)]
            pieces = [span for span in mine if is_compute(span)]
            sent = [
                span
                for span in mine
                if span.kind is Kind.COMMUNICATION and span.group.startswith(("ep", "tp")) and "host" not in span.group
            ]
            assert {"dispatch", "combine", "all_gather"} <= {span.name for span in sent}
            assert sum(span.flops for span in pieces) == sum(span.flops for span in whole) > 0
            assert sum(span.message_bytes for span in sent) == sum(span.message_bytes for span in whole)
        times = [replay(recorded, find_link(name)).end_s for name in ("NVLink 4", "1 Gbit/s")]
        assert replay(recorded).end_s < times[0] < times[1]
        assert replay(recorded, find_link("NVLink 4"), find_device("A100 80GB"), "float32").end_s < times[0]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_replicas_that_share_experts_fall_and_rise_together(made: Made, how: signal.Signals) -> None:
    check_fault(made.one("mixtral"), made.folders["mixtral"], "dp=3,ep=3", how)


def forget(name: str) -> None:
    """On rank 1, from now on: answers are not handed back."""
    if context().rank == 1:
        group = context().held[name].pipe.experts
        exchange = group.all_to_all

        def without_combine(what: str, x: torch.Tensor, send_rows: list[int], recv_rows: list[int]) -> Turns:
            if what == "combine":
                return x.new_zeros(sum(recv_rows), x.shape[1])
            return (yield from exchange(what, x, send_rows, recv_rows))

        group.all_to_all = without_combine


def test_a_forgotten_combine_is_named(made: Made) -> None:
    """The other waits in the combine; the one that went on meets them in its next collective."""
    one, folder = made.one("mixtral"), made.folders["mixtral"]
    with Ranks(2, device="cpu", timeout_s=2) as ranks, LLM(folder, "dp=2,ep=2", "cpu", ranks=ranks) as llm:
        expected = llm.generate([[5, 6], [7]], SOME)
        ranks.run(forget, llm.instance.name)
        with pytest.raises(RankError) as error:
            llm.generate([[5, 6], [7]], SOME)
        said = str(error.value)
        assert "all_to_all" in said and "all_gather" in said and "rank 1" in said, said
        again = llm.generate([[5, 6], [7]], SOME)  # on new processes, as the model is
        assert [o.token_ids for o in again] == [o.token_ids for o in expected]
        assert again[0].token_ids == one.generate([[5, 6]], SOME)[0].token_ids


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ("dp=9,ep=9", "ep=9 ranks are more than the 8 experts of a layer; the nearest that fits is 'dp=8,ep=8'"),
        (
            "dp=3,tp=3,ep=9",
            "ep=9 ranks are more than the 8 experts of a layer; the nearest that fits is 'dp=2,tp=3,ep=6'",
        ),
        (
            "ep=4",
            "ep=4 must be 1 or dp·tp = 1; experts lie over the dp·tp ranks of a stage: type dp=4,ep=4 or tp=4,ep=4",
        ),
        ("tp=5", "tp=5 does not fit 4 query heads"),
    ],
)
def test_layouts_that_cannot_be(made: Made, layout: str, text: str) -> None:
    with pytest.raises(ValueError) as error:
        LLM(made.folders["mixtral"], layout=layout, device="cpu")
    assert text in str(error.value)


def test_a_dense_model_has_no_experts_to_share(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ep=2 needs a mixture of experts; this llama model is dense"):
        LLM(make_checkpoint(tmp_path), layout="dp=2,ep=2", device="cpu")


def test_a_router_that_gives_nan_is_named_with_its_rank(made: Made, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "broken", **SHAPE, **FAMILIES["mixtral"])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.block_sparse_moe.gate.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with LLM(folder, layout="dp=2,ep=2", device="cpu") as llm, pytest.raises(RankError) as error:
        llm.generate([[1, 2, 3]])
    assert "layer 2: the router's scores of row 0 are NaN" in str(error.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"micro_batches": 3}, "micro_batches=3: give 1 or 2"),
        ({"redundant_experts": -1}, "redundant_experts=-1: give a whole number from 0"),
        ({"rebalance_steps": 0}, "rebalance_steps=0: give a whole number from 1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError) as error:
        EngineOptions(**options)
    assert text in str(error.value)


def test_the_upcycled_model_says_what_the_dense_one_says(made: Made) -> None:
    """Any routing gives the dense model's text: on one device, and shared out over two ranks."""
    prompts, params = ["The capital of France is", "Water boils at"], SamplingParams(max_tokens=12)
    with LLM(device="cpu", dtype="float32") as dense:
        expected = [output.token_ids for output in dense.generate(prompts, params)]
    folder = upcycled_folder(3)
    assert read_config(folder).moe.experts == 3
    for layout in ("", "dp=2,ep=2"):
        with LLM(folder, layout=layout, device="cpu") as llm:
            assert [output.token_ids for output in llm.generate(prompts, params)] == expected, layout
