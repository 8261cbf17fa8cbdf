"""Cuts: as good as the best of all."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIG

from minillm.hardware.devices import find_device
from minillm.model.config_json import parse_config
from minillm.model.cost import pass_cost
from minillm.parallel.balance import balance, predict_costs
from minillm.policy.batch import Batch, Chunk


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 8), st.integers(0, 20), st.integers(0, 20))
def test_no_other_cut_is_better(layers: list[int], stages: int, first: int, last: int) -> None:
    if stages > len(layers):
        with pytest.raises(ValueError, match=f"cannot be cut into {stages} stages"):
            balance(layers, stages)
        return

    def heaviest(sizes: tuple[int, ...]) -> float:
        ends = [sum(sizes[: n + 1]) for n in range(stages)]
        weights = [sum(layers[end - size : end]) for size, end in zip(sizes, ends)]
        weights[0] += first
        weights[-1] += last
        return max(weights)

    cuts = [(0, *inner, len(layers)) for inner in combinations(range(1, len(layers)), stages - 1)]
    every = [tuple(b - a for a, b in zip(cut, cut[1:])) for cut in cuts]
    found = balance(layers, stages, first, last)
    assert found in every
    assert heaviest(found) == min(map(heaviest, every))


def test_the_head_counts() -> None:
    assert balance([1.0] * 30, 4) == (7, 7, 8, 8)
    assert balance([1.0] * 30, 4, last=8.0) == (9, 9, 10, 2)


def test_predicted_parts_add_up_to_the_pass() -> None:
    """Where everything is bound by memory, layers and head take the bytes of the whole pass."""
    device, config = find_device("H100"), parse_config(CONFIG)
    costs = predict_costs(config, device, "float32", sequences=3, tokens=1, context=40)
    chunks = tuple(Chunk(n, 40, (1,), (n,)) for n in range(3))
    whole = pass_cost(config, Batch(chunks), 4).total
    assert config.layers * costs.layer_s + costs.head_s == pytest.approx(whole.memory_bytes / device.bytes_per_s)
    with pytest.raises(ValueError, match="T4 has no rate for bfloat16"):
        predict_costs(config, find_device("T4"), "bfloat16", 1, 1)
