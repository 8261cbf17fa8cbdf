"""Pictures: they draw, they hold what they must say, and nothing in them overlaps the title."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from minillm import RankError, Ranks
from minillm.trace.trace import Kind, Span, Trace
from minillm.viz.lanes import draw_lanes
from minillm.viz.ring import RingView
from minillm.viz.style import png
from minillm.viz.waiting import draw_waiting


def texts(figure) -> str:
    return "\n".join([t.get_text() for axis in figure.axes for t in axis.texts] + [t.get_text() for t in figure.texts])


def test_waiting_names_the_culprit_and_every_place(ranks4: Ranks) -> None:
    def job() -> None:
        if dist.get_rank() != 1:
            dist.all_reduce(torch.ones(2))

    with pytest.raises(RankError) as caught:
        ranks4.run(job)
    figure = draw_waiting(caught.value)
    assert png(figure).startswith(b"\x89PNG")
    assert "waits in all_reduce [2] float32" in texts(figure)
    assert figure.get_suptitle() == "Rank 1 never came; the others wait for it"


def test_lanes() -> None:
    spans = [Span(0, Kind.PREFILL, "prefill", 5.0, 6.0, 8), Span(0, Kind.DECODE, "decode", 6.0, 6.5, 1)]
    trace = Trace.of_ranks([Trace(spans), Trace(spans[:1])])
    assert [span.rank for span in trace.spans] == [0, 1, 0]
    figure = draw_lanes(trace, "A finding", "a caption", ["first", "second"])
    assert png(figure).startswith(b"\x89PNG")
    assert "first" in texts(figure)
    assert figure.axes[0].get_xlabel() == "time (s)"


def test_ring_view_lights_up_and_has_a_still_form() -> None:
    view = RingView(3)
    before = view.value
    view.on_event(1, "7")
    assert view.value != before
    assert ">7</text>" in view.value
    bundle = view._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert data["text/plain"] == "RingView(3)"
    assert "image/png" in data
