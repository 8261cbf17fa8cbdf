"""Where experts are placed: every expert has a rank, packs are even, copies go to the hottest, and loads come out balanced."""

from __future__ import annotations

import pytest
from helpers import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.policy.experts import Placement, balanced_packing, even, place, replicate

LOADS = st.lists(st.integers(0, 1000), min_size=1, max_size=24)


@settings(max_examples=EXAMPLES)
@given(LOADS, st.integers(1, 8))
def test_packs_are_of_one_size_and_hold_everything(weights: list[int], packs: int) -> None:
    held = balanced_packing(weights, packs)
    assert sorted(item for pack in held for item in pack) == list(range(len(weights)))
    assert max(map(len, held)) == -(-len(weights) // packs)


@settings(max_examples=EXAMPLES)
@given(LOADS, st.integers(0, 20))
def test_copies_leave_no_expert_with_more_to_do_than_it_must(loads: list[int], more: int) -> None:
    """No copy could be moved from one expert to another and make the busiest copy less busy."""
    copies = replicate(loads, len(loads) + more)
    assert sum(copies) == len(loads) + more and min(copies) >= 1
    busiest = max(load / count for load, count in zip(loads, copies))
    for load, count in zip(loads, copies):
        if count > 1:
            assert load / (count - 1) >= busiest


@settings(max_examples=EXAMPLES)
@given(LOADS, st.integers(1, 6), st.integers(0, 12), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]))
def test_a_placement_holds_every_expert_and_is_never_off_the_loads(
    loads: list[int], ranks: int, more: int, nodes: int, groups: int
) -> None:
    slots = -(-(len(loads) + more) // ranks) * ranks
    placement = place(loads, ranks, slots, nodes, groups)
    assert len(placement.ranks) == ranks
    assert all(len(held) == slots // ranks for held in placement.ranks)
    assert sum(placement.rank_loads(loads)) == pytest.approx(sum(loads))
    assert placement.imbalance(loads) >= 1 - 1e-9


def test_groups_stay_on_a_node() -> None:
    """Hierarchical: 12 experts in 4 groups on 2 nodes of 4 ranks, 16 slots (EPLB's own example has these sizes)."""
    loads = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]
    placement = place(loads, 8, 16, nodes=2, groups=4)
    for node in (placement.ranks[:4], placement.ranks[4:]):
        held = {expert for rank in node for expert in rank}
        assert held == {expert for expert in range(12) if expert // 3 in {each // 3 for each in held}}
    # by EPLB's published code: the copies on each rank
    assert sorted(placement.ranks[:4] + placement.ranks[4:]) == sorted(
        [(5, 6), (5, 7), (4, 8), (3, 4), (9, 10), (2, 10), (0, 1), (1, 11)]
    )


def test_copies_of_the_hottest_balance_what_no_packing_can() -> None:
    loads = [700, 100, 100, 100]
    assert even(4, 2).imbalance(loads) == pytest.approx(1.6)
    assert place(loads, 2, 4).imbalance(loads) == pytest.approx(1.6)
    assert place(loads, 2, 6).imbalance(loads) < 1.14


def test_even_shares() -> None:
    assert even(7, 3).ranks == ((0, 1, 2), (3, 4), (5, 6))
    assert even(4, 4).copies == ((0,), (1,), (2,), (3,))


def test_bad_placements_are_refused() -> None:
    with pytest.raises(ValueError, match="misses expert 2"):
        Placement(((0, 1), (1, 3)), 4)
    with pytest.raises(ValueError, match="names expert 4: there are experts 0 to 3"):
        Placement(((0, 1, 2), (3, 4)), 4)
    with pytest.raises(ValueError, match="3 slots do not hold 4 experts"):
        place([1, 1, 1, 1], 2, 3)
