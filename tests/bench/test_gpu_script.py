"""`make gpu`'s script, tried without a GPU and without what a GPU server lacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = ("IPython", "ipywidgets", "anywidget", "jupyterlab", "ipykernel", "gguf", "zmq", "simpy")
RUN = f"""
import runpy, sys
for name in {ABSENT}:
    sys.modules[name] = None  # an import of it fails
sys.argv = ["bench/gpu/run.py", sys.argv[1], "--device", "cpu", "--small"]
runpy.run_path("bench/gpu/run.py", run_name="__main__")
"""


def test_it_needs_no_jupyter_and_keeps_every_figure(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["errors"] == {}
    assert report["left_out"] == []
    assert list(report["sections"]) == ["tests", "all-reduce, 2 ranks", "ceilings", "tiny", "pictures"]
    row = report["sections"]["tiny"]["decode, batch 4"]
    assert row["faster than transformers"]["median"] > 0
    assert len(row["raw_s"]["engine"]) == len(row["raw_s"]["transformers"]) == 2
    for name in report["sections"]["pictures"]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "bench/gpu/run.py", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={"PATH": "", "CUDA_VISIBLE_DEVICES": "-1"}
    )
    assert done.returncode == 2
    assert done.stderr.startswith("make gpu: torch sees no GPU here")
