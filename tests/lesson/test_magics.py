"""`%%ranks` in a real IPython shell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

from minillm import RankError, Ranks
from minillm.lesson.magics import WIDE, wrapped


@pytest.fixture
def shell(ranks4: Ranks) -> Iterator[Any]:
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "minillm")
    shell.user_ns["ranks"] = ranks4
    yield shell
    InteractiveShell.clear_instance()


def test_a_cell_runs_everywhere_and_its_last_line_comes_back(shell: Any) -> None:
    result = shell.run_cell("%%ranks\ny = rank * 2\ny + world_size")
    assert result.result == [4, 6, 8, 10]
    assert shell.run_cell("%%ranks\ny").result == [0, 2, 4, 6]
    assert shell.run_cell("%%ranks\ny = 0").result is None


def test_line_numbers_count_the_magic_line(shell: Any) -> None:
    result = shell.run_cell("%%ranks\nx = 1\nraise ValueError('no')")
    assert isinstance(result.error_in_exec, RankError)
    assert "line 3: raise ValueError('no')" in str(result.error_in_exec)


def test_bad_lines_and_syntax(shell: Any) -> None:
    assert isinstance(shell.run_cell("%%ranks\nx = = 1").error_in_exec, SyntaxError)
    assert "write nothing = Ranks(4) first" in str(shell.run_cell("%%ranks nothing\n1").error_in_exec)
    assert "write %%ranks, %%ranks NAME" in str(shell.run_cell("%%ranks a b\n1").error_in_exec)
    assert shell.run_cell("%%ranks\nrank").result == [0, 1, 2, 3]


def test_named_ranks(shell: Any, ranks2: Ranks) -> None:
    shell.user_ns["pair"] = ranks2
    assert shell.run_cell("%%ranks pair --stream\nworld_size").result == [2, 2]


def test_a_notebook_shows_the_diagnosis_alone(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shell.run_cell("%%ranks\nif rank:\n    dist.barrier()")
    shown = capsys.readouterr().out
    assert "rank 0 returned without calling barrier" in shown
    assert "job.py" not in shown


def test_verdicts_are_broken_between_words() -> None:
    text = "not solved yet. " + "expected 10, got 6, " * 12 + "\n  a short line"
    lines = wrapped(text).splitlines()
    assert all(len(line) <= WIDE for line in lines) and lines[-1] == "  a short line"
    assert " ".join(lines[:-1]).split() == text.splitlines()[0].split()
