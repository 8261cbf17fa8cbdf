"""A rank's desk: it listens at the door of its party, and serves whoever has the key, each in a thread of its own, while the rank computes."""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from typing import Any

from minillm.parallel.door import Door, LinkLost


def hang_up(link: Connection) -> None:
    """End a connection that another thread may be reading: it then reads the end."""
    with suppress(OSError), socket.socket(fileno=os.dup(link.fileno())) as plain:
        plain.shutdown(socket.SHUT_RDWR)


class Desk:
    """Hears JSON messages with a word `what`; subclasses say in `handle` what is done about them."""

    def __init__(self, door: Door, rank: int) -> None:
        self._key = door.key
        self.links: dict[Connection, int] = {}  # and whose they are, -1 before they have said so
        self._listener = Listener(door.address(door.party, rank), family="AF_UNIX", backlog=16)
        threading.Thread(target=self._accept, name="minillm desk", daemon=True).start()

    def handle(self, link: Connection, what: str, message: dict[str, Any]) -> None:
        """Somebody says something. Raises `LinkLost` to hang up."""
        raise NotImplementedError

    def left(self, link: Connection, party: int) -> None:
        """Somebody has hung up."""

    def close(self) -> None:
        """Serve nobody any more."""
        with suppress(OSError):
            self._listener.close()
        for link in list(self.links):
            hang_up(link)

    def _accept(self) -> None:
        while True:
            try:
                link = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(link,), name="minillm desk", daemon=True).start()

    def _serve(self, link: Connection) -> None:
        """Serve one party until it is gone."""
        try:
            if not _knows(link, self._key):
                return
            self.links[link] = -1
            while True:
                message = json.loads(link.recv_bytes())
                what = message.pop("what")
                if what == "hello":
                    self.links[link] = message["party"]
                else:
                    self.handle(link, what, message)
        except (EOFError, OSError, LinkLost, ValueError, KeyError):
            pass
        finally:
            party = self.links.pop(link, -1)
            link.close()
            self.left(link, party)


def _knows(link: Connection, key: bytes) -> bool:
    """Whether who connects has the key."""
    try:
        deliver_challenge(link, key)
        answer_challenge(link, key)
        return True
    except (AuthenticationError, EOFError, OSError):
        return False
