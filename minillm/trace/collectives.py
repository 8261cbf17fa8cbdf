"""What an all-reduce costs by three algorithms, in the terms of a link: latency α for each message, 1 / bandwidth β for a byte.

`count` ranks, each with `message_bytes`. Every rank sends and receives one message at a time. (Thakur, Rabenseifner and
Gropp, 2005, section 4; Patarasuk and Yuan, 2009.)
"""

from __future__ import annotations

from collections.abc import Callable

from minillm.hardware.devices import Link


def ring(count: int, message_bytes: float, link: Link) -> float:
    """2 (n - 1) steps, in each a chunk of 1 / n of the message: 2 (n - 1) (α + β bytes / n)."""
    return 2 * (count - 1) * link.time_s(message_bytes / count)


def tree(count: int, message_bytes: float, link: Link) -> float:
    """The sum up a tree, and down again: 2 ⌈log₂ n⌉ (α + β bytes)."""
    return 2 * (count - 1).bit_length() * link.time_s(message_bytes)


def gather(count: int, message_bytes: float, link: Link) -> float:
    """Everybody sends all it has to everybody, and adds up for itself: (n - 1) (α + β bytes)."""
    return (count - 1) * link.time_s(message_bytes)


ALGORITHMS: dict[str, Callable[[int, float, Link], float]] = {
    "ring": ring,
    "tree": tree,
    "all to all, then add": gather,
}


def sent_share(name: str, count: int) -> float:
    """What the busiest rank sends, in times its own numbers."""
    return {"ring": 2 * (count - 1) / count, "all to all, then add": float(count - 1), "over rank 0": float(count - 1)}[
        name
    ]
