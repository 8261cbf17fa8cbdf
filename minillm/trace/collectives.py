"""What collectives cost in the terms of a link: latency α for each message, 1 / bandwidth β for a byte.

`count` ranks, each with `message_bytes`. Every rank sends and receives one message at a time. (Thakur, Rabenseifner and
Gropp, 2005, section 4; Patarasuk and Yuan, 2009.)
"""

from __future__ import annotations

from collections.abc import Callable

from minillm.hardware.devices import Link

UNEVEN = (
    "dispatch", "combine", "rebalance",  # tokens to their experts and back; experts to new ranks
    "queries", "answers", "blocks", "last hidden states",  # to the ranks of a sequence's blocks and back; blocks to new ranks
)  # fmt: skip


def collective_time_s(name: str, size: int, message_bytes: float, link: Link) -> float:
    """What a collective over `size` ranks takes by the ring (or, for `broadcast` and `barrier`, tree) algorithm.

    A ring's all-reduce is 2 (n - 1) rounds of 1/n of the message, all-gather and reduce-scatter n - 1 rounds (Patarasuk and
    Yuan, 2009); `message_bytes` is what one rank puts in. An all-to-all of uneven parts (`UNEVEN`) takes n - 1 messages; there
    it is what leaves the rank that sends most.
    """
    if size == 1:
        return 0.0
    rounds = (size - 1).bit_length()
    each = {
        "all_reduce": (2 * (size - 1), message_bytes / size),
        "all_gather": (size - 1, message_bytes),
        "reduce_scatter": (size - 1, message_bytes / size),
        "all_to_all": (size - 1, message_bytes / size),
        "broadcast": (rounds, message_bytes),
        "barrier": (rounds, 0),
    }
    each |= dict.fromkeys(UNEVEN, (size - 1, message_bytes / (size - 1))) | {"keys": (1, message_bytes)}
    if name not in each:
        raise ValueError(f"there is no formula for {name!r}; there are ones for {', '.join(each)}")
    times, part = each[name]
    return times * link.time_s(part)


def ring(count: int, message_bytes: float, link: Link) -> float:
    """2 (n - 1) steps, in each a chunk of 1 / n of the message: 2 (n - 1) (α + β bytes / n)."""
    return collective_time_s("all_reduce", count, message_bytes, link)


def tree(count: int, message_bytes: float, link: Link) -> float:
    """The sum up a tree, and down again: 2 ⌈log₂ n⌉ (α + β bytes)."""
    return 2 * (count - 1).bit_length() * link.time_s(message_bytes)


def one_shot(count: int, message_bytes: float, link: Link) -> float:
    """An all-gather of everything, and everybody adds up for itself: (n - 1) (α + β bytes)."""
    return (count - 1) * link.time_s(message_bytes)


ALGORITHMS: dict[str, Callable[[int, float, Link], float]] = {
    "ring": ring,
    "tree": tree,
    "one-shot": one_shot,
}


def ring_share(name: str, count: int) -> float:
    """What each rank sends in a ring, in times all the numbers that are summed or gathered."""
    return {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}[name] * (count - 1) / count


def sent_share(name: str, count: int) -> float:
    """What the busiest rank sends by the ring or by one-shot, in times its own numbers."""
    return {"ring": ring_share("all_reduce", count), "one-shot": float(count - 1)}[name]
