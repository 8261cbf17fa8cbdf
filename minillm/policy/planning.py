"""Who lends to whom, seen from above: the global manager of instances that borrow (Infinite-LLM, Lin et al. 2024, `gManager`).

It hears heartbeats, so what it knows is a little old; it plans moves, which a creditor may refuse. A plain state machine. Version 1 of
the paper keeps a ledger of debts and lets instances borrow when they run out; version 2 plans by a model of what it is worth.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from minillm.policy.loans import Heartbeat


class Ledger:
    """Who owes how many blocks to whom (version 1, the global debt ledger)."""

    def __init__(self, heartbeats: Iterable[Heartbeat] = ()) -> None:
        self.debts: dict[tuple[int, int], int] = {}  # (debtor, creditor) -> blocks
        for beat in heartbeats:
            for entry in beat.placements:
                if not entry.local:
                    self.borrow(beat.instance, entry.instance, entry.blocks)

    def borrow(self, debtor: int, creditor: int, blocks: int) -> None:
        """More is owed; with fewer than none, less."""
        owed = self.debts.pop((debtor, creditor), 0) + blocks
        if owed < 0:
            raise ValueError(f"instance {debtor} returns {-blocks} blocks to {creditor}, but owes only {owed - blocks}")
        if owed:
            self.debts[debtor, creditor] = owed

    def owed_by(self, debtor: int) -> int:
        """All that an instance has borrowed."""
        return sum(blocks for (who, _), blocks in self.debts.items() if who == debtor)

    def owed_to(self, creditor: int) -> int:
        """All that an instance has lent."""
        return sum(blocks for (_, whom), blocks in self.debts.items() if whom == creditor)

    def circle(self) -> list[int]:
        """Instances that owe each other in a ring, if there are any: each could bring some blocks home into the room that the
        others free. (The paper finds such rings by a depth-first search, as this does.)
        """
        after: dict[int, list[int]] = {}
        for debtor, creditor in sorted(self.debts):
            after.setdefault(debtor, []).append(creditor)
        done: set[int] = set()

        def walk(path: list[int]) -> list[int]:
            for other in after.get(path[-1], []):
                if other in path:
                    return path[path.index(other) :]
                if other not in done and (found := walk([*path, other])):
                    return found
            done.add(path[-1])
            return []

        return next((found for start in sorted(after) if start not in done and (found := walk([start]))), [])

    def cancel(self, circle: list[int]) -> int:
        """Strike out of a ring of debts what all owe; returns the blocks that each has home again."""
        pairs = list(zip(circle, [*circle[1:], *circle[:1]]))
        least = min(self.debts[pair] for pair in pairs)
        for debtor, creditor in pairs:
            self.borrow(debtor, creditor, -least)
        return least


@dataclass(frozen=True)
class Pace:
    """How long a decode step takes: reading the weights, or computing `request_s` for each request where that is longer, and
    `cached_s` for each token in the cache (the paper's T = W(β) / f(β) + Σ S / g, all layers together, f that of a roofline).
    """

    weights_s: float = 1.0
    request_s: float = 0.05
    cached_s: float = 1e-4

    def step_s(self, requests: int, tokens: int) -> float:
        """One step for so many requests with so many tokens in the cache together."""
        return max(self.weights_s, requests * self.request_s) + tokens * self.cached_s

    def tokens_per_s(self, requests: int, tokens: int) -> float:
        """What such steps give: TPS = β / T."""
        return requests / self.step_s(requests, tokens)


@dataclass(frozen=True)
class PlannedMove:
    """So many blocks of a request go from its instance to a creditor (`move_kvcache`)."""

    debtor: int
    request_id: int
    blocks: int
    creditor: int
    gain: float  # tokens/s, by the model


class GManager:
    """Knows the instances by their heartbeats, and plans moves from those whose requests wait for memory to those with room.

    Creditors are those with less than `most_used` of their blocks in use. Raises `ValueError` for heartbeats of strangers.
    """

    def __init__(
        self, instances: Iterable[int], block_size: int, pace: Pace | None = None, most_used: float = 0.9
    ) -> None:
        self.beats: dict[int, Heartbeat | None] = dict.fromkeys(instances)
        self.block_size, self.pace, self.most_used = block_size, pace or Pace(), most_used

    def heartbeat(self, beat: Heartbeat) -> None:
        """Hear of an instance."""
        if beat.instance not in self.beats:
            known = ", ".join(map(str, self.beats)) or "none"
            raise ValueError(f"a heartbeat of instance {beat.instance}, which nobody knows: there are {known}")
        self.beats[beat.instance] = beat

    def join(self, instance: int) -> None:
        """An instance is there."""
        self.beats[instance] = None

    def leave(self, instance: int) -> None:
        """An instance is gone."""
        self.beats.pop(instance, None)

    @property
    def ledger(self) -> Ledger:
        """The debts, as last heard."""
        return Ledger(beat for beat in self.beats.values() if beat is not None)

    def placement(self) -> dict[int, dict[int, int]]:
        """Of each instance's blocks those in use, by the instance whose requests they are of, as last heard."""
        held: dict[int, dict[int, int]] = {instance: {} for instance in self.beats}
        for debtor, beat in self.beats.items():
            for entry in beat.placements if beat is not None else ():
                if entry.instance in held:
                    held[entry.instance][debtor] = held[entry.instance].get(debtor, 0) + entry.blocks
        return held

    def view(self) -> dict[int, int]:
        """What each instance would lend, as last heard of it and of its debtors, who may know better."""
        ledger, view = self.ledger, {}
        for instance, beat in self.beats.items():
            if beat is not None:
                more = max(0, ledger.owed_to(instance) - beat.lent_blocks)
                view[instance] = max(0, beat.lendable - more)
        return view

    def plan(self) -> list[PlannedMove]:
        """The moves that are worth most, greedily: debtors with the smallest batch first; of each its longest request, to the
        creditors with the most room, as many blocks as the model finds best. (Version 2, section 5.3; the search for the best
        plan of all is exponential.)
        """
        beats = {instance: beat for instance, beat in self.beats.items() if beat is not None}
        moves = []
        for debtor in sorted(
            (each for each, beat in beats.items() if beat.waiting and beat.wanted), key=lambda each: beats[each].running
        ):
            local = [entry for entry in beats[debtor].placements if entry.local]
            longest = max(local, key=lambda entry: entry.blocks, default=None)
            if longest is None:
                continue
            left = longest.blocks - 1  # the last block is being written to
            creditors = [each for each in beats if each != debtor and self._lends(beats[each])]
            for creditor in sorted(creditors, key=lambda each: -beats[each].lendable):
                best = max(
                    (self._with(beats[debtor], beats[creditor], blocks) for blocks in self._choices(beats[debtor], min(left, beats[creditor].lendable))),
                    key=lambda each: each[0], default=None,
                )  # fmt: skip
                if best is None or best[0] <= 0:
                    break
                gain, blocks, beats[debtor], beats[creditor] = best
                moves.append(PlannedMove(debtor, longest.request_id, blocks, creditor, gain))
                left -= blocks
        return moves

    def _lends(self, beat: Heartbeat) -> bool:
        return beat.lendable > 0 and beat.free_blocks > (1 - self.most_used) * beat.num_blocks and not beat.waiting

    def _choices(self, debtor: Heartbeat, most: int) -> list[int]:
        """Numbers of blocks at which one more of the waiting requests can start."""
        each = max(1, debtor.wanted + debtor.free_blocks)
        return [n for k in range(debtor.waiting) if (n := debtor.wanted + k * each) <= most and debtor.wanted]

    def _with(self, debtor: Heartbeat, creditor: Heartbeat, blocks: int) -> tuple[float, int, Heartbeat, Heartbeat]:
        """What it gains to move so many blocks, in tokens/s of both, and how the two are then."""
        each = max(1, debtor.wanted + debtor.free_blocks)
        joining = min(debtor.waiting, 1 + (blocks - debtor.wanted) // each)
        moved = blocks * self.block_size
        grown = replace(
            debtor, running=debtor.running + joining, waiting=debtor.waiting - joining, free_blocks=0,
            wanted=each if debtor.waiting > joining else 0,
            tokens=debtor.tokens - moved + joining * each * self.block_size,
        )  # fmt: skip
        serving = replace(
            creditor,
            tokens=creditor.tokens + moved,
            free_blocks=creditor.free_blocks - blocks,
            lendable=creditor.lendable - blocks,
        )
        before = self._worth(debtor) + self._worth(creditor)
        return self._worth(grown) + self._worth(serving) - before, blocks, grown, serving

    def _worth(self, beat: Heartbeat) -> float:
        return self.pace.tokens_per_s(beat.running, beat.tokens)
