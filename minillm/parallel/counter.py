"""The creditor's end of the links between instances, on one rank: it answers debtors while the rank computes."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from typing import Any

import torch

from minillm.distkv.lookup import Lookup
from minillm.kv.paged import PagedCache
from minillm.parallel.door import Door, LinkLost, recv_tensor, say, send_tensor


class Counter:
    """The creditor's end on one rank: answers whoever connects, each in a thread of its own. `manager` hears asks and notices, on the
    rank that has one: (what, debtor, details) -> what to answer, or None.
    """

    def __init__(
        self, door: Door, rank: int, cache: PagedCache, manager: Callable[[str, int, dict[str, Any]], Any] | None = None
    ) -> None:
        self.cache, self.manager = cache, manager
        self._key = door.key
        self._writing = threading.Lock()
        self._over: set[int] = set()
        self._links: dict[Connection, int] = {}  # and whose they are
        self._listener = Listener(door.address(door.party, rank), family="AF_UNIX", backlog=16)
        threading.Thread(target=self._accept, name="minillm counter", daemon=True).start()

    def over(self, parties: Sequence[int]) -> None:
        """From now on nothing of these parties is written here any more, and they get no answers."""
        with self._writing:
            self._over |= set(parties)
        for link, party in list(self._links.items()) if parties else ():
            if party in self._over:
                _hang_up(link)

    def close(self) -> None:
        """Answer nobody any more."""
        with suppress(OSError):
            self._listener.close()
        for link in list(self._links):
            _hang_up(link)

    def _accept(self) -> None:
        while True:
            try:
                link = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(link,), name="minillm counter", daemon=True).start()

    def _serve(self, link: Connection) -> None:
        """Answer one debtor until it is gone."""
        debtor = -1
        try:
            if not _knows(link, self._key):
                return
            while True:
                message = json.loads(link.recv_bytes())
                what = message.pop("what")
                if what == "hello":
                    debtor = self._links[link] = message["party"]
                elif what == "move":
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
        except (EOFError, OSError, LinkLost, ValueError, KeyError):
            pass
        finally:
            self._links.pop(link, None)
            link.close()
            if self.manager is not None and debtor >= 0:
                self.manager("lost", debtor, {})

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


def _hang_up(link: Connection) -> None:
    """End a connection that another thread may be reading: it then reads the end."""
    with suppress(OSError), socket.socket(fileno=os.dup(link.fileno())) as plain:
        plain.shutdown(socket.SHUT_RDWR)


def _knows(link: Connection, key: bytes) -> bool:
    """Whether who connects has the key."""
    try:
        deliver_challenge(link, key)
        answer_challenge(link, key)
        return True
    except (AuthenticationError, EOFError, OSError):
        link.close()
        return False
