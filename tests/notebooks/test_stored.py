"""The lessons as stored: in step with their sources, run, free of machine names, small enough; and their exercises work."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import numpy as np
import pytest
from PIL import Image

from minillm.lesson.grading import all_exercises
from minillm.lesson.source import show_source
from minillm.parallel.layout import Layout
from minillm.viz.goals import draw_goals
from minillm.viz.style import png

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("*.ipynb"))
STORED = [*LESSONS, *sorted((NOTEBOOKS / "solved").glob("*.ipynb"))]
_PATH = re.compile(r"(?<![\w./])/(root|home|work|tmp|Users|var|opt)/")
MOST_WORDS, WIDEST = 1500, 105


def load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", NOTEBOOKS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("source", build.sources([]), ids=lambda path: path.stem)
def test_stored_lesson_is_its_source_run(source: Path) -> None:
    assert build.problems(source) == []


def test_every_stored_lesson_has_a_source() -> None:
    assert [path.stem for path in LESSONS] == [path.stem for path in build.sources([])]


@pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_outputs_name_no_machine(path: Path) -> None:
    for cell in read(path).cells:
        outputs = [{k: v for k, v in out.items() if k != "metadata"} for out in cell.get("outputs", [])]
        text = re.sub(r'"image/png": "[^"]*"', "", json.dumps(outputs))
        assert not _PATH.search(text), cell.source[:60]
        assert not re.search(r"pid[ =]\d|port[ =]\d|0x[0-9a-f]{6}", text), cell.source[:60]


@pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_errors_are_expected_ones(path: Path) -> None:
    for cell in read(path).cells:
        failed = any(out.output_type == "error" for out in cell.get("outputs", []))
        assert failed == ("raises-exception" in cell.metadata.get("tags", [])), cell.source[:60]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_is_not_too_long(path: Path) -> None:
    words = sum(len(re.findall(r"\w+", cell.source)) for cell in read(path).cells if cell.cell_type == "markdown")
    assert words <= MOST_WORDS


def cells_with(path: Path, tag: str) -> list[Any]:
    return [cell for cell in read(path).cells if tag in cell.metadata.get("tags", [])]


def test_frames_in_lessons_are_those_of_the_exercises() -> None:
    """Every exercise stands in its lesson, in the order of effort, with the frame that its tests know."""
    shown = {}
    for path in LESSONS:
        for cell in cells_with(path, "exercise"):
            first, frame = cell.source.split("\n", 1)
            shown[first.removeprefix("%%exercise ")] = frame.strip()
    exercises = all_exercises()
    assert list(shown) == list(exercises)
    assert shown == {name: exercise.starter.strip() for name, exercise in exercises.items()}
    assert [exercise.minutes for exercise in exercises.values()] == [5, 10, 25] * len(LESSONS)


@pytest.mark.parametrize("path", sorted((NOTEBOOKS / "solved").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_exercise_of_a_solved_lesson_is_solved(path: Path) -> None:
    cells = cells_with(path, "exercise")
    assert len(cells) == 3
    assert all(cell.outputs[0].text.startswith("solved: ") for cell in cells)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_source_shown_is_the_present_source(path: Path) -> None:
    """Line numbers may have moved since the lesson was stored; the code may not. Every symbol shown exists."""
    shown = 0
    for cell in read(path).cells:
        for symbol in re.findall(r'show_source\("([^"]+)"\)', cell.source) if cell.cell_type == "code" else ():
            stored = next(out.data["text/plain"] for out in cell.outputs if "data" in out)
            assert [line[6:] for line in stored.splitlines()[1:]] == [
                line[6:] for line in repr(show_source(symbol)).splitlines()[1:]
            ], symbol
            shown += 1
    assert shown >= 1


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_keeps_to_the_template(path: Path) -> None:
    """At least one guess that comes back, one thing to move, movement early, code that fits the page."""
    cells = read(path).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    asked = set(re.findall(r"^(\w+) = (?:Predict|Sketch)\(", "\n".join(code), re.M))
    assert asked == set(re.findall(r"^(\w+)\.reveal\(", "\n".join(code), re.M)) != set()
    assert any(name in text for text in code for name in ("WhatIf(", "RooflineWalk(", "CutStrip("))
    assert [line for text in code for line in text.splitlines() if len(line) > WIDEST] == []
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert "中文" in prose
    assert "**Next:**" in cells[-1].source


def test_fewer_colours_look_the_same() -> None:
    """Hardly a pixel, and only on smoothed edges, moves by more than an eighth of the range."""
    figure = draw_goals({Layout(): (1.0, 1.0), Layout(tp=2): (0.6, 0.7)}, {}, (0.5, 0.9), "finding", "caption")
    before = png(figure)
    after = base64.b64decode(build.fewer_colours(base64.b64encode(before).decode()))
    assert len(after) < len(before)
    pixels = [np.asarray(Image.open(io.BytesIO(each)).convert("RGB"), dtype=int) for each in (before, after)]
    moved = np.abs(pixels[0] - pixels[1])
    assert (moved > 32).mean() < 1e-3 and moved.mean() < 0.5
