"""Ranks on several hosts, where `torchrun` or `accelerate launch` has started a process for each.

The process of global rank 0 leads: it runs the user's program. The others keep places: each starts a rank process on its
host when the leader asks, ends it, and tells how it stands, so that ranks are called, watched and started anew there as
they are here. Calls go straight from the leader to the rank, by TCP, with a key that the launcher's store hands out.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from queue import Empty, Queue

import torch.distributed as dist

from minillm.ranks.backend import choose_backend
from minillm.ranks.keeper import LAUNCHER, Card, keep, tune
from minillm.ranks.pool import Place, Ranks
from minillm.ranks.process import Here, warm_up
from minillm.ranks.remote import JOIN_S, Keeper, Pipe


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return all(name in os.environ for name in LAUNCHER) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def lead() -> Iterator[Launch | None]:
    """`with lead() as launch:` — under a launcher only rank 0 enters; the other processes keep places until it leaves, then
    exit. `LLM(…, ranks=launch)` runs on all of them. Elsewhere `launch` is None.

    Raises `RuntimeError` when some processes do not come.
    """
    if not launched():
        yield None
        return
    warm_up()
    card = Card.mine()
    common, _, _ = next(dist.rendezvous("env://", card.rank, int(os.environ["WORLD_SIZE"])))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a launcher may start all of them again
    store = dist.PrefixStore(f"minillm lead {attempt}", common)
    if card.rank:
        sys.exit(keep(card, store))
    launch = Launch(card, int(os.environ["WORLD_SIZE"]), store)
    try:
        yield launch
    finally:
        launch.close()


class Launch:
    """All processes of a launcher, as the leader has them. `ranks=` of an `LLM` takes it.

    `cards` says who they are, by rank.
    """

    def __init__(self, card: Card, size: int, store: dist.Store) -> None:
        self.address = "127.0.0.1" if card.local_size == size else os.environ["MASTER_ADDR"]
        self._key = secrets.token_bytes(32)
        here = self.address if card.local_size == size else ""  # every interface: the others know one of its names
        self._listener = Listener((here, 0), backlog=4 * size)
        self._closed = False
        self._keepers: Queue[tuple[Card, Connection]] = Queue()
        self._pipes: list[Queue[Pipe]] = [Queue() for _ in range(size)]  # that lead to each rank
        threading.Thread(target=self._accept, name="minillm launch", daemon=True).start()
        store.set("leader", json.dumps([self.address, self._listener.address[1], self._key.hex()]))
        self.cards = [card]
        places: dict[int, Place] = {card.rank: Here(card.local_rank, card.node)}
        while len(places) < size:
            try:
                other, link = self._keepers.get(timeout=JOIN_S)
            except Empty:
                missing = ", ".join(str(rank) for rank in range(size) if rank not in places)
                raise RuntimeError(f"these ranks did not come within {JOIN_S:g} s: {missing}") from None
            self.cards.append(other)
            places[other.rank] = Keeper(other, link, self._pipes[other.rank])
        self.cards.sort(key=lambda each: each.rank)
        self.places = [places[rank] for rank in range(size)]

    def split(self, parts: int, device: str | None = None) -> list[Ranks]:
        """All processes in `parts` equal pools of ranks, in order; each can be lost without the others."""
        size, pools = len(self.places) // parts, []
        for first in range(0, len(self.places), size):
            places = self.places[first : first + size]
            pool = Ranks(size, device=device, places=places, address=self.address)
            together = max(sum(other.node == place.node for other in places) for place in places)
            beside = max(sum(other.node == place.node for other in self.places) for place in places)
            pool.backend = choose_backend(together, device, beside=(0, beside))
            pools.append(pool)
        return pools

    def close(self) -> None:
        """Send everyone home."""
        for place in self.places:
            if isinstance(place, Keeper):
                place.say("leave")
                place.link.close()
        self._closed = True
        self._listener.close()

    def _accept(self) -> None:
        """Take who connects, until closed; a stranger who says nothing holds up nobody."""
        while not self._closed:
            with suppress(OSError):
                link = self._listener.accept()
                threading.Thread(target=self._greet, args=(link,), name="minillm guest", daemon=True).start()

    def _greet(self, link: Connection) -> None:
        """Somebody who knows the key is a keeper, or the pipe of a rank that a keeper starts."""
        try:
            tune(link)
            deliver_challenge(link, self._key)
            answer_challenge(link, self._key)
            what, *details = link.recv()
        except (AuthenticationError, EOFError, OSError):
            link.close()
            return
        if what == "keeper":
            self._keepers.put((details[0], link))
        else:
            rank, ticket = details
            self._pipes[rank].put(Pipe(what, ticket, link))
