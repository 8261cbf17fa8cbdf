"""The learner's copy: filled, kept, updated, reset; and the lab's start."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from helpers import gone

from minillm.lesson.lab import free_port
from minillm.lesson.workspace import fill, reset


def lesson(text: str, output: str = "") -> str:
    outputs = [{"output_type": "stream", "name": "stdout", "text": output}]
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": text, "outputs": outputs, "execution_count": 1}
    return json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def house(tmp_path: Path) -> tuple[Path, Path]:
    source = tmp_path / "notebooks"
    source.mkdir()
    (source / "00_ranks.ipynb").write_text(lesson("print(1)", "1"))
    return source, tmp_path / "work"


def text_of(file: Path) -> str:
    return json.loads(file.read_text())["cells"][0]["source"]


def test_outputs_are_cleared(house: tuple[Path, Path]) -> None:
    source, work = house
    assert fill(source, work) == []
    cell = json.loads((work / "00_ranks.ipynb").read_text())["cells"][0]
    assert (cell["outputs"], cell["execution_count"], cell["source"]) == ([], None, "print(1)")


def test_edits_survive_and_untouched_lessons_follow(house: tuple[Path, Path]) -> None:
    source, work = house
    fill(source, work)
    mine = work / "00_ranks.ipynb"
    (source / "00_ranks.ipynb").write_text(lesson("print(2)"))
    mine.write_text(lesson("print(1)", "run, not edited"))
    assert fill(source, work) == []
    assert text_of(mine) == "print(2)"
    mine.write_text(lesson("my own"))
    (source / "00_ranks.ipynb").write_text(lesson("print(3)"))
    assert "make reset LESSON=00" in fill(source, work)[0]
    assert text_of(mine) == "my own"


def test_outputs_stay_while_the_course_does_not_change(house: tuple[Path, Path]) -> None:
    source, work = house
    fill(source, work)
    mine = work / "00_ranks.ipynb"
    mine.write_text(lesson("print(1)", "my result"))
    fill(source, work)
    assert "my result" in mine.read_text()


def test_another_kind_of_cell_is_an_edit(house: tuple[Path, Path]) -> None:
    source, work = house
    fill(source, work)
    mine = work / "00_ranks.ipynb"
    changed = json.loads(mine.read_text())
    changed["cells"][0]["cell_type"] = "raw"
    mine.write_text(json.dumps(changed))
    (source / "00_ranks.ipynb").write_text(lesson("print(2)"))
    assert "has your edits" in fill(source, work)[0]
    assert json.loads(mine.read_text())["cells"][0]["cell_type"] == "raw"


def test_reset_keeps_the_old_one(house: tuple[Path, Path]) -> None:
    source, work = house
    fill(source, work)
    (work / "00_ranks.ipynb").write_text(lesson("my own"))
    assert "yours is in 00_ranks.mine-1.ipynb" in reset(source, work, "00")
    assert text_of(work / "00_ranks.ipynb") == "print(1)"
    assert text_of(work / "00_ranks.mine-1.ipynb") == "my own"
    (source / "00_ranks.ipynb").write_text(lesson("print(4)"))
    assert fill(source, work) == []
    assert text_of(work / "00_ranks.ipynb") == "print(4)"


@pytest.mark.parametrize("name", ["", "99", "../etc", "*", "0?"])
def test_reset_of_no_lesson(house: tuple[Path, Path], name: str) -> None:
    with pytest.raises(ValueError, match="choose one of 00"):
        reset(*house, name)


def test_a_broken_record_or_lesson_is_no_obstacle(house: tuple[Path, Path]) -> None:
    source, work = house
    fill(source, work)
    (work / ".lessons.json").write_text("{")
    (work / "00_ranks.ipynb").write_text("not json")
    fill(source, work)
    assert (work / "00_ranks.ipynb").read_text() == "not json"


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {number} is in use or not allowed: choose another with PORT="):
            free_port(number)
    assert free_port(None) >= 8888
    with pytest.raises(ValueError, match="PORT=70000"):
        free_port(70000)


def test_the_lab_answers_on_its_url_and_only_with_the_token(house: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "minillm.lesson.lab", "--port", str(free_port(None))]
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    lab = subprocess.Popen(
        command, cwd=house[0].parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert lab.stdout is not None
        url = next(match[0] for line in lab.stdout if (match := re.search(r"http://127\.0\.0\.1:\S+", line)))
        assert "/lab/tree/work/00_ranks.ipynb?token=" in url
        base, token = url.split("/lab/")[0], url.split("token=")[1]
        assert _answer(f"{base}/api/contents/work/00_ranks.ipynb?token={token}") == 200
        assert _answer(f"{base}/api/contents/work/00_ranks.ipynb") == 403
    finally:
        lab.send_signal(signal.SIGTERM)
        lab.wait(20)
    assert gone([lab.pid])


def _answer(url: str) -> int:
    for _ in range(200):
        try:
            return urllib.request.urlopen(url, timeout=5).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the lab did not come up")
