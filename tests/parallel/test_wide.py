"""Experts over very many devices: the formulas against counting, and what the picture says of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.hardware.devices import find_device, find_link
from minillm.model.shapes import MIXTURES, Mixture
from minillm.parallel.wide import experts_time, held_experts, rows_sent
from minillm.viz.style import png
from minillm.viz.wide import draw_wide

DEEPSEEK = MIXTURES["DeepSeek-V3"]
H100, WIRE = find_device("H100"), find_link("400 Gbit/s")


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_rows_are_those_of_all_possible_choices(ranks: int, held: int, top_k: int) -> None:
    """Every set of experts counted, from the view of every rank."""
    experts = ranks * held
    if top_k > experts:
        return
    mixture = Mixture(8, experts, top_k, 8, 1)
    homes = [[expert // held for expert in chosen] for chosen in combinations(range(experts), top_k)]
    views = [(mine, home) for mine in range(ranks) for home in homes]
    once = sum(len(set(home) - {mine}) for mine, home in views) / len(views)
    each = sum(sum(rank != mine for rank in home) for mine, home in views) / len(views)
    assert rows_sent(mixture, ranks, once=True) == pytest.approx(once)
    assert rows_sent(mixture, ranks, once=False) == pytest.approx(each)


def test_figures_of_deepseek() -> None:
    """Its experts a device at EP32 and EP144; at most tokens · k · h bytes out and twice as many back; 16 H100s hold them."""
    assert [held_experts(DEEPSEEK, ranks) for ranks in (8, 32, 144, 256)] == [32, 8, 2, 1]
    assert DEEPSEEK.experts * DEEPSEEK.layers * DEEPSEEK.expert_numbers == pytest.approx(654e9, rel=0.01)
    each = experts_time(DEEPSEEK, H100, WIRE, 144, 128, once=False)
    assert (each.dispatch_s - WIRE.latency_s) * WIRE.bytes_per_s == pytest.approx(128 * 8 * 7168 * 143 / 144)
    assert (each.combine_s - WIRE.latency_s) == pytest.approx(2 * (each.dispatch_s - WIRE.latency_s))
    assert [experts_time(DEEPSEEK, H100, WIRE, ranks, 1).fits for ranks in (8, 16, 32)] == [False, True, True]
    half = experts_time(DEEPSEEK, find_device("A100 80GB"), WIRE, 16, 64)
    assert not half.fits  # sixteen bits
    assert half.dispatch_s == half.combine_s


def test_the_fullest_rank_is_the_clock() -> None:
    even, full = (experts_time(DEEPSEEK, H100, WIRE, 32, 4096, imbalance) for imbalance in (1.0, 2.0))
    assert full.computes_s == pytest.approx(2 * even.computes_s)
    assert full.dispatch_s - WIRE.latency_s == pytest.approx(2 * (even.dispatch_s - WIRE.latency_s))


def test_one_device_sends_nothing_and_few_tokens_read_few_experts() -> None:
    small = replace(DEEPSEEK, experts=16)
    alone = experts_time(small, H100, WIRE, 1, 1)
    assert alone.dispatch_s == alone.combine_s == 0
    assert alone.reads_s == pytest.approx(8 * DEEPSEEK.expert_numbers / H100.bytes_per_s)
    with pytest.raises(ValueError, match="257 devices for 256 experts: give 1 to 256"):
        experts_time(DEEPSEEK, H100, WIRE, 257, 1)


def test_decoding_wants_to_be_wide_and_prompts_do_not() -> None:
    def finding(tokens: int, *widths: int) -> str:
        figure = draw_wide([experts_time(DEEPSEEK, H100, WIRE, ranks, tokens) for ranks in widths], "planned")
        assert png(figure)[:4] == b"\x89PNG"
        return figure.get_suptitle()

    assert finding(16, 8, 16, 144).startswith("144 devices: ")
    assert finding(4096, 8, 16, 144).startswith("16 devices, the fewest that hold it, are fastest; messages take ")
    assert finding(100, 64, 144).startswith("Wider gains little: ")
    assert finding(16, 4, 8) == "The experts fit on none of these"
