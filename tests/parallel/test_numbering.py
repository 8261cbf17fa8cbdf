"""Numbering: every order numbers all ranks once, and the axis that counts fastest stays within hosts."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.parallel.layout import Layout
from minillm.parallel.numbering import ORDER, crossing, number_of, places_of

SIZES = st.sampled_from([1, 2, 4])


@given(SIZES, SIZES, SIZES, st.permutations(ORDER))
def test_every_order_numbers_all_ranks_once(dp: int, pp: int, tp: int, order: list[str]) -> None:
    layout = Layout(dp=dp, pp=pp, tp=tp)
    assert sorted(number_of(layout, place, order) for place in places_of(layout)) == list(range(layout.world_size))
    for place in places_of(layout):
        ours = number_of(layout, place)
        assert {axis: layout.coordinates(ours)[axis] for axis in ORDER} == place


@given(SIZES, SIZES, SIZES, SIZES)
def test_the_innermost_axis_stays_within_hosts(dp: int, pp: int, tp: int, hosts: int) -> None:
    """With as many ranks on a host as tp counts, or more; and whichever is outermost leaves it first."""
    layout = Layout(dp=dp, pp=pp, tp=tp)
    per_host = max(1, layout.world_size // hosts)
    if tp <= per_host:
        assert not crossing(layout, "tp", per_host)
    for order in permutations(ORDER):
        size = getattr(layout, order[-1])
        if size <= per_host:
            assert not crossing(layout, order[-1], per_host, order)


def test_axes_without_a_place_are_refused() -> None:
    with pytest.raises(ValueError, match="cp is not built yet"):
        places_of(Layout(cp=2, tp=2))
