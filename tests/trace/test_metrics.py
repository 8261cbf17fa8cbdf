"""Percentiles and shares with their errors, and the figures of a run."""

from __future__ import annotations

import json
import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.trace.life import Event, RequestLife
from minillm.trace.metrics import SLO, Report, percentile, proportion


def life(number: int, arrived: float, started: float, *tokens: float, end: Event = Event.FINISHED) -> RequestLife:
    moments = [(Event.ARRIVED, arrived), (Event.STARTED, started), *((Event.TOKEN, at) for at in tokens)]
    return RequestLife(number, prompt_tokens=4, moments=[*moments, (end, tokens[-1])])


LIVES = [life(0, 0.0, 0.0, 1.0, 2.0, 3.0), life(1, 1.0, 2.0, 5.0, 5.5), life(2, 2.0, 4.0, 10.0)]


def test_a_report() -> None:
    report = Report.of([*LIVES, life(3, 0.0, 1.0, 2.0, end=Event.CANCELLED)], SLO(4.0, 0.5))
    assert (len(report.lives), report.output_tokens, report.duration_s) == (3, 6, 10.0)
    assert report.tokens_per_s == pytest.approx(0.6)
    assert report.latency("ttft", 50).value == 4.0
    assert report.latency("ttft", 99).value == 8.0
    assert report.latency("tpot", 99).value == 1.0  # a single token has no TPOT
    assert report.latency("itl", 50).value == 1.0
    assert report.attainment.value == pytest.approx(1 / 3)  # the second: 4 s, 0.5 s
    assert report.goodput_per_s == pytest.approx(0.1)
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["ttft_s"]["p50"]["value"] == 4.0
    assert "met by 33 (6–79) %" in report.as_text()


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(1, 99))
def test_a_percentile_is_a_value_that_so_many_reach(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    assert found.value in values
    assert sum(value <= found.value for value in values) >= len(values) * percent / 100 - 1e-9
    assert (found.low is None or found.low <= found.value) and (found.high is None or found.value <= found.high)


@pytest.mark.parametrize(("percent", "count"), [(50, 40), (90, 100), (99, 400)])
def test_intervals_hold_the_truth_nineteen_times_of_twenty(percent: float, count: int) -> None:
    """Exponential values, whose percentiles are known."""
    random, truth, held = Random(0), -math.log(1 - percent / 100), 0
    for _ in range(1000):
        found = percentile([random.expovariate(1) for _ in range(count)], percent)
        held += (found.low is None or found.low <= truth) and (found.high is None or truth <= found.high)
    assert held >= 940


def test_few_values_do_not_bound_a_tail() -> None:
    assert percentile([1.0, 2.0, 3.0], 99).high is None
    assert percentile([1.0, 2.0, 3.0], 99).text(1e3) == "3000 (2000–?)"


def test_a_share_with_wilsons_interval() -> None:
    """Known values: 8 of 10."""
    share = proportion(8, 10)
    assert (share.value, round(share.low, 3), round(share.high, 3)) == (0.8, 0.490, 0.943)
    assert proportion(0, 5).low == 0.0


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (lambda: percentile([], 50), "no values"),
        (lambda: percentile([1.0], 100), "between 0 and 100"),
        (lambda: SLO(0, 1), "ttft_s=0: give seconds above 0"),
        (lambda: Report.of([]), "no request has finished"),
        (lambda: Report.of(LIVES).attainment, "there is no SLO"),
        (lambda: Report.of(LIVES).latency("speed", 50), "no latency"),
    ],
)
def test_what_cannot_be(job, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        job()
