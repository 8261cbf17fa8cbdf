"""Rank processes: start, call, watch and stop them, and let them communicate.

Names load on first use, so that importing this package costs nothing and a rank never loads the launching side.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Ranks": "minillm.ranks.pool",
    "RankError": "minillm.ranks.errors",
    "Fault": "minillm.ranks.errors",
    "RankContext": "minillm.ranks.membership",
    "context": "minillm.ranks.membership",
    "Comm": "minillm.ranks.comm",
    "lead": "minillm.ranks.launch",
    "choose_backend": "minillm.ranks.backend",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"minillm.ranks has no {name!r}")
    if name == "Ranks":  # let the fork server import torch while this process does
        from minillm.ranks.process import warm_up

        warm_up()
    return getattr(importlib.import_module(_HOME[name]), name)
