"""minillm: a small engine for distributed LLM inference, made to be read. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what the names are; nothing is imported when the program runs
    from minillm.llm import LLM as LLM
    from minillm.model.sampling import SamplingParams as SamplingParams
    from minillm.parallel.layout import Layout as Layout
    from minillm.policy.options import EngineOptions as EngineOptions
    from minillm.ranks.errors import RankError as RankError
    from minillm.ranks.launch import lead as lead
    from minillm.ranks.membership import context as context
    from minillm.ranks.pool import Ranks as Ranks

__version__ = "0.1.0"

_HOME = {
    "LLM": "minillm.llm",
    "SamplingParams": "minillm.model.sampling",
    "Layout": "minillm.parallel.layout",
    "EngineOptions": "minillm.policy.options",
    "Ranks": "minillm.ranks",
    "RankError": "minillm.ranks",
    "context": "minillm.ranks",
    "lead": "minillm.ranks",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"minillm has no {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext minillm`: the `%%ranks` and `%%exercise` cell magics."""
    from minillm.lesson.magics import register

    register(shell)
