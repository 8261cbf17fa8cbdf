"""Requests to come: drawn, read, cut to fit."""

from __future__ import annotations

from pathlib import Path
from random import Random
from statistics import mean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.trace.workload import PUBLISHED, Arrival, find_trace, fit, poisson, read_trace, resample

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens"
ROW = "2023-11-16 18:15:46.6805900,374,44"


def test_poisson_arrivals_have_the_rate_and_the_medians() -> None:
    arrivals = poisson(4000, 5.0, PUBLISHED["azure-conversation"], Random(1))
    assert arrivals[-1].time_s == pytest.approx(800, rel=0.1)
    gaps = [b.time_s - a.time_s for a, b in zip(arrivals, arrivals[1:])]
    assert sum(gap > mean(gaps) for gap in gaps) / len(gaps) == pytest.approx(0.37, abs=0.03)  # 1 / e
    assert median(arrival.prompt_tokens for arrival in arrivals) == pytest.approx(1020, rel=0.1)
    assert median(arrival.new_tokens for arrival in arrivals) == pytest.approx(129, rel=0.1)
    assert poisson(5, 2.0, PUBLISHED["azure-code"], Random(3)) == poisson(5, 2.0, PUBLISHED["azure-code"], Random(3))
    assert {arrival.time_s for arrival in poisson(5, float("inf"), PUBLISHED["azure-code"], Random(3))} == {0.0}


def test_a_trace_is_read(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(f"{HEAD}\r\n{ROW}\r\n2023-11-16 18:15:45.5,3,0", newline="")
    assert read_trace(file) == [Arrival(0.0, 3, 1), Arrival(pytest.approx(1.18059), 374, 44)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the columns must be TIMESTAMP,ContextTokens,GeneratedTokens"),
        ("a,b,c\n", "line 1: the columns"),
        (HEAD + "\n", "holds no requests"),
        (f"{HEAD}\n{ROW}\nsoon,3,4", "line 3: 'soon' is not a time"),
        (f"{HEAD}\n{ROW}\n\n{ROW},5", "line 4: 4 values where 3 are expected"),
        (f"{HEAD}\n2023-11-16 18:15:46,x,44", "line 2: ContextTokens is 'x'; give a whole number"),
        (f"{HEAD}\n2023-11-16 18:15:46,3,-1", "line 2: GeneratedTokens is '-1'"),
        (f"{HEAD}\n2023-11-16 18:15:46,3,1e3", "line 2: GeneratedTokens is '1e3'"),
    ],
)
def test_malformed_traces_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_trace(file)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        read_trace(tmp_path / "bytes.csv")


def test_the_published_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where it is at hand: its medians are those of the paper."""
    with pytest.raises(ValueError, match="choose one of azure-conversation, azure-code"):
        find_trace("azure")
    file = find_trace("azure-conversation")
    if file is None:
        pytest.skip("the Azure traces are not here; MINILLM_DATA names their folder")
    arrivals = read_trace(file)
    assert (len(arrivals), median(a.prompt_tokens for a in arrivals), median(a.new_tokens for a in arrivals)) == (
        19_366,
        1020,
        129,
    )
    monkeypatch.setenv("MINILLM_DATA", str(file.parent))
    assert find_trace("azure-conversation") == file
    with pytest.raises(ValueError, match="from 1 to the trace's 19366 requests"):
        resample(arrivals, 20_000, 4.0)
    some = resample(arrivals, 100, 4.0)
    assert len(some) == 100 and some[0].time_s == 0 and some[-1].time_s == pytest.approx(99 / 4)


@given(st.lists(st.builds(Arrival, st.floats(0, 9), st.integers(1, 9000), st.integers(1, 9000)), max_size=5),
       st.floats(0.001, 2), st.integers(2, 300))  # fmt: skip
def test_what_is_cut_to_fit_fits(arrivals: list[Arrival], factor: float, longest: int) -> None:
    for arrival in fit(arrivals, factor, longest):
        assert arrival.prompt_tokens >= 1 and arrival.new_tokens >= 1
        assert arrival.prompt_tokens + arrival.new_tokens <= longest


@pytest.mark.parametrize(("count", "rate"), [(0, 1.0), (-1, 1.0), (3, 0.0), (3, -2.0), (True, 1.0), (3, float("nan"))])
def test_rates_and_counts_that_cannot_be(count: int, rate: float) -> None:
    with pytest.raises(ValueError, match="give"):
        poisson(count, rate, PUBLISHED["azure-code"], Random(0))
