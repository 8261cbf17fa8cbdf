"""Expected and got: where they differ first, and how to say a result in a few words. It knows no exercises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

SHORT = 4  # numbers of a tensor that are told one by one
CLOSE = 1e-4  # relative, for float32 sums in another order


def first_difference(expected: Sequence[Any], got: Sequence[Any]) -> tuple[int, tuple[int, ...], Any, Any] | None:
    """The first output that differs, and where in it: (output, index, expected, got); None when all agree."""
    for number, wanted in enumerate(expected):
        have = got[number] if number < len(got) else None
        if isinstance(wanted, torch.Tensor):
            if not isinstance(have, torch.Tensor) or have.shape != wanted.shape:
                return number, (), f"a tensor {list(wanted.shape)}", _kind(have)
            off = ~torch.isclose(have.to(wanted.dtype), wanted, rtol=CLOSE, atol=CLOSE)
            if off.any():
                index = tuple(off.nonzero()[0].tolist())
                return number, index, wanted[index].item(), have[index].item()
        elif not _same(wanted, have):
            return number, (), wanted, have if number < len(got) else "nothing"
    if len(got) > len(expected):
        return len(expected), (), "nothing more", got[len(expected)]
    return None


def _same(wanted: Any, have: Any) -> bool:
    """Numbers by value, whole ones exactly, in a one-element tensor too; anything else is no result, but None where nothing is wanted."""
    if wanted is None:
        return have is None
    if isinstance(have, torch.Tensor) and have.numel() == 1:
        have = have.item()
    if type(have) not in (int, float, bool):
        return False
    if isinstance(wanted, int) and float(have).is_integer():
        return int(have) == wanted
    return math.isclose(wanted, have, rel_tol=CLOSE, abs_tol=1e-9)


def _kind(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else value_text(value)


def value_text(value: Any) -> str:
    """A result in a few words."""
    if isinstance(value, torch.Tensor):
        if value.ndim == 1 and 1 < value.numel() <= SHORT:
            return f"[{', '.join(value_text(each) for each in value.tolist())}]"
        return f"a tensor {list(value.shape)}" if value.numel() != 1 else value_text(value.item())
    if isinstance(value, float):
        return f"{value:,.6g}" if not value.is_integer() or abs(value) >= 1e15 else f"{int(value):,}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return shorten(" ".join(str(value).split()), 60)


def shorten(text: str, most: int) -> str:
    """At most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"
