"""Data parallelism: replicas of the model that serve different requests, with a router in front of them.

Each replica is an instance with ranks of its own, so that one can be lost while the others serve. What it had under way
goes on at another: the tokens given so far are part of the prompt there, and since noise is a function of (seed, request,
position), those that follow are the same. Who gets a request is decided in `policy/router.py`.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from contextlib import contextmanager
from itertools import accumulate
from multiprocessing.connection import wait

from minillm.engine.request import Piece, Request, with_twins
from minillm.engine.session import WAIT_S
from minillm.parallel.door import House
from minillm.parallel.instance import Instance
from minillm.parallel.market import Exchange
from minillm.parallel.member import lend
from minillm.parallel.remote import RemoteEngine
from minillm.policy.handing import Dispatcher
from minillm.policy.options import EngineOptions
from minillm.policy.request import Load, Order, ScheduledRequest, first_come
from minillm.policy.router import Router
from minillm.ranks.signals import uninterrupted
from minillm.trace.life import Event
from minillm.trace.recorder import Recorder

MOST_MOVES = 3  # whoever has lost so many replicas may be the reason
MOST_STARTS = 3  # in a row that fail, before a replica is left alone until somebody asks for something


class Replicas:
    """The engines of several instances as one, with the methods of `engine.Engine` that its users need.

    When a replica is lost, its requests go on at others, or wait until one is back; `losses` tells of it, and a warning.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        options: EngineOptions,
        recorder: Recorder,
        router: Router | Dispatcher,
        order: Order = first_come,
        house: House | None = None,
    ) -> None:
        self.options, self.router = options, router
        house = House(lend) if options.borrowing else house
        begins = accumulate((instance.layout.world_size for instance in instances), initial=0)
        self.engines = [
            RemoteEngine(instance, options, recorder, order, begin, fails=False, house=house)
            for instance, begin in zip(instances, begins)
        ]
        self.exchange = Exchange(self.engines, options) if options.borrowing else None
        self.losses: list[tuple[int, Exception]] = []  # which replica, and why
        self.failed: frozenset[int] = frozenset()
        self._homeless: deque[Request] = deque()  # served by nobody
        self._helper = ThreadPoolExecutor(len(instances), "minillm replicas")
        self._returning: dict[int, Future[int]] = {}
        self._gone: dict[int, BaseException | None] = {}  # why a replica did not come back
        self._starts: Counter[int] = Counter()  # of replicas, in a row, that failed
        self.record(recorder)

    @property
    def requests(self) -> dict[int, Request]:
        """All that wait or run."""
        homeless = {each.request_id: each for each in self._homeless}
        return {number: request for engine in self.engines for number, request in engine.requests.items()} | homeless

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs, or some ranks have not come to rest."""
        return bool(self._homeless) or any(engine.has_work for engine in self.engines)

    @property
    def load(self) -> Load:
        """How full all of them are together."""
        loads = [self.exchange.load(engine) if self.exchange else engine.load for engine in self.engines]
        return Load(*map(sum, zip(*(vars(load).values() for load in loads))))

    @property
    def num_blocks(self) -> int:
        """Blocks of all caches."""
        return sum(engine.num_blocks for engine in self.engines)

    def check(self, request: ScheduledRequest) -> None:
        """Raise `ValueError` for a request that can never run on one of them."""
        for engine in self.engines:
            engine.check(request)

    def check_samples(self, samples: int) -> None:
        """Raise `ValueError` when so many samples of one prompt can never run together."""
        for engine in self.engines:
            engine.check_samples(samples)

    def record(self, recorder: Recorder, baton: bool = False) -> None:
        """Let `recorder` have what happens from the next call on; with `baton` one rank of all computes at a time."""
        self.recorder = recorder
        for engine in self.engines:
            engine.record(recorder, baton)
            engine.baton = self.engines[0].baton

    def add(self, requests: Sequence[Request], arrived_s: float | None = None) -> None:
        """Let requests wait that came at `arrived_s`, or now, each where the router says; all of them or, with a `ValueError`
        for one that can never run, none.
        """
        for request in requests:
            self.check(request.scheduled)
        when = time.monotonic() if arrived_s is None else arrived_s
        for replica in self.router.lost - self._returning.keys():  # whatever kept it away may be over
            self._starts[replica] = 0
            self._restart(replica)
        self._look_after()
        for request in requests:
            request.life.note(Event.ARRIVED, when)
            self.recorder.trace.lives.append(request.life)
        self._homeless.extend(requests)
        self._place()

    def step(self, wait_s: float = WAIT_S) -> list[Piece]:
        """Take what the ranks have given since the last time; wait so long for it when there is nothing."""
        self._look_after()
        self._place()
        if self.exchange is not None:
            for engine in self.exchange.due():
                with self._guarded(engine):
                    self.exchange.tell(engine)
        pieces: list[Piece] = []
        for engine in self.engines:
            if engine.has_work:
                with self._guarded(engine):
                    engine.begin()
        self._wait(wait_s)
        for engine in self.engines:
            try:
                if engine.has_work:
                    with self._guarded(engine):
                        pieces += self._told(engine.step(0.0), engine)
            finally:
                pieces += self._told(engine.taken(), engine)
        self._place()
        return pieces

    def cancel(self, requests: Iterable[Request]) -> None:
        """End requests that have not ended yet; their blocks are free when the batches they are in are back."""
        going = [request for request in with_twins(requests) if request.finish_reason is None]
        for request in going:
            request.cancel(time.monotonic())
            self.router.ended(request.request_id)
        self._homeless = deque(request for request in self._homeless if request.finish_reason is None)
        for engine in self.engines:
            engine.drop(going)

    def close(self) -> None:
        """End its requests, and let the ranks forget it."""
        self.cancel(list(self.requests.values()))
        self._helper.shutdown()
        for engine in self.engines:
            engine.close()

    def _told(self, pieces: list[Piece], engine: RemoteEngine) -> list[Piece]:
        """Let the router know."""
        for piece in pieces:
            self.router.gave(piece.request_id)
            if piece.finish_reason is not None:
                self.router.ended(piece.request_id)
        return pieces

    def _wait(self, wait_s: float) -> None:
        """Until an engine has something to tell, or a replica is back; so long at most."""
        if sources := [source for engine in self.engines for source in engine.sources]:
            wait(sources, wait_s)
        elif self._returning:
            wait_for_futures(self._returning.values(), wait_s, FIRST_COMPLETED)

    def _place(self) -> None:
        """Hand out the requests that nobody serves, as long as there is a replica."""
        while self._homeless and len(self.router.lost) < len(self.engines):
            request = self._homeless[0]
            tokens, longest = request.scheduled.tokens, request.scheduled.longest
            replica = self.router.route(request.request_id, tokens, longest - len(tokens))
            with uninterrupted(), self._guarded(self.engines[replica]):
                self._homeless.popleft()
                for twin in [] if request.token_ids else request.twins:
                    self.router.join(twin.request_id, request.request_id)
                self.engines[replica].take_over([request])

    @contextmanager
    def _guarded(self, engine: RemoteEngine) -> Iterator[None]:
        """When the engine is lost meanwhile, see to it and go on."""
        try:
            yield
        except Exception as error:
            if engine.error is not error:  # somebody who listens to spans, or a reader that is busy
                raise
            self._lose(self.engines.index(engine), error)

    def _lose(self, replica: int, error: Exception) -> None:
        """A replica is gone: its requests wait for another one, and it is started anew while the others go on."""
        with uninterrupted():
            engine = self.engines[replica]
            lost, engine.lost, engine.error = engine.lost, [], None
            self.losses.append((replica, error))
            self._strand(replica, lost)
            if self.exchange is not None:
                self.exchange.regain()
            self._restart(replica)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"replica {replica} was lost, its requests go on at others: {reason}", RuntimeWarning, 2)

    def _strand(self, replica: int, lost: list[Request]) -> None:
        """The requests of a replica that is lost."""
        self.router.lose(replica)
        self._take_back(lost)

    def _take_back(self, requests: list[Request]) -> None:
        """Requests of a lost replica, with what they were given, are served by nobody."""
        for request in requests:
            if request.finish_reason is not None or (request.sample and not request.token_ids):
                continue  # the latter comes of its first sample, and with it
            request.moves += 1
            if request.moves > MOST_MOVES:
                self.failed |= {each.request_id for each in self._fail([request])}
                continue
            request.life.note(Event.MOVED, time.monotonic())
            self._homeless.append(request)

    def _fail(self, requests: Iterable[Request]) -> list[Request]:
        """Give requests up, with the samples that would have come of them."""
        each_with_its_own = [[each] if each.token_ids else [each, *each.twins] for each in requests]
        ended = [each for some in each_with_its_own for each in some if each.finish_reason is None]
        for request in ended:
            request.fail(time.monotonic())
        return ended

    def _restart(self, replica: int) -> None:
        engine = self.engines[replica]
        self._returning[replica] = self._helper.submit(
            engine.instance.open, engine.number, self.options, engine.order, engine.house
        )  # fmt: skip

    def _look_after(self) -> None:
        """Welcome replicas that are back, and miss those that ended while they had nothing to do.

        Raises what kept the last replica from coming back, when none is left.
        """
        for replica, start in list(self._returning.items()):
            if start.done():
                del self._returning[replica]
                self._gone[replica] = start.exception()
                if self._gone[replica] is None:
                    self._starts[replica] = 0
                    self.router.regain(replica)
                    if self.exchange is not None:
                        self.exchange.regain()
                    continue
                self._starts[replica] += 1
                if self._starts[replica] < MOST_STARTS:  # one that stands still is ended by the first start
                    self._restart(replica)
                else:
                    self._miss(replica)
        for replica, engine in enumerate(self.engines):
            if replica not in self.router.lost and engine.at_rest and not engine.instance.alive:
                engine.abandon()
                self._lose(replica, RuntimeError("a rank of it has ended"))
        for engine in self.exchange.given_up() if self.exchange is not None else ():
            engine.abandon()
            self._lose(self.engines.index(engine), RuntimeError("it was too slow for those that borrow of it"))
        if self._nobody_left():
            self.failed |= {each.request_id for each in self._fail(self._waiting_in_vain())}
            for replica in self.router.lost - self._returning.keys():
                self._restart(replica)
            raise next(error for error in self._gone.values() if error is not None)

    def _waiting_in_vain(self) -> list[Request]:
        """Requests that nobody can serve now."""
        homeless, self._homeless = self._homeless, deque()
        return list(homeless)

    def _nobody_left(self) -> bool:
        """Whether all are lost, and none is on its way back."""
        return len(self.router.lost) == len(self.engines) and not self._returning

    def _miss(self, replica: int) -> None:
        """A replica does not come back: requests that can run only with its memory are given up."""
        if self.exchange is None:
            return
        self.exchange.miss(self.engines[replica])
        for engine in self.engines:
            hopeless = [request for request in engine.requests.values() if not engine.can_run(request.scheduled)]
            engine.drop(hopeless)
            self.failed |= {each.request_id for each in self._fail(hopeless)}


def split_evenly(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Which prompts each of `parts` replicas gets when all are known beforehand: the longest first, each to whoever has least.

    The fullest has at most 4/3 of the best there is (Graham 1969, longest processing time first). accelerate's
    `split_between_processes` gives everybody as many in a row, whatever their lengths.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for number in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        least = loads.index(min(loads))
        shares[least].append(number)
        loads[least] += lengths[number]
    return shares
