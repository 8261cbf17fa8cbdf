"""Run lessons from their sources and store them with outputs: `python notebooks/build.py [00 …]`.

Sources are `src/NN_name.py` (py:percent); what is stored beside this file is the same lesson with its outputs, free of
times, ids and machine names, so that running an unchanged lesson changes little. `--check` compares without running.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
KEPT_METADATA = ("tags",)
MAX_BYTES = 1_500_000


def sources(wanted: list[str]) -> list[Path]:
    """The sources whose names begin with one of `wanted`; all for none."""
    return [path for path in sorted((HERE / "src").glob("*.py")) if not wanted or path.name.startswith(tuple(wanted))]


def read_source(source: Path) -> Any:
    """The lesson as a notebook without outputs, with cell ids that do not change from run to run."""
    notebook = jupytext.read(source)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02}"
        cell.metadata = {key: cell.metadata[key] for key in KEPT_METADATA if key in cell.metadata}
    return notebook


def run(source: Path) -> Path:
    """Execute a lesson and store it; returns the stored file."""
    notebook = read_source(source)
    NotebookClient(
        notebook, timeout=120, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": HERE}}
    ).execute()
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    target = HERE / f"{source.stem}.ipynb"
    nbformat.write(notebook, target)
    return target


def problems(source: Path) -> list[str]:
    """What is wrong with a stored lesson: not in step with its source, not run, too large."""
    stored = HERE / f"{source.stem}.ipynb"
    if not stored.exists():
        return [f"{stored.name} is missing: run make notebooks"]
    notebook, fresh = nbformat.read(stored, as_version=4), read_source(source)
    found = []
    if _content(notebook) != _content(fresh):
        found.append(
            f"{stored.name} is not in step with src/{source.name}: run make notebooks LESSON={source.name[:2]}"
        )
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.execution_count is None:
            found.append(f"{stored.name}: a cell was not run: {cell.source[:50]!r}")
    if "widgets" in notebook.metadata:
        found.append(f"{stored.name}: widget state is stored; GitHub refuses such files")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append(f"{stored.name}: no kernelspec; JupyterLab would ask for one")
    if stored.stat().st_size > MAX_BYTES:
        found.append(f"{stored.name}: {stored.stat().st_size:,} bytes; at most {MAX_BYTES:,}")
    return found


def _content(notebook: Any) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(c.cell_type, c.source.strip(), tuple(c.metadata.get("tags", []))) for c in notebook.cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lessons", nargs="*", help="numbers of lessons, such as 00; all by default")
    parser.add_argument("--check", action="store_true", help="only say what is not in step")
    options = parser.parse_args()
    if options.check:
        found = [text for source in sources(options.lessons) for text in problems(source)]
        sys.exit("\n".join(found) if found else 0)
    for source in sources(options.lessons):
        began = time.monotonic()
        print(f"{run(source).name}: {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
