"""The global manager: what it plans, and the ledger of debts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.policy.loans import Heartbeat, Placement
from minillm.policy.planning import GManager, Ledger, Pace


def beat(
    instance: int, running: int, waiting: int, free: int, wanted: int = 0, longest: int = 8, lendable: int | None = None
) -> Heartbeat:
    placements = tuple(Placement(10 * instance + n, instance, longest - n, True) for n in range(running))
    lends = free if lendable is None else lendable
    return Heartbeat(instance, running, waiting, free, 40, lends, 0, wanted, running * longest * 16, placements)


def test_blocks_of_the_longest_request_go_where_most_is_free() -> None:
    manager = GManager([0, 1, 2], 16)
    for each in (beat(0, 2, 3, 0, wanted=4, longest=20), beat(1, 1, 0, 10), beat(2, 1, 0, 30)):
        manager.heartbeat(each)
    moves = manager.plan()
    assert [(move.debtor, move.request_id, move.creditor) for move in moves][:1] == [(0, 0, 2)]
    assert moves[0].blocks == 12 and moves[0].gain > 0  # room for all three that wait
    assert sum(move.blocks for move in moves) < 20


def test_nothing_moves_when_it_is_worth_nothing() -> None:
    slow = Pace(weights_s=0.0, request_s=1.0, cached_s=0.0)  # one more request costs as much as it gives
    manager = GManager([0, 1], 16, slow)
    manager.heartbeat(beat(0, 8, 3, 0, wanted=4, longest=20))
    manager.heartbeat(beat(1, 8, 0, 30))
    assert manager.plan() == []
    idle = GManager([0, 1], 16)
    idle.heartbeat(beat(0, 8, 0, 0))
    idle.heartbeat(beat(1, 0, 0, 40))
    assert idle.plan() == []  # nobody waits


def test_who_waits_or_is_full_or_lends_nothing_is_no_creditor() -> None:
    for other in (beat(1, 1, 2, 20, wanted=30), beat(1, 1, 0, 2), beat(1, 1, 0, 30, lendable=0)):
        manager = GManager([0, 1], 16)
        manager.heartbeat(beat(0, 2, 3, 0, wanted=4, longest=20))
        manager.heartbeat(other)
        assert [move for move in manager.plan() if move.debtor == 0] == []


def test_strangers_are_refused() -> None:
    manager = GManager([0, 1], 16)
    with pytest.raises(ValueError, match="heartbeat of instance 7, which nobody knows: there are 0, 1"):
        manager.heartbeat(beat(7, 1, 0, 3))
    manager.leave(1)
    with pytest.raises(ValueError, match="nobody knows"):
        manager.heartbeat(beat(1, 1, 0, 3))
    manager.join(1)
    manager.heartbeat(beat(1, 1, 0, 3))
    assert manager.view() == {1: 3}


def test_a_ring_of_debts_is_cancelled() -> None:
    ledger = Ledger()
    for debtor, creditor, blocks in ((0, 1, 5), (1, 2, 3), (2, 0, 4), (2, 3, 9)):
        ledger.borrow(debtor, creditor, blocks)
    circle = ledger.circle()
    assert sorted(circle) == [0, 1, 2]
    assert ledger.cancel(circle) == 3
    assert ledger.debts == {(0, 1): 2, (2, 0): 1, (2, 3): 9} and ledger.circle() == []
    with pytest.raises(ValueError, match="returns 3 blocks to 1, but owes only 2"):
        ledger.borrow(0, 1, -3)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 9)), max_size=15))
def test_cancelling_rings_leaves_none_and_changes_no_balance(debts) -> None:
    ledger = Ledger()
    for debtor, creditor, blocks in debts:
        if debtor != creditor:
            ledger.borrow(debtor, creditor, blocks)
    before = [ledger.owed_to(each) - ledger.owed_by(each) for each in range(6)]
    while circle := ledger.circle():
        assert ledger.cancel(circle) > 0
    assert [ledger.owed_to(each) - ledger.owed_by(each) for each in range(6)] == before


def test_the_placement_says_whose_requests_each_block_is_of() -> None:
    manager = GManager([0, 1, 2], 16)
    assert manager.placement() == {0: {}, 1: {}, 2: {}}
    here, there = Placement(1, 0, 3, True), Placement(1, 2, 4, False)
    manager.heartbeat(replace(beat(0, 1, 0, 5), placements=(here, there, Placement(2, 2, 1, False))))
    manager.heartbeat(replace(beat(2, 1, 0, 5), placements=(Placement(9, 2, 2, True),)))
    assert manager.placement() == {0: {0: 3}, 1: {}, 2: {0: 5, 2: 2}}
    manager.leave(2)
    assert manager.placement() == {0: {0: 3}, 1: {}}
