"""The notice board: what is written is read, the ring turns over, and torn notices are left out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minillm.ranks.board import BOARD_BYTES, SLOTS, Board, Operation, State, pack_ranks, read, unpack_ranks


def operation(name: str = "all_reduce", channel: str = "world") -> Operation:
    return Operation(name, "[4] float32", channel, "", (0, 1, 2, 5), "cell:3")


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=3 * SLOTS))
def test_counts_and_the_last_notices_survive(channels: list[str]) -> None:
    memory = bytearray(BOARD_BYTES)
    board = Board(memory)
    for channel in channels:
        number, _ = board.enter(operation(channel=channel))
        board.leave(number)
    view = read(memory)
    assert sorted(view.counts.values()) == sorted(channels.count(c) for c in set(channels))
    assert len(view.notices) == min(len(channels), SLOTS)
    assert view.current is None


def test_waiting_shows_until_it_ends() -> None:
    memory = bytearray(BOARD_BYTES)
    board = Board(memory)
    number, index = board.enter(operation(), State.ISSUED)
    assert read(memory).current is None
    waiting = board.wait(operation(), index)
    current = read(memory).current
    assert current is not None
    assert (current.name, current.members, current.source, current.index) == ("all_reduce", (0, 1, 2, 5), "cell:3", 0)
    board.leave(waiting)
    assert read(memory).current is None
    assert number == 1


def test_a_torn_notice_is_left_out() -> None:
    memory = bytearray(BOARD_BYTES)
    Board(memory).enter(operation())
    memory[-SLOTS * 512 + 504] = 9  # the closing number of the first slot
    assert read(memory).notices == {}


@given(st.sets(st.integers(0, 300)))
def test_ranks_as_text(ranks: set[int]) -> None:
    assert unpack_ranks(pack_ranks(tuple(sorted(ranks)))) == tuple(sorted(ranks))
