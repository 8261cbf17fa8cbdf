"""Two goals: a row for each layout, rings where it was planned, a dot where it ran."""

from __future__ import annotations

from minillm.parallel.layout import Layout
from minillm.viz.goals import draw_goals
from minillm.viz.style import png


def test_rows_rings_and_dots() -> None:
    one, two, four = Layout(), Layout(dp=2), Layout(dp=2, tp=2)
    planned = {four: (0.3, 0.6), two: (0.5, 1.0), one: (1.0, 1.0)}
    figure = draw_goals(planned, {four: (0.4, 1.1)}, (0.45, 1.2), "finding", "caption")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "one device",
        "dp=2: 2 devices",
        "dp=2,tp=2: 4 devices",
    ]
    assert [place for place, _ in left.collections[0].get_offsets().tolist()] == [1.0, 0.5, 0.3]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in right.lines if line.get_marker() == "o"] == [
        (1.1, 2)
    ]
    assert png(figure).startswith(b"\x89PNG")


def test_what_is_too_large_has_no_ring() -> None:
    one, two = Layout(), Layout(tp=2)
    left, _ = draw_goals({one: (1.0, 1.0), two: (0.5, 0.6)}, {}, (0.6, 0.9), "finding", "caption", [one]).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["one device: too large", "tp=2: 2 devices"]
    assert left.collections[0].get_offsets().tolist() == [[0.5, 1.0]]
