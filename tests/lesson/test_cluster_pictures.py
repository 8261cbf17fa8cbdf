"""Pictures of simulated clusters: placements, queues, watts, objectives, pools, forecasts."""

from __future__ import annotations

import pytest

from minillm.policy.admission import Running
from minillm.policy.handing import Role
from minillm.policy.pools import Pools
from minillm.sim.claims import recorded
from minillm.sim.designs import budgeted, trial
from minillm.sim.surveys import queues
from minillm.viz.forecast import draw_forecast, draw_gates, draw_loads, free_then
from minillm.viz.goodput import draw_attainment, draw_goodput_map, draw_phases, draw_queues
from minillm.viz.parts import draw_parts
from minillm.viz.poolmap import draw_pool_map
from minillm.viz.style import png
from minillm.viz.watts import draw_claims, draw_objectives, draw_watts


def texts(figure: object) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]  # type: ignore[attr-defined]


def test_the_best_pair_is_framed_and_named() -> None:
    figure = draw_goodput_map({(1, 1): 1.0, (2, 1): 2.5, (1, 2): 0.0}, {"both, 1 rank": 2.0}, "finding", "caption")
    assert {"1.0", "2.5", "none", "3 GPUs"} <= set(texts(figure))
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["apart, 2 and 1", "both, 1 rank"]
    assert png(figure)


def test_phases_and_queues() -> None:
    figure = draw_phases({"1": (700.0, 90.0), "2": (350.0, 75.0)}, "finding", "caption", guess=1.5)
    assert "350 ms: 2 ×" in texts(figure) and " you" in texts(figure)
    title = lambda gain, load: draw_queues(queues(gain), load, "caption")._suptitle.get_text()  # noqa: E731
    assert title(1.5, 0.5) == "Load 0.5: a pipeline takes 1.30 times as long as tensor parallel ranks"
    assert title(1.3, 1.2).startswith("Load 1.2: tensor parallel ranks take ")
    assert title(1.1, 1.2) == "Load 1.2: tensor parallel ranks cannot keep up"


def test_attainment_has_bars_within_the_axis() -> None:
    figure = draw_attainment({"one": [(1.0, 0.99, 0.05), (2.0, 0.5, 0.1)]}, {"one": 1.5}, "finding", "caption")
    assert texts(figure) == ["printed: 1.5"] and png(figure)


def test_watts_objectives_and_claims() -> None:
    assert " you" in texts(draw_watts({"A100": (1.0, 1.0), "H100": (1.2, 0.8)}, "finding", "caption", guess=1.1))
    tried = trial(budgeted("H", "A", 0.5), 30)
    said = draw_objectives(tried, "caption")._suptitle.get_text()
    assert said == f"H100 read, A100 decode, 5 + 5 machines: {9 - tried.kept} of 9 missed"
    kept = recorded()["splitwise-aa"]
    assert texts(draw_claims([("AA", kept)], "finding", "caption", {"AA": 2.0})) == [
        f"{kept.mean:.2f} ± {kept.deviation:.2f}"
    ]


def test_machines_stand_in_their_pools() -> None:
    pools = Pools([Role.PREFILL, Role.DECODE, Role.DECODE], [70_000] * 3, most_pending=100)
    for number in range(2):
        pools.place(number, 90, 10)
    said = [[text.get_text() for text in axis.texts] for axis in draw_pool_map(pools, "finding", "caption").axes]
    assert said == [["machine 0", "reads 90", "decodes 0"], ["machine 2", "reads 90", "decodes 1"], ["machine 1", "reads 0", "decodes 1"]]  # fmt: skip
    idle = draw_pool_map(Pools([Role.PREFILL, Role.DECODE], [10, 10]), "", "")
    assert "nobody" in texts(idle)


def test_the_forecast_says_what_the_gates_say() -> None:
    running = [Running(300, 12), Running(150, 80)]
    assert free_then(200, running, 0) == 200 and free_then(200, running, 12) == 200 - 12 + 300
    figure = draw_forecast(120, 150, 200, running, "caption")
    assert figure._suptitle.get_text() == "Greedy and reserve-dynamic let it in"
    assert draw_forecast(30, 20, 400, running, "")._suptitle.get_text() == "All three let it in"
    assert draw_forecast(250, 900, 20, running, "")._suptitle.get_text() == "None lets it in"
    assert png(draw_forecast(30, 20, 0, [Running(3, 50)] * 4, ""))


@pytest.mark.parametrize("printed", [None, 0.5])
def test_rows_beside_a_baseline(printed: float | None) -> None:
    assert png(draw_loads({"mean TTFT": {"mixed": ([0.3, 0.4], printed)}}, "finding", "caption"))
    points = [(0.0, 0.9, 0.02), (1.0, 0.95, 0.01)]
    assert png(
        draw_gates({"reserve-static": points}, {"reserve-static": 0.9}, [(0.9, "reserve-static")], "finding", "caption")
    )
    figure = draw_parts({"one": (1.0, 3.0, 2), "other": (0.5, 2.0, 0)}, "finding", "caption")
    assert texts(figure) == ["3 s, first token after 1 s, 2 put back", "2 s, first token after 0.5 s"]
