"""Plans against what they must be by hand, and against each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.hardware.devices import Link, find_device, find_link
from minillm.model.shapes import SHAPES
from minillm.parallel.balance import predict_costs
from minillm.parallel.hybrid import factorisations
from minillm.parallel.layout import Layout
from minillm.parallel.plan import Hosts, Load, fullest_bytes, plan_step, step_time

LLAMA, H100, NVLINK = SHAPES["Llama-3.1-8B"], find_device("H100"), find_link("NVLink 4")
FREE = Link("no delay", 1e30, 0.0, "")


@given(st.integers(1, 8), st.integers(1, 64), st.sampled_from([1, 256]))
def test_replicas_take_what_one_takes_of_its_share(dp: int, sequences: int, tokens: int) -> None:
    alone = step_time(Layout(), H100, NVLINK, LLAMA, "bfloat16", Load(-(-sequences // dp), tokens, 100))
    assert step_time(Layout(dp=dp), H100, NVLINK, LLAMA, "bfloat16", Load(sequences, tokens, 100)) == alone


def test_one_request_gets_nothing_from_stages_and_pays_for_hops() -> None:
    one = step_time(Layout(), H100, NVLINK, LLAMA, "bfloat16", Load(1, 1, 1000))
    four = step_time(Layout(pp=4), H100, NVLINK, LLAMA, "bfloat16", Load(1, 1, 1000))
    assert four.computed_s == pytest.approx(one.computed_s)
    assert four.sent_s == pytest.approx(4 * NVLINK.time_s(2 * 4096))  # three hidden states, and the way back


def test_many_prompts_fill_a_pipeline() -> None:
    """All stages for the first prompt, and the slowest stage, the one with the LM head, for each behind it."""
    costs = predict_costs(LLAMA, H100, "bfloat16", 1, 512)
    layers = 32 * costs.layer_s
    one = step_time(Layout(), H100, FREE, LLAMA, "bfloat16", Load(16, 512, 0)).total_s
    four = step_time(Layout(pp=4), H100, FREE, LLAMA, "bfloat16", Load(16, 512, 0)).total_s
    assert one == pytest.approx(16 * (layers + costs.embedding_s + costs.head_s), rel=0.2)  # one by one, or together
    assert four == pytest.approx(layers + costs.embedding_s + costs.head_s + 15 * (layers / 4 + costs.head_s))


@pytest.mark.parametrize("load", [Load(1, 1, 1000), Load(64, 1, 1000), Load(8, 512, 0)])
def test_a_free_link_makes_no_layout_slower_than_one_device(load: Load) -> None:
    one = step_time(Layout(), H100, FREE, LLAMA, "bfloat16", load).total_s
    for layout in factorisations(8):
        assert step_time(layout, H100, FREE, LLAMA, "bfloat16", load).total_s <= 1.001 * one, layout


def test_memory_of_the_fullest_rank() -> None:
    weights = 2 * LLAMA.parameters
    cached = 64 * 1001 * 2 * 32 * 8 * 128 * 2
    load = Load(64, 1, 1000)
    assert fullest_bytes(Layout(), LLAMA, "bfloat16", load) == pytest.approx(weights + cached)
    assert fullest_bytes(Layout(dp=4), LLAMA, "bfloat16", load) == pytest.approx(weights + cached / 4)
    assert fullest_bytes(Layout(tp=4), LLAMA, "bfloat16", load) == pytest.approx((weights + cached) / 4, rel=0.01)
    assert not step_time(Layout(), find_device("T4"), NVLINK, LLAMA, "float16", load).fits


@pytest.mark.parametrize("load", [Load(1, 1, 1000), Load(64, 1, 1000), Load(8, 512, 0)])
def test_a_grid_holds_what_each_of_its_points_takes(load: Load) -> None:
    speeds, rates = np.array([[0.1, 1.0, 3.0]]), np.array([[1e8], [1e10], [4e11]])
    for layout in factorisations(8):
        plan = plan_step(layout, H100, LLAMA, "bfloat16", load)
        grid = plan.total_s(speeds, Link("", rates, 1e-5, ""))  # type: ignore[arg-type]
        for row, rate in enumerate(rates[:, 0]):
            for column, speed in enumerate(speeds[0]):
                slower = replace(plan, computed_s=tuple(own / speed for own in plan.computed_s))
                one = slower.time(Link("", rate, 1e-5, "")).total_s
                assert np.broadcast_to(grid, (3, 3))[row, column] == pytest.approx(one)


def test_what_leaves_a_host_goes_by_the_link_between() -> None:
    """Sums of tp=4 within hosts of four, unless slices are numbered farthest apart; hidden states by the other link."""
    slow = find_link("25 Gbit/s")
    hosts, load, layout = Hosts(H100, 4, NVLINK, slow), Load(1, 512, 0), Layout(pp=2, tp=4)
    for order, sums, hop in ((("dp", "pp", "tp"), NVLINK, slow), (("tp", "pp", "dp"), slow, NVLINK)):
        assert (hosts.sums(layout, order), hosts.hops(layout, order)) == (sums, [hop, hop])
        expected = step_time(layout, H100, sums, LLAMA, "bfloat16", load, [hop, hop])
        assert hosts.step_time(layout, LLAMA, "bfloat16", load, order) == expected
    assert hosts.sums(Layout(tp=8)) is slow and hosts.sums(Layout(dp=8)) is NVLINK


def test_each_stage_boundary_has_a_link_of_its_own() -> None:
    """Of eight stages on two hosts of four, only the fourth hands on to another host, and the last one back to the first."""
    slow = find_link("25 Gbit/s")
    hosts, layout = Hosts(H100, 4, NVLINK, slow), Layout(pp=8)
    assert hosts.hops(layout) == [*[NVLINK] * 3, slow, *[NVLINK] * 3, slow]
    message = 2048 * LLAMA.hidden_size * 2
    prefill = hosts.step_time(layout, LLAMA, "bfloat16", Load(1, 2048, 0))
    assert prefill.sent_s == pytest.approx(6 * NVLINK.time_s(message) + slow.time_s(message))
    decode = hosts.step_time(layout, LLAMA, "bfloat16", Load(1, 1, 2048))
    assert decode.sent_s == pytest.approx(6 * NVLINK.time_s(8192) + 2 * slow.time_s(8192))
