"""Which number a rank has at each place of a mesh, by the order in which axes count, and so which lines leave a host.

Hosts take ranks by number: with four on each, 0 to 3 are together. Whatever axis counts fastest has neighbours for lines, and
stays within hosts as long as it is no longer than they are. The file knows no processes and no links.
"""

from __future__ import annotations

from collections.abc import Sequence

from minillm.parallel.layout import Layout

ORDER = ("dp", "pp", "tp")  # ours: slices are neighbours (Narayanan et al., 2021, section 3)


def number_of(layout: Layout, place: dict[str, int], order: Sequence[str] = ORDER) -> int:
    """The rank at a place on the mesh, when axes count in this order, the last one fastest."""
    rank = 0
    for axis in order:
        rank = rank * getattr(layout, axis) + place[axis]
    return rank


def places_of(layout: Layout) -> list[dict[str, int]]:
    """All places on the mesh. Raises `ValueError` for a layout with cp."""
    if layout.cp > 1:
        raise ValueError(f"layout {str(layout)!r}: cp is not built yet; use dp, pp, tp and ep")
    return [
        {"dp": dp, "pp": pp, "tp": tp} for dp in range(layout.dp) for pp in range(layout.pp) for tp in range(layout.tp)
    ]


def neighbours(layout: Layout, axis: str) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Pairs of places that are next to each other along an axis."""
    return [
        (place, place | {axis: place[axis] + 1})
        for place in places_of(layout)
        if place[axis] + 1 < getattr(layout, axis)
    ]


def apart(layout: Layout, a: dict[str, int], b: dict[str, int], per_host: int, order: Sequence[str] = ORDER) -> bool:
    """Whether two places are on different hosts, with `per_host` ranks on each."""
    return number_of(layout, a, order) // per_host != number_of(layout, b, order) // per_host


def crossing(layout: Layout, axis: str, per_host: int, order: Sequence[str] = ORDER) -> bool:
    """Whether some line along an axis leaves its host."""
    return any(apart(layout, a, b, per_host, order) for a, b in neighbours(layout, axis))
