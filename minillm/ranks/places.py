"""Where code stands, in words that are the same on every machine: "line 3: dist.all_reduce(x)"."""

from __future__ import annotations

import linecache
import os
import traceback
from types import FrameType, TracebackType

from minillm.ranks.watch import LIBRARY

Spot = tuple[str, int]  # file name, line


def is_cell(filename: str) -> bool:
    """Whether this file name stands for a notebook cell or a prompt, and not for a file."""
    return filename.startswith(("<", "ipython-input")) or "ipykernel_" in filename


def describe(filename: str, line: int) -> str:
    """ "line 3: code" for a cell, "folder/file.py:3: code" for a file."""
    code = linecache.getline(filename, line).strip()
    short = "/".join(filename.replace(os.sep, "/").split("/")[-2:])
    where = f"line {line}" if is_cell(filename) else f"{short}:{line}"
    return f"{where}: {code}" if code else where


def describe_source(source: str) -> str:
    """The same, from the "file:line" that a board carries."""
    filename, _, line = source.rpartition(":")
    return describe(filename, int(line)) if line.isdigit() else source


def spots_of_frame(frame: FrameType | None) -> list[Spot]:
    """The stack of a running frame, outermost first, without torch and this package."""
    spots: list[Spot] = []
    while frame is not None:
        spots.append((frame.f_code.co_filename, frame.f_lineno or 0))  # None between two lines
        frame = frame.f_back
    return _own(spots[::-1])


def inside_torch(frame: FrameType | None) -> bool:
    """Whether the innermost frames belong to torch's communication."""
    for _ in range(4):
        if frame is None:
            return False
        if "/torch/distributed/" in frame.f_code.co_filename.replace(os.sep, "/"):
            return True
        frame = frame.f_back
    return False


def spots_of_traceback(trace: TracebackType | None) -> list[Spot]:
    """The stack of an exception, outermost first, without torch and this package."""
    return _own([(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(trace)])


def _own(spots: list[Spot]) -> list[Spot]:
    return [spot for spot in spots if not spot[0].startswith(LIBRARY)] or spots[-1:]


def line_of_error(error: BaseException) -> str:
    """The line of the user's own code in which an error came up; "" when there is none."""
    return _innermost(spots_of_traceback(error.__traceback__))


def line_of_frame(frame: FrameType | None) -> str:
    """The line of the user's own code in which a running frame stands; "" when there is none."""
    return _innermost(spots_of_frame(frame))


def _innermost(spots: list[Spot]) -> str:
    """The innermost of a cell's places, or of all when no cell is among them."""
    cells = [spot for spot in spots if is_cell(spot[0])]
    return describe(*(cells or spots)[-1]) if spots else ""


def cell_sources(filenames: set[str]) -> dict[str, str]:
    """The text of the cells among these files, so that another process can quote their lines."""
    return {name: "".join(linecache.getlines(name)) for name in filenames if is_cell(name)}


def remember_cells(sources: dict[str, str]) -> None:
    """Make the lines of cells known here, as `cell_sources` gave them."""
    for name, text in sources.items():
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
