"""Prefill and decode on instances of their own, as one engine: it sends every request to who reads its prompt, and then to who goes on.

Instances are replicas that need not be alike, and are lost and started anew like those (`parallel/data.py`). Who does what is decided in
`policy/handing.py`; K and V move between the instances themselves (`handover.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch

from minillm.disagg.control import Control, make_dispatcher
from minillm.disagg.handover import equip
from minillm.disagg.layout import SplitLayout
from minillm.engine.handing import Note, What
from minillm.engine.request import Piece, Request
from minillm.engine.session import WAIT_S
from minillm.parallel.data import Replicas
from minillm.parallel.door import House
from minillm.parallel.instance import Instance, check_ranks, start_alike
from minillm.parallel.messages import Source
from minillm.parallel.remote import RemoteEngine
from minillm.policy.handing import NOBODY, Role, Way
from minillm.policy.options import EngineOptions
from minillm.policy.request import Order, first_come
from minillm.policy.router import Router
from minillm.ranks.pool import Ranks
from minillm.ranks.signals import uninterrupted
from minillm.trace.recorder import Recorder


def start_split(
    folder: Path, layout: SplitLayout, device: torch.device, dtype: torch.dtype, pools: Sequence[Ranks]
) -> list[Instance]:
    """An instance on each of the `pools`. Raises `ValueError` for other pools than one for each, and for ranks of several hosts."""
    sizes = [each.world_size for each in layout.each]
    if len({id(pool) for pool in pools}) != len(sizes):
        raise ValueError(
            f"layout {str(layout)!r} has {len(sizes)} instances, each on ranks of its own, but there are {len(pools)}: "
            f"give ranks=[{', '.join(f'Ranks({size})' for size in sizes)}], or leave it out"
        )
    for pool, each in zip(pools, layout.each):
        check_ranks(pool, each, device)
    if layout.prefill == layout.decode:
        instances = start_alike(folder, layout.prefill, device, dtype, pools)
    else:
        instances = start_alike(folder, layout.prefill, device, dtype, pools[: layout.prefills])
        instances += start_alike(folder, layout.decode, device, dtype, pools[layout.prefills :])
    if len({place.node for pool in pools for place in pool.places}) > 1:
        raise ValueError("prefill and decode are on several hosts, and hand over only within one")
    return instances


def split_pools(layout: SplitLayout, device: str) -> list[Ranks]:
    """Ranks for each instance; together they share the GPUs of this host."""
    sizes = [each.world_size for each in layout.each]
    begins = accumulate(sizes, initial=0)
    return [Ranks(size, device=device, beside=(begin, layout.world_size)) for size, begin in zip(sizes, begins)]


class Split(Replicas):
    """Instances with `roles`, in order. `router` chooses among those for prefill, and the options say who decodes."""

    def __init__(
        self,
        instances: Sequence[Instance],
        roles: Sequence[Role],
        options: EngineOptions,
        recorder: Recorder,
        router: Router,
        order: Order = first_come,
    ) -> None:
        self.dispatcher = make_dispatcher(roles, options, router)
        super().__init__(instances, options, recorder, self.dispatcher, order, House(equip))
        self.control = Control(self.dispatcher, self.engines, options)

    def flip(self, instance: int, role: Role) -> None:
        """Let an instance have another role once its last request has left it; no weights are read. Raises `ValueError` when nobody
        else would have the old one.
        """
        self.dispatcher.flip(instance, role)

    def step(self, wait_s: float = WAIT_S) -> list[Piece]:
        """As all replicas do; every 100 ms the control plane hears of them."""
        self.control.look(time.monotonic())
        return super().step(wait_s)

    def _place(self) -> None:
        """Hand out requests that nobody serves, and those whose prompts are read and which nobody goes on with."""
        for request_id, way in list(self.dispatcher.ways.items()):
            if way.read and way.decode == NOBODY and request_id in self.dispatcher.ways:
                self._send_on(request_id, self.dispatcher.read(request_id))
        while self._homeless and self.dispatcher.present(Role.PREFILL):
            request = self._homeless[0]
            most_new = self.control.predict([each.scheduled for each in [request, *request.twins]])
            chosen = self.dispatcher.route(request.request_id, request.scheduled.tokens, most_new)
            with uninterrupted(), self._guarded(self.engines[chosen]):
                self._homeless.popleft()
                for twin in [] if request.token_ids else request.twins:
                    self.dispatcher.join(twin.request_id, request.request_id)
                self.engines[chosen].take_over([request], handed=self.dispatcher.hands(request.request_id))

    def _send_on(self, request_id: int, decode: int | None) -> None:
        """Let an instance for decode have a request, with where its cache is, or will be."""
        if decode is None:
            return
        way, request = self.dispatcher.ways[request_id], self.requests[request_id]
        here = self.engines[way.prefill]
        source = Source(here.party, str(here.instance.layout), way.reading, way.tokens)
        with self._guarded(self.engines[decode]):
            self.engines[decode].take_over([request], source=source)

    def _told(self, pieces: list[Piece], engine: RemoteEngine) -> list[Piece]:
        """Requests that have their first token go on elsewhere."""
        self._heed(engine)
        number = self.engines.index(engine)
        for piece in pieces:
            request_id = piece.request_id
            way = self.dispatcher.ways.get(request_id)
            if way is None:
                continue
            if piece.finish_reason is not None:
                self._forget(request_id, [way.prefill, way.decode])
                self.dispatcher.ended(request_id)
            elif way.prefill != number or way.read:
                self.dispatcher.gave(request_id)
            else:
                onward = self.dispatcher.read(request_id)
                if onward is None and way.decode != NOBODY:
                    self._give(request_id, way.decode)
                self._send_on(request_id, onward)
                if request_id in self.dispatcher.ways:  # else whom it was sent to is lost, and it begins anew
                    self._forget(request_id, [self.dispatcher.free(request_id)])
        return pieces

    def _heed(self, engine: RemoteEngine) -> None:
        """What happened to requests at an instance; what it says of those that are elsewhere by now does not matter."""
        number, notes = self.engines.index(engine), engine.notes
        engine.notes = []
        for note in notes:
            way = self.dispatcher.ways.get(note.request_id)
            if way is None or note.request_id not in self.requests:
                continue
            if note.what in (What.STARTED, What.UNREAD) and number == way.prefill:
                self._heed_prefill(note, way)
            elif note.what in (What.CAME, What.BROKEN) and number == way.decode:
                self._heed_decode(note, number)

    def _heed_prefill(self, note: Note, way: Way) -> None:
        """A prompt is being read, or was put aside."""
        if note.what is What.UNREAD:
            self._forget(note.request_id, [self.dispatcher.unread(note.request_id)])
            return
        way.reading, way.tokens = note.reading, note.tokens
        if note.alone:
            self._send_on(note.request_id, self.dispatcher.started(note.request_id))

    def _heed_decode(self, note: Note, number: int) -> None:
        """A cache has come, or will not."""
        if note.what is What.CAME:
            self._forget(note.request_id, [self.dispatcher.came(note.request_id)])
        else:
            self._forget(note.request_id, [self.dispatcher.alone(note.request_id)])
            self._give(note.request_id, number, alone=True)

    def _give(self, request_id: int, decode: int, alone: bool = False) -> None:
        """Tell an instance for decode what a request was given."""
        with self._guarded(self.engines[decode]):
            self.engines[decode].give(self.requests[request_id], alone)

    def _forget(self, request_id: int, instances: Sequence[int | None]) -> None:
        """These instances have nothing to do with a request any more."""
        for number in instances:
            if number is not None and number != NOBODY and request_id in self.engines[number].requests:
                self.engines[number].drop([self.engines[number].requests[request_id]])

    def _strand(self, replica: int, lost: list[Request]) -> None:
        """Requests of an instance that is lost begin anew, or go on where their caches, or the rest of them, are."""
        known = self.requests | {request.request_id: request for request in lost}
        stranded = self.dispatcher.lose(replica)
        for request_id in stranded.anew:
            self._forget(request_id, range(len(self.engines)))
        self._take_back([known[number] for number in stranded.anew if number in known])
        for request_id in stranded.alone:
            way, request = self.dispatcher.ways.get(request_id), self.requests.get(request_id)
            if way is not None and request is not None and request.finish_reason is None:
                self._give(request_id, way.decode, alone=True)

    def _waiting_in_vain(self) -> list[Request]:
        """Also requests that are read, and which nobody can go on with."""
        kept = [number for number, way in self.dispatcher.ways.items() if way.read and way.decode == NOBODY]
        requests = [self.requests[number] for number in kept if number in self.requests]
        for number in kept:
            self._forget(number, [self.dispatcher.ways[number].prefill])
            self.dispatcher.ended(number)
        return super()._waiting_in_vain() + requests

    def _nobody_left(self) -> bool:
        """Whether a role has lost all its instances, and none is on its way back."""
        return self.dispatcher.helpless(self.dispatcher.lost - self._returning.keys())
