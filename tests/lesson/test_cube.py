"""Cubes say what they draw: ranks by number, a line for each pair of neighbours, dotted where it leaves a host."""

from __future__ import annotations

from minillm.parallel.hybrid import factorisations
from minillm.parallel.layout import Layout
from minillm.parallel.numbering import ORDER, neighbours
from minillm.viz.cube import Arrangement, draw_arrangements, draw_cube
from minillm.viz.style import png


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
