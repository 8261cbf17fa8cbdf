"""The mixture of experts: grouped products against a loop over tokens, both orders of softmax, and a router that is broken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_checkpoint

from minillm import LLM
from minillm.model.config import MoEConfig
from minillm.model.linear import pack
from minillm.model.mlp import MLP
from minillm.model.moe import NOBODY, Experts, Router, Routing

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 20), st.integers(1, 6), st.booleans(), st.data())
def test_grouped_experts_equal_a_loop_over_tokens(rows: int, count: int, stacked: bool, data: st.DataObject) -> None:
    """Some experts are not there, and some pairs are nobody's: they count for nothing."""
    top_k = data.draw(st.integers(1, count))
    here = sorted(data.draw(st.sets(st.integers(0, count - 1))))
    generator = torch.Generator().manual_seed(rows * 100 + count)
    experts = Experts(count, {str(each): MLP(8, 12) for each in here})
    if stacked:
        experts.arrange()
        assert bool(experts.stack) == bool(here)
    x, weights = torch.randn(rows, 8, generator=generator), torch.rand(rows, top_k, generator=generator)
    chosen = torch.rand(rows, count, generator=generator).argsort(-1)[:, :top_k]
    chosen = chosen.masked_fill(torch.rand(rows, top_k, generator=generator) < 0.2, NOBODY)
    with torch.no_grad():
        got = experts(x, Routing(chosen, weights))
        for row in range(rows):
            pairs = zip(chosen[row].tolist(), weights[row])
            expected = sum((w * experts[str(e)](x[row : row + 1])[0] for e, w in pairs if e in here), torch.zeros(8))
            torch.testing.assert_close(got[row], expected, atol=1e-5, rtol=1e-5)


def test_small_experts_are_views_of_a_stack_and_large_ones_are_packed() -> None:
    small, large = (Experts(3, {str(each): MLP(64, wide) for each in range(3)}) for wide in (64, 2048))
    x, routing = torch.randn(9, 64), Routing(torch.randint(0, 3, (9, 1)), torch.ones(9, 1))
    for experts, stacked in ((small, True), (large, False)):
        with torch.inference_mode():
            before = experts(x, routing)
            held = sum(parameter.nbytes for parameter in experts.parameters())
            pack(experts)
            torch.testing.assert_close(experts(x, routing), before, atol=1e-5, rtol=1e-5)
        assert bool(experts.stack) == stacked
        assert all(mlp.down_proj.weight.is_mkldnn != stacked for mlp in experts.values())
        assert sum(parameter.nbytes for parameter in experts.parameters()) == held
    assert small["1"].down_proj.weight.data_ptr() == small.stack[1][1].data_ptr()


def test_the_two_orders_of_softmax_are_one_when_weights_are_normalised() -> None:
    x = torch.randn(30, 8)
    last = Router(8, MoEConfig(6, 2, 4, (0,), softmax_last=True), 0)
    torch.nn.init.normal_(last.weight)
    first, raw = (Router(8, MoEConfig(6, 2, 4, (0,), normalised=normalised), 0) for normalised in (True, False))
    first.weight = raw.weight = last.weight
    torch.testing.assert_close(first(x).weights, last(x).weights)
    assert torch.equal(first(x).experts, last(x).experts)
    assert (raw(x).weights.sum(-1) < 1).all()


def test_a_router_that_gives_nan_is_refused_by_name(tmp_path: Path) -> None:
    llm = LLM(make_checkpoint(tmp_path, **MIXTRAL), device="cpu")
    llm.model.layers[1].mlp.gate.weight.data[2] = float("nan")
    with pytest.raises(ValueError, match=r"layer 1: the router's scores of row 0 are NaN"):
        llm.generate(["hello"])
