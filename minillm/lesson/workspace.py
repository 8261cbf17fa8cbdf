"""A learner's own copy of the lessons: outputs cleared, edits never overwritten.

`make lab` fills `work/` from `notebooks/`. A lesson that the learner has not touched follows the course's updates; one
that was touched stays, and `make reset LESSON=00` puts it back (keeping the old one beside it).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

_RECORD = ".lessons.json"  # file name -> hash of what was last put there


def cleared(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook as a learner opens it: no outputs, no execution counts."""
    fresh = json.loads(json.dumps(notebook))
    for cell in fresh["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return fresh


def fill(source: Path, target: Path) -> list[str]:
    """Copy every lesson of `source` that is absent, or unchanged by the learner, into `target`; returns what to tell."""
    target.mkdir(exist_ok=True)
    record = _read(target / _RECORD)
    told = []
    for lesson in sorted(source.glob("*.ipynb")):
        fresh = _text(lesson)
        mine = target / lesson.name
        new = record.get(lesson.name) != _hash(fresh)
        if not mine.exists() or (new and _hash_of(mine) == record.get(lesson.name)):
            _write(mine, fresh)
            record[lesson.name] = _hash(fresh)
        elif new:
            told.append(
                f"{mine.name} has your edits and stays; the course has a newer one (make reset LESSON={mine.name[:2]})"
            )
    _write(target / _RECORD, json.dumps(record, indent=1))
    return told


def reset(source: Path, target: Path, lesson: str) -> str:
    """Put one lesson back as the course has it; the learner's goes to a file beside it. Raises `ValueError` for no such lesson."""
    found = sorted(source.glob(f"{lesson}*.ipynb")) if lesson.replace("_", "").isalnum() else []
    if len(found) != 1:
        names = ", ".join(path.name[:2] for path in sorted(source.glob("*.ipynb")))
        raise ValueError(f"LESSON={lesson!r} is not one lesson; choose one of {names}")
    mine = target / found[0].name
    target.mkdir(exist_ok=True)
    if mine.exists():
        mine.replace(backup := _free_name(mine))
    record = _read(target / _RECORD)
    _write(mine, fresh := _text(found[0]))
    _write(target / _RECORD, json.dumps({**record, mine.name: _hash(fresh)}, indent=1))
    return f"{mine.name} is as the course has it" + (f"; yours is in {backup.name}" if "backup" in locals() else "")


def _free_name(path: Path) -> Path:
    number = 1
    while (name := path.with_name(f"{path.stem}.mine-{number}.ipynb")).exists():
        number += 1
    return name


def _text(lesson: Path) -> str:
    return json.dumps(cleared(json.loads(lesson.read_text(encoding="utf-8"))), indent=1, ensure_ascii=False) + "\n"


def _hash(text: str) -> str:
    """Of what a learner writes in cells: running a lesson, or saving it from another editor, is no edit."""
    try:
        cells = [
            [cell["cell_type"], "".join(cell["source"]), cell.get("attachments") or {}]
            for cell in json.loads(text)["cells"]
            if "".join(cell["source"]).strip()
        ]
    except (ValueError, KeyError, TypeError):
        return "not a notebook"
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()


def _hash_of(path: Path) -> str:
    try:
        return _hash(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "not a notebook"


def _read(path: Path) -> dict[str, str]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def main() -> None:
    """`python -m minillm.lesson.workspace [--reset LESSON]`, run in the repository."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--reset", metavar="LESSON")
    options = parser.parse_args()
    source, target = Path("notebooks"), Path("work")
    try:
        print(reset(source, target, options.reset) if options.reset is not None else "\n".join(fill(source, target)))
    except (ValueError, OSError) as error:
        sys.exit(f"minillm: {error}")


if __name__ == "__main__":
    main()
