"""The papers' systems simulated: costs, placements, pools, the command, and what cannot be."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from minillm.cli import main
from minillm.hardware.devices import find_device, find_link
from minillm.model.cost import decode_cost, pass_cost
from minillm.model.shapes import SHAPES
from minillm.policy.batch import Batch, Chunk
from minillm.sim import distserve, splitwise, tetri
from minillm.sim.costs import Fitted, Measured, Roofline
from minillm.sim.distserve import Parallelism, Placement, Setting
from minillm.sim.splitwise import A100, H100, Design
from minillm.trace.metrics import SLO
from minillm.trace.workload import Arrival, Lengths

LLAMA, DEVICE = SHAPES["Llama-3.1-8B"], find_device("H100")


def test_published_step_times() -> None:
    fitted = Fitted.published("OPT-13B", 1)
    assert fitted.prompt_s(512, 512**2) == pytest.approx(0.01810 + 0.10191e-3 * 512 + 7.12e-9 * 512**2)
    assert fitted.decode(10) == pytest.approx((0.01993 + 0.0385e-3 * 10, 6.27e-7))
    assert fitted.decode(95)[0] == pytest.approx(0.00717 + 0.1583e-3 * 95)
    measured = Measured.published("BLOOM-176B", "H100")
    assert measured.prompt_s(1536, 0) == pytest.approx((0.1322 + 0.2520) / 2)
    assert measured.decode(64) == (pytest.approx(0.0638), 0.0)
    assert measured.mixed_s(1000, 0, 24, 0) == pytest.approx(1.1 * 0.1322)
    assert Measured.published("BLOOM-176B", "H100", capped=True).prompt_s(1024, 0) == pytest.approx(1.3 * 0.1322)
    with pytest.raises(ValueError, match="nothing is published for DistServe OPT-13B tp=3"):
        Fitted.published("OPT-13B", 3)
    with pytest.raises(ValueError, match="nothing is published for BLOOM-176B on T4"):
        Measured.published("BLOOM-176B", "T4")


def test_the_roofline_is_that_of_the_cost_model() -> None:
    costs = Roofline(LLAMA, DEVICE, "bfloat16")
    rate, speed = DEVICE.flops_per_s("bfloat16"), DEVICE.bytes_per_s
    prompt = pass_cost(LLAMA, Batch((Chunk(0, 0, (0,) * 700, ()),)), 2)
    assert costs.prompt_s(700, 700**2) == pytest.approx(
        prompt.products.time_s(rate, speed) + prompt.attention.time_s(rate, speed)
    )
    step = decode_cost(LLAMA, 8, 3000, 2)
    base_s, slope_s = costs.decode(8)
    assert base_s + slope_s * 24_000 == pytest.approx(
        step.products.time_s(rate, speed) + step.attention.time_s(rate, speed)
    )
    apart = Roofline(LLAMA, DEVICE, "bfloat16", 4, find_link("NVLink 4"))
    assert costs.decode(8)[0] / 4 < apart.decode(8)[0] < costs.decode(8)[0]


def test_splitwise_serves_and_says_what_it_misses() -> None:
    load = splitwise.poisson_load(Lengths(1020, 0.985, 129, 0.859), 10.0)(15.0, 0)
    for design in (Design("base", H100, 20), Design("split", H100, 12, A100, 8)):
        cluster = splitwise.build(design)
        tasks = cluster.serve(load)
        assert all(task.given == task.new for task in tasks) and not splitwise.misses(tasks)
        assert all(machine.drained and machine.used == 0 for machine in cluster.machines)
    assert design.power == pytest.approx(12 * 44 + 8 * 24.8) and design.machines == 20
    few = splitwise.misses(splitwise.build(Design("few", A100, 2)).serve(load))
    assert any(text.startswith("ttft P50") and "2 allowed" in text for text in few)
    with pytest.raises(ValueError, match="none: 0 and 0 machines"):
        Design("none", H100, 0)


def test_distserves_searches() -> None:
    setting = Setting(requests=100)
    low = distserve.place_low(setting)
    assert low.placement.gpus <= 4 and low.per_gpu > 0 and low.tried == 4
    high = distserve.place_high(setting, 20.0)
    assert high.placement.prefills * high.placement.decodes >= 1 and high.tried == 6
    staged = distserve.build(Placement(Parallelism(1, 2), Parallelism(1, 2)), setting)
    tasks = staged.serve(distserve.load(setting, 2.0, 0))
    assert all(task.given == task.new for task in tasks) and staged.gpus == 4
    with pytest.raises(ValueError, match="nothing keeps to TTFT 0.01 s and TPOT 0.001 s for 90 %: with tp=4"):
        distserve.place_low(replace(setting, slo=SLO(0.01, 0.001)))
    with pytest.raises(ValueError, match="does not fit 1 GPUs twice"):
        distserve.place_low(setting, gpus=1)


def test_tetriinfer_turns_an_instance_that_is_idle() -> None:
    setup = tetri.Setup(2, 1, idle_s=1.0)
    cluster = tetri.Tetri(setup, tetri.v100_pair())
    tasks = cluster.serve([Arrival(0.05 * number, 30, 600) for number in range(60)])
    assert all(task.given == task.new for task in tasks)
    assert len(cluster.flips) >= 1 and cluster.dispatcher.roles.count(cluster.flips[0][2]) >= 1
    with pytest.raises(ValueError, match="gate='open': give one of greedy"):
        tetri.Setup(gate="open")


@pytest.mark.parametrize("system", ["colocated", "splitwise", "distserve", "tetriinfer"])
def test_the_command(system: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(
            [
                "simulate",
                "--system",
                system,
                "--rate",
                "2",
                "--seconds",
                "20",
                "--slo-ttft",
                "1",
                "--slo-tpot",
                "0.2",
                "--json",
            ]
        )
    figures = json.loads(capsys.readouterr().out)
    assert left.value.code == 0 and figures["requests"] > 20 and figures["attainment"]["value"] > 0.5
    assert ("missed" in figures) == (system == "splitwise")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--cluster", "both=0xH100"], "a cluster of no machines serves nobody"),
        (["--cluster", "prefill=2xH100"], "needs either both=…, or prefill=… and decode=…"),
        (["--cluster", "both=2xT4"], "there is no machine 'T4'; choose one of A100, H100, H100cap"),
        (["--rate", "0"], "--rate 0: give requests per second above 0"),
        (["--seconds", "-1"], "--seconds -1: give a number above 0"),
        (["--slo-ttft", "1"], "an SLO has two sides"),
        (["--trace", "nowhere.csv"], "nowhere.csv: No such file or directory"),
        (["--system", "colocated", "--chunk", "0", "--cluster", "both=2xH100"], "max_step_tokens=0: give a whole number from 1"),
        (["--system", "distserve", "--cluster", "both=1xtp=1,pp=2"], "machines that do both have no stages here, but pp=2"),
        (["--system", "distserve", "--cluster", "both=1xtp=3"], "nothing is published for DistServe OPT-13B tp=3"),
        (["--system", "tetriinfer", "--cluster", "both=2xV100"], "one pair that does both"),
        (["--system", "tetriinfer", "--cluster", "prefill=1xT4,decode=1xT4"], "has OPT-13B on pairs of V100"),
        (["--model", "gpt-5"], "--model 'gpt-5': measured are bloom-176b, llama-2-70b"),
    ],
)  # fmt: skip
def test_what_the_command_refuses(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["simulate", *([] if "--rate" in words else ["--rate", "2"]), *words])
    error = capsys.readouterr().err
    assert left.value.code == 2 and reason in error and error.count("\n") == 1
