"""What instances that borrow of each other say: asks, notices, and the heartbeat for the global manager."""

from __future__ import annotations

from dataclasses import dataclass

from minillm.policy.batch import Away

Age = tuple[float, float, int]


@dataclass(frozen=True)
class Ask:
    """What a debtor wants of a creditor: room for so many blocks of a request. `firm`: the request cannot run without."""

    creditor: int
    request_id: int
    blocks: int
    age: Age
    firm: bool = False


@dataclass(frozen=True)
class Returned:
    """A debtor does not need these blocks of a creditor any more."""

    away: Away


@dataclass(frozen=True)
class Unclaimed:
    """A debtor has all that it asked for firmly, of this creditor and others."""

    creditor: int


@dataclass(frozen=True)
class CalledBack:
    """A creditor wants so many blocks back from a debtor, for a request of this age."""

    debtor: int
    blocks: int
    age: Age


@dataclass(frozen=True)
class Placement:
    """Where blocks of a request lie: an entry of the heartbeat (`RequestPlacementEntry`)."""

    request_id: int
    instance: int
    blocks: int
    local: bool


@dataclass(frozen=True)
class Heartbeat:
    """What an instance tells the global manager: requests that run and wait, its blocks, and where those of its requests lie.
    It would lend `lendable` more blocks; `wanted` are those that its first waiting request lacks, and `tokens` what its running
    requests have in the cache. It has nothing to do any more with those that it has `lost`.
    """

    instance: int
    running: int
    waiting: int
    free_blocks: int
    num_blocks: int
    lendable: int = 0
    lent_blocks: int = 0
    wanted: int = 0
    tokens: int = 0
    placements: tuple[Placement, ...] = ()
    lost: tuple[int, ...] = ()


Notice = Returned | Unclaimed | CalledBack
