"""Who sends which tokens to whom, worked out without ranks: nothing twice, nothing lost, copies in turns, and experts that move."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.model.moe import NOBODY, Routing, Tally
from minillm.parallel.exchange import destinations, plan_exchange
from minillm.parallel.rebalance import moves
from minillm.policy.experts import Placement, even, place


@st.composite
def placements(draw: st.DrawFn, experts: int, ranks: int) -> Placement:
    """Any placement: even, by load, or anyhow with some copies."""
    held = [[] for _ in range(ranks)]
    for expert in range(experts):
        for rank in draw(st.lists(st.integers(0, ranks - 1), min_size=1, max_size=3)):
            held[rank].append(expert)
    return draw(
        st.sampled_from([
            even(experts, ranks),
            place([expert * 7 % 11 for expert in range(experts)], ranks, -(-experts // ranks) * ranks + ranks),
            Placement(tuple(tuple(sorted(rank)) for rank in held), experts),
        ])
    )  # fmt: skip


@st.composite
def choices(draw: st.DrawFn) -> tuple[Routing, Placement, list[int]]:
    """What the tokens of some ranks chose, padded to the most."""
    ranks, experts = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    top_k = draw(st.integers(1, min(3, experts)))
    rows = draw(st.lists(st.integers(0, 7), min_size=ranks, max_size=ranks).filter(any))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    chosen = torch.rand(ranks, max(rows), experts, generator=generator).argsort(-1)[..., :top_k]
    past = torch.arange(max(rows)) >= torch.tensor(rows)[:, None]
    weights = torch.rand(chosen.shape, generator=generator)
    return Routing(chosen.masked_fill(past[..., None], NOBODY), weights), draw(placements(experts, ranks)), rows


@settings(max_examples=3 * EXAMPLES, deadline=None)
@given(choices())
def test_every_pair_is_computed_once_and_no_token_is_sent_twice_to_a_rank(
    case: tuple[Routing, Placement, list[int]],
) -> None:
    everyone, placement, rows = case
    goes_to = destinations(everyone.experts, placement)
    plans = [plan_exchange(everyone, goes_to, rank) for rank in range(len(rows))]
    done: Counter[tuple[int, int, int]] = Counter()  # (rank, row, expert)
    for rank, plan in enumerate(plans):
        assert [len(plan.rows), sum(plan.send_rows)] == [sum(plan.send_rows)] * 2
        assert plan.send_rows == [other.recv_rows[rank] for other in plans]
        for target, sent in enumerate(plan.rows.split(plan.send_rows)):
            assert sent.tolist() == sorted(set(sent.tolist()))
            held = placement.held(target)
            arrived = plans[target].routing
            begin = sum(plans[target].recv_rows[:rank])
            for place_, row in enumerate(sent.tolist()):
                here = [expert for expert in arrived.experts[begin + place_].tolist() if expert != NOBODY]
                assert here and set(here) <= set(held)
                done.update((rank, row, expert) for expert in here)
                weights = dict(zip(everyone.experts[rank, row].tolist(), everyone.weights[rank, row].tolist()))
                got = dict(zip(arrived.experts[begin + place_].tolist(), arrived.weights[begin + place_].tolist()))
                assert all(got[expert] == weights[expert] for expert in here)
    wanted = {
        (rank, row, expert)
        for rank, count in enumerate(rows)
        for row in range(count)
        for expert in everyone.experts[rank, row].tolist()
    }
    assert set(done) == wanted and set(done.values()) == {1}


@settings(max_examples=EXAMPLES, deadline=None)
@given(choices())
def test_copies_take_turns(case: tuple[Routing, Placement, list[int]]) -> None:
    everyone, placement, _ = case
    goes_to = destinations(everyone.experts, placement)
    for expert, copies in enumerate(placement.copies):
        taken = Counter(goes_to[everyone.experts == expert].tolist())
        each = Counter(copies)
        assert set(taken) <= set(each)
        shares = [taken[rank] / count for rank, count in each.items()]
        assert max(shares) - min(shares) <= 1


def test_what_was_chosen_is_counted() -> None:
    tally = Tally.zero(2, 4, 2)
    tally.add(1, torch.tensor([[0, 1], [0, NOBODY]]), torch.tensor([[0, 0], [0, NOBODY]]))
    tally.add(1, torch.tensor([[3, 2]]), torch.tensor([[1, 0]]))
    assert tally.pairs.tolist() == [[0] * 4, [2, 1, 1, 1]]
    assert tally.work.tolist() == [[0, 0], [4, 1]] and tally.fullest.tolist() == [0, 4]
    assert tally.imbalance == pytest.approx(4 * 2 / 5)
    both = tally + tally
    tally.clear()
    assert both.imbalance == pytest.approx(8 / 5) and tally.imbalance == 1.0


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_moves_bring_what_is_lacking_and_no_more(data: st.DataObject) -> None:
    experts, ranks = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    old, new = data.draw(placements(experts, ranks)), data.draw(placements(experts, ranks))
    ways = moves(old, new)
    for rank in range(ranks):
        coming = [expert for _, to, expert in ways if to == rank]
        assert sorted(coming) == sorted(set(new.held(rank)) - set(old.held(rank)))
    assert all(expert in old.held(source) for source, _, expert in ways)
    assert moves(new, new) == []
