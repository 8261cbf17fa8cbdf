"""Everything that the GPUs of this machine can prove, in one folder: `python bench/gpu/run.py FOLDER`.

Runs tests/gpu, then measures ceilings, decode and prefill on random weights of real shapes beside transformers, and
all-reduce between ranks. Writes gpu.json and pictures; takes less than nine minutes: sections that would begin later are
left out and named. `--device cpu --small` tries the script itself without a GPU. Needs torch, transformers, pytest and
matplotlib, and nothing else of the course.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "bench" / "gpu")]

import torch  # noqa: E402
from models import TINY, measure_model  # noqa: E402

from minillm import Ranks, context  # noqa: E402
from minillm.hardware.ceilings import measure_ceilings  # noqa: E402
from minillm.hardware.devices import Device  # noqa: E402
from minillm.hardware.machine import machine, version_of  # noqa: E402
from minillm.model.config import ModelConfig  # noqa: E402
from minillm.model.shapes import SHAPES  # noqa: E402
from minillm.trace.trace import Trace  # noqa: E402

LAST_START_S, TESTS_LIMIT_S = 420.0, 240.0


def all_reduce_on_ranks(size: int, device: str | None) -> dict[str, Any]:
    """Microseconds of an all-reduce between ranks, by bytes of the message."""
    with Ranks(size, device=device, timeout_s=30) as ranks:
        return {"ranks": ranks.describe(), "median_us": ranks.run(_all_reduces)[0]}


def _all_reduces() -> dict[str, float]:
    here = context()
    comm = here.comm()
    medians = {}
    for count in (2_304, 589_824, 4_718_592):
        tensor = torch.ones(count // 4, device=here.device)
        times = []
        for _ in range(30):
            began = time.perf_counter()
            comm.all_reduce(tensor)
            if here.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        medians[str(count)] = statistics.median(times[5:]) * 1e6
    return medians


def draw(traces: dict[str, Trace], here: Device, dtype: str, folder: Path) -> list[str]:
    """A roofline and a timeline of every model's steps."""
    from minillm.viz.roofline import draw_roofline, measured_dots
    from minillm.viz.style import png
    from minillm.viz.timeline import draw_timeline

    names = []
    for name, trace in traces.items():
        figures = {
            f"roofline_{name}.png": draw_roofline(
                here, dtype, measured_dots(trace), f"{name}: prefill computes, decode reads", trace=trace
            ),
            f"timeline_{name}.png": draw_timeline(trace, f"{name}: every step that was measured"),
        }
        for file, figure in figures.items():
            (folder / file).write_bytes(png(figure))
            names.append(file)
    return names


def run_tests() -> dict[str, Any]:
    """tests/gpu by pytest, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "tests/gpu",
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TESTS_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        return {"ok": False, "tail": f"ended after {TESTS_LIMIT_S:g} s: {str(error.stdout)[-2000:]}"}
    return {"ok": done.returncode == 0, "tail": (done.stdout + done.stderr)[-6000:]}


def main() -> int:
    """Run the sections, writing after each; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny shape, to try the script")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "make gpu: torch sees no GPU here; bench/gpu/run.py FOLDER --device cpu --small tries the script",
            file=sys.stderr,
        )
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if options.device == "cuda" else []
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpus else None
    about = {"command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), **machine(), "gpus": gpus, "nccl": nccl,
             "torch": torch.__version__, "transformers": version_of("transformers")}  # fmt: skip
    report: dict[str, Any] = {**about, "sections": {}, "errors": {}, "left_out": []}
    device, dtype = torch.device(options.device), "float32" if options.device == "cpu" else "bfloat16"
    traces: dict[str, Trace] = {}

    def section(name: str, work: Callable[[], Any]) -> Any:
        """Run one section; its failure is kept and the next one runs."""
        if time.monotonic() - began > LAST_START_S:
            report["left_out"].append(name)
            return None
        try:
            report["sections"][name] = result = work()
            print(f"{time.monotonic() - began:5.0f} s  {name}: done", flush=True)
            return result
        except Exception:
            report["errors"][name] = traceback.format_exc()
            print(f"{time.monotonic() - began:5.0f} s  {name}: FAILED\n{traceback.format_exc()}", flush=True)
            return None
        finally:
            (options.folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")

    def model_section(name: str, config: ModelConfig) -> dict[str, Any]:
        figures, traces[name] = measure_model(name, config, device, options.small)
        return figures

    tests = section("tests", run_tests)
    if tests is not None:
        print(tests["tail"])
    for size in (2,) if options.small else sorted({1, 2, max(1, len(gpus))}):
        section(f"all-reduce, {size} ranks", lambda size=size: all_reduce_on_ranks(size, options.device))
    ceilings: list[Device] = []
    section("ceilings", lambda: ceilings.append(measure_ceilings(options.device, dtype)) or vars(ceilings[0]))
    for name, config in (
        TINY if options.small else {key: SHAPES[key] for key in ("SmolLM2-135M", "Llama-3.1-8B")}
    ).items():
        section(name, lambda name=name, config=config: model_section(name, config))
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if ceilings and traces:
        section("pictures", lambda: draw(traces, ceilings[0], dtype, options.folder))
    failed = bool(report["errors"] or report["left_out"] or not (tests or {}).get("ok"))
    print(
        f"{time.monotonic() - began:5.0f} s in all; figures in {options.folder}/gpu.json"
        + ("; NOT everything passed" if failed else "")
    )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
