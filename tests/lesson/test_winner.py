"""The winner map: the fastest layout at every point is that of the plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minillm.hardware.devices import Link, find_device
from minillm.model.shapes import SHAPES
from minillm.parallel.hybrid import factorisations
from minillm.parallel.layout import Layout
from minillm.parallel.plan import Load, plan_step, step_time
from minillm.viz.style import png
from minillm.viz.winner import WinnerMap, _innermost, colour_of, draw_winners


def test_the_colour_is_of_who_is_fastest_by_the_plan() -> None:
    config, device, load = SHAPES["Llama-3.1-8B"], find_device("A100 80GB"), Load(1, 1, 500)
    plans = {layout: plan_step(layout, device, config, "float16", load) for layout in factorisations(8)}

    def seconds(layout: Layout, memory: Any, link: Any) -> Any:
        return np.add(plans[layout].total_s(memory / device.bytes_per_s, Link("", link, 2e-6, "")), 0 * link)

    machines = {"fast": (device.bytes_per_s, 3e11, Layout(tp=8)), "slow": (device.bytes_per_s, 2e7, None)}
    drawn = WinnerMap("decode", list(plans), seconds, machines)
    figure = draw_winners([drawn, drawn], (1e10, 5e12), (1e7, 5e11), "finding", "caption")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["decode", "decode"]
    for axis in figure.axes:
        assert {"fast: tp=8", "slow: does not fit"} <= {text.get_text() for text in axis.texts}
    whole = png(figure)
    alone = draw_winners([drawn], (1e10, 5e12), (1e7, 5e11), "finding", "caption").axes[0]
    regions = [each for each in alone.collections if each.get_facecolor().size]
    for link in (3e11, 2e7):
        times = {
            layout: step_time(layout, device, Link("", link, 2e-6, ""), config, "float16", load).total_s
            for layout in plans
        }
        fastest = min(times, key=times.__getitem__)
        at = device.bytes_per_s / 1e9, link / 1e9
        there = [each for each in regions if any(path.contains_point(at) for path in each.get_paths())]
        assert [tuple(each.get_facecolor()[0][:3]) for each in there] == [pytest.approx(colour_of(fastest))]
    assert whole.startswith(b"\x89PNG")


def test_names_stand_inside_their_regions() -> None:
    mask = np.zeros((40, 60), bool)
    mask[10:30, 5:50] = True
    row, column = _innermost(mask) or (0, 0)
    assert 17 <= row <= 22 and 13 <= column <= 42
    thin = np.zeros((40, 60), bool)
    thin[20, :] = True
    assert _innermost(thin) is None


def test_every_layout_has_a_colour_of_its_own() -> None:
    layouts = factorisations(8)
    assert len({colour_of(layout) for layout in layouts}) == len(layouts)
