"""`%%ranks`: run a notebook cell on every rank.

%load_ext minillm
%%ranks            # on the Ranks in the variable `ranks`; four are made if there is none
%%ranks pair       # on the Ranks in the variable `pair`
%%ranks --stream   # lines appear as they are printed, not in rank order at the end
"""

from __future__ import annotations

import ast
from itertools import count
from typing import Any

_cells = count(1)


def register(shell: Any) -> None:
    """Give an IPython shell the magic."""

    def ranks(line: str, cell: str) -> Any:
        """Run this cell on every rank; its value is the list of what each rank's last line gave."""
        from minillm.ranks.pool import Ranks

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

    shell.register_magic_function(ranks, magic_kind="cell", magic_name="ranks")
