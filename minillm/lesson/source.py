"""The engine's own code in a lesson, by symbol: never a copy of it."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from html import escape
from pathlib import Path
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

_PACKAGE = Path(__file__).resolve().parents[1]


class Source:
    """A piece of this package's source: shown with line numbers and a link to its file."""

    def __init__(self, path: str, first_line: int, text: str) -> None:
        self.path, self.first_line, self.text = path, first_line, text

    def __repr__(self) -> str:
        numbered = (f"{number:4}  {line}" for number, line in enumerate(self.text.splitlines(), self.first_line))
        return "\n".join([f"{self.path}, line {self.first_line}", *numbered])

    def _repr_html_(self) -> str:
        plain_text = "background:white;color:#3b3b3b;margin:2px 0;text-align:left;white-space:pre;overflow-x:auto;line-height:1.35"
        style = HtmlFormatter(
            linenos="inline", linenostart=self.first_line, noclasses=True, nobackground=True, prestyles=plain_text
        )
        code = highlight(self.text, PythonLexer(), style)
        link = f'<a href="../{escape(self.path)}" target="_blank">{escape(self.path)}</a>, line {self.first_line}'
        return f'<div style="background:white;color:#3b3b3b;padding:4px 8px;font-size:13px">{link}{code}</div>'


def show_source(symbol: str) -> Source:
    """The source of "module.Class.method" below minillm, such as "engine.engine.Engine.step".

    Raises `ValueError` for a symbol that there is not.
    """
    found: Any = find_symbol(symbol)
    found = found.fget if isinstance(found, property) else found
    try:
        lines, first = inspect.getsourcelines(found)
        path = Path(inspect.getsourcefile(found) or "").resolve().relative_to(_PACKAGE).as_posix()
    except (TypeError, OSError, ValueError):
        raise ValueError(
            f"{symbol!r} has no source of its own here: name a module, class, function or method of minillm"
        ) from None
    return Source(f"minillm/{path}", max(first, 1), textwrap.dedent("".join(lines)))


def find_symbol(symbol: str) -> Any:
    """What a symbol names: the longest part that is a module, then attributes."""
    parts = symbol.removeprefix("minillm.").split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(["minillm", *parts[:end]]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("minillm"):
                raise
            continue
        try:
            for name in parts[end:]:
                found = getattr(found, name)
        except AttributeError:
            break
        return found
    raise ValueError(f"there is no {symbol!r} in minillm: write module.name, such as 'engine.engine.Engine.step'")
