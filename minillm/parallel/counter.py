"""The creditor's end of the links between instances, on one rank: it answers debtors while the rank computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from minillm.distkv.lookup import Lookup
from minillm.kv.paged import PagedCache
from minillm.parallel.desk import Desk, hang_up
from minillm.parallel.door import Door, LinkLost, recv_tensor, say, send_tensor


class Counter(Desk):
    """The creditor's end on one rank. `manager` hears asks and notices, on the rank that has one: (what, debtor, details) -> what to
    answer, or None.
    """

    def __init__(
        self, door: Door, rank: int, cache: PagedCache, manager: Callable[[str, int, dict[str, Any]], Any] | None = None
    ) -> None:
        self.cache, self.manager = cache, manager
        self._writing = threading.Lock()
        self._over: set[int] = set()
        super().__init__(door, rank)

    def over(self, parties: Sequence[int]) -> None:
        """From now on nothing of these parties is written here any more, and they get no answers."""
        with self._writing:
            self._over |= set(parties)
        for link, party in list(self.links.items()) if parties else ():
            if party in self._over:
                hang_up(link)

    def handle(self, link: Connection, what: str, message: dict[str, Any]) -> None:
        debtor = self.links[link]
        if what == "move":
            self._write(link, debtor, message["blocks"])
        elif what == "fetch":
            blocks = message["blocks"]
            send_tensor(link, torch.stack((self.cache.keys[:, blocks], self.cache.values[:, blocks])))
        elif what == "step":
            self._attend(link, **message)
        elif self.manager is not None:
            answer = self.manager(what, debtor, message)
            if answer is not None:
                say(link, "answer", value=answer)

    def left(self, link: Connection, party: int) -> None:
        if self.manager is not None and party >= 0:
            self.manager("lost", party, {})

    def _write(self, link: Connection, debtor: int, blocks: list[int]) -> None:
        keys = self.cache.keys
        shape = (2, keys.shape[0], len(blocks), *keys.shape[2:])
        came = recv_tensor(link, shape, keys.dtype, keys.device)
        with self._writing:
            if debtor in self._over:
                raise LinkLost
            self.cache.keys[:, blocks], self.cache.values[:, blocks] = came
        say(link, "answer", value=True)

    @torch.inference_mode()
    def _attend(self, link: Connection, rows: list[int], blocks: list[list[int]], heads: int, layers: int) -> None:
        """Queries of one step, layer after layer: `rows` of each sequence, to its `blocks` here, which are full."""
        keys, device = self.cache.keys, self.cache.keys.device
        head_dim, size = keys.shape[-1], self.cache.block_size
        lookup = Lookup.of(rows, blocks, size, device)
        for layer in range(layers):
            q = recv_tensor(link, (sum(rows), heads, head_dim), keys.dtype, device)
            send_tensor(link, lookup.attend(q, self.cache.keys[layer], self.cache.values[layer]).pack())
