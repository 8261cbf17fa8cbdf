"""The cube: our numbering keeps the axis that talks most within hosts, others do not; pictures say what they draw."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from minillm.parallel.hybrid import factorisations
from minillm.parallel.layout import Layout
from minillm.parallel.numbering import ORDER, crossing, neighbours, number_of, places_of
from minillm.viz.cube import Arrangement, draw_arrangements, draw_cube
from minillm.viz.style import png

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


def test_a_cube_has_a_line_for_every_pair_of_neighbours() -> None:
    layout = Layout(dp=2, pp=2, tp=2)
    assert [len(neighbours(layout, axis)) for axis in ORDER] == [4, 4, 4]
    axis = draw_cube(layout, 4, "finding", "caption").axes[0]
    assert len(axis.lines) == 8 and sorted(text.get_text() for text in axis.texts) == list("01234567")
    assert all(line.get_linestyle() == "-" for line in axis.lines)  # replicas on hosts of their own
    worst = draw_cube(layout, 4, "finding", "caption", ("tp", "pp", "dp")).axes[0]
    assert sum(line.get_linestyle() != "-" for line in worst.lines) == 4


def test_arrangements_say_what_is_said_of_them() -> None:
    each = [Arrangement(layout, note=f"note {number}") for number, layout in enumerate(factorisations(8))]
    figure = draw_arrangements(each, 4, "finding", "caption")
    for axis, (number, layout) in zip(figure.axes, enumerate(factorisations(8))):
        assert axis.get_title() == str(layout).replace(",", ", ")
        assert f"note {number}" in [text.get_text() for text in axis.texts]
        assert len(axis.lines) == sum(len(neighbours(layout, name)) for name in ("pp", "tp"))
    assert png(figure).startswith(b"\x89PNG")
