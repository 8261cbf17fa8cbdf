"""What lessons ask of the simulator: small surveys whose signs are known."""

from __future__ import annotations

from statistics import mean

import pytest

from minillm.policy.admission import Predictor
from minillm.sim.claims import find
from minillm.sim.designs import budgeted, tokens_per_power, trial
from minillm.sim.guesses import over_greedy, serve, vllm
from minillm.sim.surveys import asking, figure8, knee, knees, mean_ttft, queues, survey
from minillm.sim.tetri import Setup
from minillm.trace.metrics import SLO


def test_queues_are_those_of_the_formulas() -> None:
    assert mean_ttft(0.5, 1, 1.0) == 1.5
    assert mean_ttft(0.5, 2, 1.0) == pytest.approx(1 + 0.5 / 6)
    assert mean_ttft(0.5, 1, 1.6) == pytest.approx(1 / 1.6 + 0.5 / (3.2 * 1.1))
    assert mean_ttft(1.7, 1, 1.6) == mean_ttft(2.0, 2, 1.0) == float("inf")
    for stages, each, gain in ((2, queues(1.5)["a pipeline"], 1.0), (1, queues(1.5)["tensor parallel ranks"], 1.5)):
        for load, time in each.dots:
            assert time == pytest.approx(mean_ttft(load, stages, gain), rel=0.03)


def test_a_survey_names_who_serves_most() -> None:
    chat = survey(asking(200, 100, 800, 145), gpus=4)
    assert set(chat.pairs) == {(1, 1), (1, 2), (2, 1), (2, 2)} and chat.best == (2, 1)
    assert chat.words.startswith("Doing both wins, on 4 ranks: ")
    strict = survey(asking(4000, 25, 800, 145), gpus=8)
    assert strict.best == (2, 4) and strict.words.startswith("Apart wins, on 2 and 4 ranks: ")
    assert survey(asking(1, 1, 800, 145), gpus=4).words == "Nothing keeps these goals"
    assert survey(asking(1000, 25, 100, 20), gpus=8).words.startswith("Both keep them at 9.6 requests/s for each GPU")


def test_attainment_falls_with_the_rate() -> None:
    for points in figure8(seeds=2, rates=(0.5, 6.0)).values():
        (_, few, _), (_, many, up) = points
        assert 0 <= many < few <= 1 and up >= 0
    flat = [(1.0, 0.95, 0.01), (2.0, 0.85, 0.1), (3.0, 0.5, 0.0)]
    assert knee(flat) == pytest.approx(1.5) and knee(flat, 0.99) == 0.0 and knee(flat, 0.4) == 3.0
    assert knees(flat) == pytest.approx((1 + 0.04 / 0.19, 2 + 0.05 / 0.45))


def test_a_watt_reads_more_on_the_new_machine_and_decodes_more_on_the_old() -> None:
    machines = tokens_per_power()
    assert machines["A100"] == (1.0, 1.0)
    assert machines["H100"][0] > 1 > machines["H100"][1]
    assert machines["capped H100"][1] > 1


def test_what_lesson_16_says_of_its_controls() -> None:
    guess = Predictor(200, 0.75)
    took = lambda load, **setup: mean(  # noqa: E731
        serve(Setup(predictor=guess, **setup), load, seed).completion_s for seed in range(4)
    )
    assert [took("HPHD", decodes=count) for count in (1, 2)] == pytest.approx([29.9, 17.6], rel=0.02)
    assert took("HPHD", prefills=2) > 0.95 * 29.9, "a second one that reads hardly helps"
    mixed = [
        took("Mixed", order=order, window=window, gate="greedy")
        for order, window in (("fcfs", 16), ("sjf", 16), ("sjf", 128))
    ]
    assert mixed[1] > 0.95 * mixed[0] and [mixed[0], mixed[2]] == pytest.approx([11.7, 8.1], rel=0.02)
    static, dynamic = (
        [over_greedy(f"reserve-{gate}", Predictor(200, 0.0, buckets), 4)[0] for buckets in (2, 3, 8)]
        for gate in ("static", "dynamic")
    )
    assert static == pytest.approx([0.98, 0.95, 0.85], abs=0.01) and dynamic == pytest.approx(
        [1.0, 1.0, 0.87], abs=0.01
    )


def test_a_budget_buys_machines() -> None:
    design = budgeted("H", "A", 0.5)
    assert design.power <= 352 and (design.prompts, design.tokens) == (5, 5)
    assert budgeted("A", None, 0.0).prompts == 14
    with pytest.raises(ValueError, match="give at least 1 of each kind"):
        budgeted("H", "H", 0.5, budget=50)
    kept, rigid = (trial(budgeted("H", "H", 0.88), 10, mixed=mixed) for mixed in (True, False))
    assert kept.kept == 9 and rigid.over["TBT P90"] > 1, "the mixed pool helps a cluster with the wrong load"


@pytest.mark.parametrize(
    ("load", "prompt", "token", "share", "up_to"),
    [
        ("conversation", "A", "A", 0.6, 18), ("conversation", "A", None, 0.5, 10), ("conversation", "H", None, 0.5, 20),
        ("code", "H", "H", 0.9, 12), ("code", "H", None, 0.5, 8),
    ],
)  # fmt: skip
def test_what_lesson_15_says_of_its_small_cluster(
    load: str, prompt: str, token: str | None, share: float, up_to: int
) -> None:
    design = budgeted(prompt, token, share)
    kept = [trial(design, rate, f"azure-{load}").kept for rate in (up_to, up_to + 2)]
    assert kept[0] == 9 > kept[1]


def test_gates_gain_also_by_wrong_guesses() -> None:
    for gate in ("reserve-static", "reserve-dynamic"):
        assert over_greedy(gate, Predictor(200, 0.0), 4)[0] < 0.95
    assert over_greedy("greedy", Predictor(200, 0.75), 2) == (1.0, 0.0)
    assert serve(Setup()).ttft_s < vllm().ttft_s
    with pytest.raises(ValueError, match="give one of greedy, reserve-static, reserve-dynamic"):
        Setup(gate="open")


def test_claims_are_found_by_name() -> None:
    assert find("splitwise-aa").printed == 2.15
    with pytest.raises(ValueError, match="there is no claim 'x'; there are splitwise-aa"):
        find("x")
    assert asking(200, 100, 800, 145).slo == SLO(0.2, 0.1)
