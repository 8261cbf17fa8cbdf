"""Run lessons from their sources and store them with outputs: `python notebooks/build.py [00 …]`.

Sources are `src/NN_name.py` (py:percent); what is stored beside this file is the same lesson with its outputs, and in
`solved/` its exercises with their solutions; both free of times, ids and machine names, so that running an unchanged
lesson changes little. `--check` compares without running; `--shown` brings only what `show_source` shows up to date.
"""

from __future__ import annotations

import argparse
import base64
import copy
import io
import re
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

from minillm.lesson.grading import all_exercises

HERE = Path(__file__).resolve().parent
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
KEPT_METADATA = ("tags", "jupyter")
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
        if cell.cell_type == "code" and ".reveal(" in cell.source:  # its words would give the answer away
            cell.metadata["jupyter"] = {"source_hidden": True}
        if "exercise" in cell.metadata.get(
            "tags", []
        ):  # the source names it; its frame is written once, in the exercise
            cell.source = f"{cell.source}\n{all_exercises()[cell.source.split()[1]].starter.rstrip()}"
    return notebook


def solved(notebook: Any) -> Any:
    """The lesson's exercises, each cell holding its solution, with what they need: the cells tagged so, and those from
    "Your turn" to "Passport".
    """
    headings = [next(iter(re.findall(r"^## (.*)", cell.source, re.M)), "") for cell in notebook.cells]
    own = range(headings.index("Your turn"), headings.index("Passport"))
    title, turn = notebook.cells[0], notebook.cells[own[0]]
    turn.source = turn.source[turn.source.index("## Your turn") :]
    title.source = f"{title.source.splitlines()[0]}: the exercises, solved\n\nWithout the rest of the lesson."
    kept = [title]
    for number, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        if number in own or "needed" in tags:
            kept.append(cell)
        if "exercise" in tags:
            first, _ = cell.source.split("\n", 1)
            cell.source = f"{first}\n{all_exercises()[first.split()[1]].solution.rstrip()}"
    notebook.cells = kept
    return notebook


def run(source: Path) -> list[Path]:
    """Execute a lesson, and its solved variant, and store both; returns the stored files."""
    notebook, variant = read_source(source), solved(read_source(source))
    for each in (notebook, variant):
        NotebookClient(
            each, timeout=120, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": HERE}}
        ).execute()
        each.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = fewer_colours(output["data"]["image/png"])
    for cell in variant.cells:  # pictures are in the lesson itself
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
            if "text/html" in output.get("data", {}):  # one folder deeper than the lesson
                output["data"]["text/html"] = output["data"]["text/html"].replace('href="../', 'href="../../')
    targets = [HERE / f"{source.stem}.ipynb", HERE / "solved" / f"{source.stem}.ipynb"]
    targets[1].parent.mkdir(exist_ok=True)
    for each, target in zip((notebook, variant), targets):
        nbformat.write(each, target)
    return targets


def refresh(source: Path) -> list[Path]:
    """Run only the cells of a stored lesson, and of its solved variant, that show the engine's source; returns the files that
    changed.
    """
    changed = []
    for target in (HERE / f"{source.stem}.ipynb", HERE / "solved" / f"{source.stem}.ipynb"):
        notebook = nbformat.read(target, as_version=4)
        showing = [cell for cell in notebook.cells if cell.cell_type == "code" and "show_source(" in cell.source]
        alone = nbformat.v4.new_notebook(cells=copy.deepcopy(showing), metadata=copy.deepcopy(notebook.metadata))
        if showing:
            NotebookClient(alone, timeout=60, resources={"metadata": {"path": HERE}}).execute()
        before = copy.deepcopy(notebook)
        for cell, fresh in zip(showing, alone.cells):
            for output in fresh.outputs:
                if "execution_count" in output:
                    output["execution_count"] = cell.execution_count
            cell.outputs = fresh.outputs
        if notebook != before:
            nbformat.write(notebook, target)
            changed.append(target)
    return changed


def fewer_colours(picture: str) -> str:
    """A picture of 256 colours, in base64 as before: drawings have few, and every stored lesson stays in Git for ever."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    file = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(file, format="png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def problems(source: Path) -> list[str]:
    """What is wrong with a stored lesson and its solved variant: not in step with the source, not run, too large."""
    fresh = {
        HERE / f"{source.stem}.ipynb": read_source(source),
        HERE / "solved" / f"{source.stem}.ipynb": solved(read_source(source)),
    }
    return [text for stored, notebook in fresh.items() for text in _problems(stored, notebook, source)]


def _problems(stored: Path, fresh: Any, source: Path) -> list[str]:
    name = stored.relative_to(HERE).as_posix()
    if not stored.exists():
        return [f"{name} is missing: run make notebooks"]
    notebook = nbformat.read(stored, as_version=4)
    found = []
    if _content(notebook) != _content(fresh):
        found.append(f"{name} is not in step with src/{source.name}: run make notebooks LESSON={source.name[:2]}")
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.execution_count is None:
            found.append(f"{name}: a cell was not run: {cell.source[:50]!r}")
    if "widgets" in notebook.metadata:
        found.append(f"{name}: widget state is stored; GitHub refuses such files")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append(f"{name}: no kernelspec; JupyterLab would ask for one")
    if stored.stat().st_size > MAX_BYTES:
        found.append(f"{name}: {stored.stat().st_size:,} bytes; at most {MAX_BYTES:,}")
    return found


def _content(notebook: Any) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(c.cell_type, c.source.strip(), tuple(c.metadata.get("tags", []))) for c in notebook.cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lessons", nargs="*", help="numbers of lessons, such as 00; all by default")
    parser.add_argument("--check", action="store_true", help="only say what is not in step")
    parser.add_argument("--shown", action="store_true", help="only bring up to date what show_source shows")
    options = parser.parse_args()
    if options.check:
        found = [text for source in sources(options.lessons) for text in problems(source)]
        sys.exit("\n".join(found) if found else 0)
    if options.shown:
        print(*(target.name for source in sources(options.lessons) for target in refresh(source)), sep="\n")
        return
    for source in sources(options.lessons):
        began = time.monotonic()
        print(f"{run(source)[0].name} and its solved variant: {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
