"""The receiving end of a KV transfer, on one rank: it asks the ranks of another instance for what this one holds of a cache, and writes
what comes into blocks that are kept free for it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from secrets import token_hex
from typing import Any

import torch

from minillm.disagg.pair import RECEIVER, Pair
from minillm.disagg.room import Room
from minillm.disagg.routes import Route
from minillm.kv.paged import PagedCache
from minillm.parallel.desk import hang_up
from minillm.parallel.door import Door, LinkLost, recv_tensor, say
from minillm.parallel.links import connect
from minillm.ranks.backend import Backend


@dataclass
class Coming:
    """A transfer under way to this rank: its routes and the first layers of their sources, by source rank, its blocks (of the whole
    pool), and what is `missing`, counted in blocks of one head of one layer.
    """

    party: int
    routes: dict[int, Route]
    first_layers: dict[int, int]
    blocks: Sequence[int]
    missing: int


@dataclass
class Wire:
    """A link to a rank of another instance, on which one thread speaks at a time, and what parts come by if not by the link itself:
    memory shared with that rank, or a process group with it.
    """

    link: Connection
    room: Room | None = None
    pair: Pair | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, what: str, **details: Any) -> None:
        """Send a message. Raises `OSError` when nobody is there."""
        with self.lock:
            say(self.link, what, **details)


@dataclass
class Stub:
    """This rank's first layer and first head, and its place on a line of context parallel ranks."""

    layer: int
    head: int
    line: tuple[int, int] = (0, 1)


