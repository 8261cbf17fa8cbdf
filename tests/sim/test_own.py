"""Clusters with step times of one's own: by a roofline, and as they were calibrated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minillm.policy.router import LeastTokens
from minillm.sim.own import apart, by_calibration, by_roofline, together
from minillm.trace.workload import Arrival, read_trace

FOUND = {"prompt_ms": [20, 1.5, 0.001], "decode_ms": [60, 0.1, 2], "cache_tokens": 3072, "token_bytes": 46080, "transfer_s": [0.002, 1e-9]}  # fmt: skip


def test_a_file_of_calibrate_is_simulated(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text(json.dumps(FOUND))
    own = by_calibration(tmp_path / "found.json")
    (task,) = together(own, 1, 1, LeastTokens).serve([Arrival(0.0, 100, 3)])
    assert task.ttft_s == pytest.approx(0.020 + 0.15 + 0.01)
    assert task.tpot_s == pytest.approx(0.062 + 1e-4 * 101.5)
    (task,) = apart(own, (1, 1), (1, 1)).serve([Arrival(0.0, 100, 3)])
    assert task.came_s - task.first_s == pytest.approx(0.002 + 100 * 46080e-9)
    with pytest.raises(ValueError, match="was measured on one kind of instance: write tp=1 for it, not tp=2"):
        own.kind(2)


def test_more_ranks_are_faster_and_hold_more() -> None:
    own = by_roofline("Llama-3.1-8B", "H100", "NVLink 4")
    one, two = own.kind(1), own.kind(2)
    assert two.gpus == 2 and two.limits.cache_tokens > 2 * one.limits.cache_tokens
    assert one.costs.prompt_s(4096, 4096**2) / 2 < two.costs.prompt_s(4096, 4096**2) < one.costs.prompt_s(4096, 4096**2)
    tasks = apart(own, (1, 1), (2, 1)).serve([Arrival(0.01 * n, 2000, 50) for n in range(20)])
    assert all(task.given == 50 for task in tasks)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("not json", "is not what python -m minillm calibrate --json prints"),
        ("{}", "is not what python -m minillm calibrate --json prints"),
        (json.dumps(FOUND | {"prompt_ms": [1, 2]}), "is not what"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=error):
        by_calibration(tmp_path / "other.json")
    with pytest.raises(ValueError, match="none.json: No such file or directory"):
        by_calibration(tmp_path / "none.json")


def test_what_is_not_in_the_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="with --costs roofline there are SmolLM2-135M, Llama-2-7B"):
        by_roofline("GPT-5", "H100", "NVLink 4")
    with pytest.raises(ValueError, match="they do not fit"):
        by_roofline("Llama-3.1-405B", "H100", "NVLink 4").kind(1)
    assert by_roofline("Llama-3.1-405B", "B200", "NVLink 4").kind(8).limits.cache_tokens > 100_000


def test_traces_with_gaps_and_out_of_order_are_served(tmp_path: Path) -> None:
    """A trace file whose lines are out of order, with an hour in which nobody comes, and two requests at the same moment."""
    lines = [
        "2023-11-16 19:20:00.5,200,5",
        "2023-11-16 18:15:46.1234567,100,3",
        "2023-11-16 18:15:46.1234567,50,2",
        "2023-11-16 18:15:45,300,4",
    ]
    (tmp_path / "trace.csv").write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    arrivals = read_trace(tmp_path / "trace.csv")
    assert [each.time_s for each in arrivals] == sorted(each.time_s for each in arrivals)
    assert arrivals[0].time_s == 0.0 and arrivals[-1].time_s == pytest.approx(3855.5)
    own = by_roofline("Llama-3.1-8B", "H100", "NVLink 4")
    for make in (lambda: together(own, 1, 1, LeastTokens), lambda: apart(own, (1, 1), (1, 1))):
        tasks = make().serve(arrivals)
        assert [task.given for task in tasks] == [4, 3, 2, 5]
        assert all(task.ttft_s < 0.1 for task in tasks), "nobody waits for those who come an hour later"
        mixed = make().serve([arrivals[n] for n in (3, 0, 2, 1)])
        assert {task.prompt: task.ttft_s for task in mixed} == {task.prompt: task.ttft_s for task in tasks}
