"""The winner map: the fastest layout at every point is that of the plan."""

from __future__ import annotations

from typing import Any

import numpy as np

from minillm.hardware.devices import Link, find_device
from minillm.model.shapes import SHAPES
from minillm.parallel.hybrid import factorisations
from minillm.parallel.layout import Layout
from minillm.parallel.plan import Load, plan_step, step_time
from minillm.viz.style import png
from minillm.viz.winner import colour_of, draw_winners


def test_the_winner_is_who_is_fastest_by_the_plan() -> None:
    config, device, load = SHAPES["Llama-3.1-8B"], find_device("A100 80GB"), Load(1, 1, 500)
    plans = {layout: plan_step(layout, device, config, "float16", load) for layout in factorisations(8)}
    told: dict[str, Layout] = {}

    def seconds(layout: Layout, memory: Any, link: Any) -> Any:
        return np.add(plans[layout].total_s(memory / device.bytes_per_s, Link("", link, 2e-6, "")), 0 * link)

    def finding(winners: dict[str, Layout]) -> str:
        told.update(winners)
        return "finding"

    marked = {"fast": (device.bytes_per_s, 300e9), "slow": (device.bytes_per_s, 1e7)}
    figure = draw_winners(list(plans), seconds, (1e10, 5e12), (1e7, 5e11), marked, finding, "caption")
    for name, (_, link) in marked.items():
        times = {
            layout: step_time(layout, device, Link("", link, 2e-6, ""), config, "float16", load).total_s
            for layout in plans
        }
        assert times[told[name]] == min(times.values())
    assert told["fast"] == Layout(tp=8) and told["slow"].tp == 1
    assert png(figure).startswith(b"\x89PNG")


def test_every_layout_has_a_colour_of_its_own() -> None:
    layouts = factorisations(8)
    assert len({colour_of(layout) for layout in layouts}) == len(layouts)