class Receiver:
    """What one rank receives. `tell(transfer, came)` hears when a transfer is over, on a thread of its own: all of it came, or its
    source is gone. With a `backend`, parts come by process groups.
    """

    def __init__(
        self, door: Door, cache: PagedCache, stub: Stub, tell: Callable[[int, bool], None], backend: Backend | None
    ) -> None:
        self.door, self.cache, self.stub, self.tell, self.backend = door, cache, stub, tell, backend
        self._coming: dict[int, Coming] = {}
        self._lock = threading.RLock()
        self._wires: dict[tuple[int, int], Wire] = {}
        self._askers: dict[int, ThreadPoolExecutor] = {}

    def pull(self, transfer: int, request_id: int, reading: int, party: int, routes: Sequence[Route], starts: Sequence[tuple[int, int]], blocks: Sequence[int]) -> None:  # fmt: skip
        """Ask for a cache of `blocks` here; returns at once. `starts` are the first layer and head of each route's source rank."""
        place, ranks = self.stub.line
        places = [number for number, block in enumerate(blocks) if block % ranks == place]
        parts = {(route.layers, route.heads) for route in routes}
        missing = sum(len(layers) * len(heads) for layers, heads in parts) * len(places)
        with self._lock:
            by_source = {route.source: route for route in routes}
            first_layers = {route.source: layer for route, (layer, _) in zip(routes, starts)}
            self._coming[transfer] = Coming(party, by_source, first_layers, blocks, missing)
            if party not in self._askers:  # one that does not answer keeps nobody else waiting
                self._askers[party] = ThreadPoolExecutor(1, "minillm asker")
        if not missing:
            self._over(transfer, True)
            return
        wants = [
            {
                "transfer": transfer,
                "request_id": request_id,
                "reading": reading,
                "layers": [route.layers.start - layer, route.layers.stop - layer],
                "heads": [route.heads.start - head, route.heads.stop - head],
                "places": places,
                "line": route.source_place,
            }
            for route, (layer, head) in zip(routes, starts)
        ]
        self._askers[party].submit(self._ask, transfer, party, [route.source for route in routes], wants)

    def _ask(self, transfer: int, party: int, sources: Sequence[int], wants: Sequence[dict[str, Any]]) -> None:
        """Tell the sources of a transfer what is wanted of them, unless it was stopped meanwhile."""
        try:
            for source, want in zip(sources, wants):
                if transfer in self._coming:
                    self._wire(party, source).say("want", **want)
        except (OSError, LinkLost):
            coming = self._coming.get(transfer)
            self._over(transfer, False)
            if coming is not None:
                self._unask(transfer, coming)

    def stop(self, transfer: int) -> None:
        """From now on nothing of a transfer is written here."""
        with self._lock:
            coming = self._coming.pop(transfer, None)
        if coming is not None:
            self._askers[coming.party].submit(self._unask, transfer, coming)

    def _unask(self, transfer: int, coming: Coming) -> None:
        with self._lock:
            wires = [self._wires.get((coming.party, rank)) for rank in coming.routes]
        for wire in filter(None, wires):
            with suppress(OSError):
                wire.say("unwant", transfer=transfer)

    def close(self) -> None:
        """Receive nothing more."""
        with self._lock:
            self._coming.clear()
            for wire in self._wires.values():
                hang_up(wire.link)
            for asker in self._askers.values():
                asker.shutdown(wait=False, cancel_futures=True)

    def _wire(self, party: int, rank: int) -> Wire:
        """The wire to a rank of a party, made when first needed; only the party's asker does."""
        with self._lock:
            if (party, rank) in self._wires:
                return self._wires[party, rank]
        wire = self._make_wire(party, rank)
        with self._lock:
            self._wires[party, rank] = wire
        threading.Thread(target=self._read, args=(party, rank, wire), name="minillm receiver", daemon=True).start()
        return wire

    def _make_wire(self, party: int, rank: int) -> Wire:
        """A new wire, and memory to share with who is there, or a process group with it."""
        link = connect(self.door, party, rank, patient=True)
        name = f"{self.door.party}-{token_hex(8)}"
        if self.backend is not None:
            say(link, "pair", name=name)
            return Wire(link, pair=Pair(self.door.folder / name, RECEIVER, self.backend, self.cache.keys.device))
        try:
            room = Room(self.door.folder / name, make=True)
        except OSError:  # such as no space there
            return Wire(link)
        say(link, "room", name=name)
        return Wire(link, room)

    def _read(self, party: int, rank: int, wire: Wire) -> None:
        """Take what comes from one rank, until it is gone; then all that was to come from there is missing."""
        try:
            while True:
                self._take(party, rank, wire)
        except Exception:  # whatever it was, nothing more comes by this wire
            wire.link.close()
        with self._lock:
            self._wires.pop((party, rank), None)
            broken = [n for n, coming in self._coming.items() if coming.party == party and rank in coming.routes]
        for transfer in broken:
            self._over(transfer, False)

    def _take(self, party: int, rank: int, wire: Wire) -> None:
        """Take a part: from the slot that it lies in, from the process group, or from the link."""
        head = json.loads(wire.link.recv_bytes())
        slot, by_group = head.get("slot"), None
        if wire.pair is not None:
            by_group = wire.pair.recv(head["numbers"], self.cache.keys.dtype)
        with self._lock:
            coming = self._coming.get(head["transfer"])
        if coming is not None:
            self._put(head, coming, rank, wire, by_group)
        elif slot is None and by_group is None:  # given up meanwhile
            wire.link.recv_bytes()
        if slot is not None:
            wire.say("free", slot=slot)

    def _put(self, head: dict[str, Any], coming: Coming, rank: int, wire: Wire, by_group: torch.Tensor | None) -> None:
        """Write a part where it belongs, if it is still wanted."""
        transfer, places, keys = head["transfer"], head["places"], self.cache.keys
        route, count = coming.routes[rank], head["layers"][1] - head["layers"][0]
        shape = (2, count, len(places), len(route.heads), *keys.shape[3:])
        if by_group is not None:
            came = by_group.view(shape).to(keys.device)
        elif "slot" in head:
            assert wire.room is not None
            came = wire.room.view(head["slot"], shape, keys.dtype).to(keys.device)
        else:
            came = recv_tensor(wire.link, shape, keys.dtype, keys.device)
        with self._lock:
            if transfer not in self._coming:
                return
            layer = coming.first_layers[rank] + head["layers"][0] - self.stub.layer
            self._write(route, layer, [coming.blocks[place] // self.stub.line[1] for place in places], came)
            coming.missing -= count * len(places) * len(route.heads)
            over = coming.missing == 0
        if over:
            self._over(transfer, True)

    def _write(self, route: Route, layer: int, blocks: list[int], came: torch.Tensor) -> None:
        layers = slice(layer, layer + came.shape[1])
        heads = slice(route.heads.start - self.stub.head, route.heads.stop - self.stub.head)
        self.cache.keys[layers, blocks, heads], self.cache.values[layers, blocks, heads] = came

    def _over(self, transfer: int, came: bool) -> None:
        with self._lock:
            if self._coming.pop(transfer, None) is None:
                return
        self.tell(transfer, came)
