"""`%%ranks`: run a notebook cell on every rank. `%%exercise`: hand in a cell as an attempt at an exercise.

%load_ext minillm
%%ranks            # on the Ranks in the variable `ranks`; four are made if there is none
%%ranks pair       # on the Ranks in the variable `pair`
%%ranks --stream   # lines appear as they are printed, not in rank order at the end
%%exercise 00.total          # judged in a process of its own, with a time limit
%%exercise 00.total --here   # on toy ranks in the notebook's own process, so that breakpoint() stops in it
"""

from __future__ import annotations

import ast
from itertools import count
from textwrap import fill
from typing import Any

from minillm.lesson.desk import Desk, solution
from minillm.ranks.pool import Ranks
from minillm.viz.style import show

WIDE = 100  # characters that a page shows in a line
_cells = count(1)


def register(shell: Any) -> None:
    """Give an IPython shell the magics, and `solution`."""

    def ranks(line: str, cell: str) -> Any:
        """Run this cell on every rank; its value is the list of what each rank's last line gave."""
        words = line.split()
        stream = "--stream" in words
        names = [word for word in words if word != "--stream"] or ["ranks"]
        if len(names) > 1 or not names[0].isidentifier():
            raise ValueError(
                f"%%ranks {line}: write %%ranks, %%ranks NAME for the Ranks in a variable, or add --stream"
            )
        pool = shell.user_ns.get(names[0])
        if pool is None and names == ["ranks"]:
            pool = shell.user_ns["ranks"] = Ranks(4)
        if not isinstance(pool, Ranks):
            raise ValueError(
                f"%%ranks {names[0]}: there are no Ranks in the variable {names[0]}; write {names[0]} = Ranks(4) first"
            )
        filename = f"<ranks cell {next(_cells)}>"
        ast.parse("\n" + cell, filename)  # a syntax error is shown as everywhere, before any rank sees it
        results = pool.run_cell("\n" + cell, filename, stream=stream)  # the magic's own line counts, as in the notebook
        return results if any(result is not None for result in results) else None

    desk = Desk(shell.user_ns)

    def exercise(line: str, cell: str) -> None:
        """Hand in this cell; prints the verdict and shows the run. The function it defines is there afterwards."""
        words = line.split()
        here = "--here" in words
        names = [word for word in words if word != "--here"]
        if len(names) != 1:
            raise ValueError(f"%%exercise {line}: name one exercise, such as %%exercise 00.total")
        said, figure = desk.submit(names[0], "\n" + cell, here)  # the magic's own line counts, as in the notebook
        print(wrapped(said))
        if figure is not None:
            show(figure)

    shell.user_ns.setdefault("solution", solution)
    shell.register_magic_function(exercise, magic_kind="cell", magic_name="exercise")
    shell.register_magic_function(ranks, magic_kind="cell", magic_name="ranks")


def wrapped(text: str) -> str:
    """The same lines, none so long that a page would break it within a word."""
    return "\n".join(fill(line, WIDE, break_long_words=False, break_on_hyphens=False) for line in text.splitlines())
