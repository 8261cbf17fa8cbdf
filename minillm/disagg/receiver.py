"""The receiving end of a KV transfer, on one rank: it asks the ranks of another instance for what this one holds of a cache, and writes
what comes into blocks that are kept free for it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from minillm.disagg.routes import Route
from minillm.kv.paged import PagedCache
from minillm.parallel.door import Door, LinkLost, recv_tensor, say
from minillm.parallel.links import connect


@dataclass
class Coming:
    """A transfer under way to this rank: its routes and the first layers of their sources, by source rank, its blocks (of the whole
    pool), and what is `missing`, counted in blocks of one head of one layer.
    """

    request_id: int
    party: int
    routes: dict[int, Route]
    first_layers: dict[int, int]
    blocks: Sequence[int]
    missing: int


@dataclass
class Stub:
    """This rank's first layer and first head, and its place on a line of context parallel ranks."""

    layer: int
    head: int
    line: tuple[int, int] = (0, 1)


class Receiver:
    """What one rank receives. `tell(transfer, came)` hears when a transfer is over, on a thread of its own: all of it came, or its
    source is gone.
    """

    def __init__(self, door: Door, cache: PagedCache, stub: Stub, tell: Callable[[int, bool], None]) -> None:
        self.door, self.cache, self.stub, self.tell = door, cache, stub, tell
        self._coming: dict[int, Coming] = {}
        self._lock = threading.RLock()
        self._wires: dict[tuple[int, int], Connection] = {}

    def pull(self, transfer: int, request_id: int, reading: int, party: int, routes: Sequence[Route], starts: Sequence[tuple[int, int]], blocks: Sequence[int]) -> None:  # fmt: skip
        """Ask for a cache of `blocks` here. `starts` are the first layer and head of each route's source rank."""
        place, ranks = self.stub.line
        places = [number for number, block in enumerate(blocks) if block % ranks == place]
        parts = {(route.layers, route.heads) for route in routes}
        missing = sum(len(layers) * len(heads) for layers, heads in parts) * len(places)
        with self._lock:
            by_source = {route.source: route for route in routes}
            first_layers = {route.source: layer for route, (layer, _) in zip(routes, starts)}
            self._coming[transfer] = Coming(request_id, party, by_source, first_layers, blocks, missing)
        if not missing:
            self._over(transfer, True)
        for route, (layer, head) in zip(routes, starts):
            about = {
                "transfer": transfer,
                "request_id": request_id,
                "reading": reading,
                "layers": [route.layers.start - layer, route.layers.stop - layer],
                "heads": [route.heads.start - head, route.heads.stop - head],
                "places": places,
                "line": route.source_place,
            }
            try:
                say(self._wire(party, route.source), "want", **about)
            except (OSError, LinkLost):
                self._over(transfer, False)
                return

    def stop(self, transfer: int) -> None:
        """From now on nothing of a transfer is written here."""
        with self._lock:
            coming = self._coming.pop(transfer, None)
            wires = [self._wires.get((coming.party, rank)) for rank in coming.routes] if coming is not None else []
        for wire in filter(None, wires):
            with suppress(OSError):
                say(wire, "unwant", transfer=transfer)

    def close(self) -> None:
        """Receive nothing more."""
        with self._lock:
            self._coming.clear()
            for wire in self._wires.values():
                wire.close()

    def _wire(self, party: int, rank: int) -> Connection:
        with self._lock:
            if (party, rank) not in self._wires:
                wire = self._wires[party, rank] = connect(self.door, party, rank, patient=True)
                threading.Thread(
                    target=self._read, args=(party, rank, wire), name="minillm receiver", daemon=True
                ).start()
            return self._wires[party, rank]

    def _read(self, party: int, rank: int, wire: Connection) -> None:
        """Take what comes from one rank, until it is gone; then all that was to come from there is missing."""
        try:
            while True:
                self._take(party, rank, wire)
        except (EOFError, OSError, LinkLost, ValueError, KeyError, TypeError):
            pass
        with self._lock:
            self._wires.pop((party, rank), None)
            broken = [n for n, coming in self._coming.items() if coming.party == party and rank in coming.routes]
        for transfer in broken:
            self._over(transfer, False)

    def _take(self, party: int, rank: int, wire: Connection) -> None:
        head = json.loads(wire.recv_bytes())
        transfer, places = head["transfer"], head["places"]
        keys = self.cache.keys
        with self._lock:
            coming = self._coming.get(transfer)
        if coming is None:  # given up meanwhile
            wire.recv_bytes()
            return
        route, count = coming.routes[rank], head["layers"][1] - head["layers"][0]
        came = recv_tensor(wire, (2, count, len(places), len(route.heads), *keys.shape[3:]), keys.dtype, keys.device)
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
