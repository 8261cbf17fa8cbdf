"""Instances that borrow: all requests end, whatever the order of events, and ledger and pools agree at every moment."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.policy.batch import Batch
from minillm.policy.blocks import AWAY, BlockPool
from minillm.policy.lending import RManager
from minillm.policy.loans import Ask, CalledBack, Returned, Unclaimed
from minillm.policy.options import EngineOptions
from minillm.policy.planning import GManager
from minillm.policy.request import ScheduledRequest
from minillm.policy.scheduler import Scheduler
from tests.helpers import EXAMPLES

SIZE = 4  # tokens of a block


class Site:
    """An instance without a model: for each block, whose tokens are in it."""

    def __init__(self, number: int, blocks: int, most_lent: int, on_demand: bool, max_running: int) -> None:
        options = EngineOptions(
            block_size=SIZE, num_blocks=blocks, max_running=max_running, max_step_tokens=max_running + 4
        )
        self.scheduler = Scheduler(BlockPool(blocks, SIZE), options)
        self.manager = RManager(number, self.scheduler, most_lent, on_demand)
        self.content: dict[tuple[int, int], tuple[int, int]] = {}  # (block, offset) -> (request, position)
        self.letters: list[tuple[int, object]] = []  # that are under way to it: who wrote, and what


class Cluster:
    """Instances that step in any order, and whose letters arrive in order, but at any time."""

    def __init__(self, sizes: list[int], most_lent: list[int], on_demand: bool, max_running: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.sites = {
            number: Site(number, blocks, cap, on_demand, max_running)
            for number, (blocks, cap) in enumerate(zip(sizes, most_lent))
        }
        for number, site in self.sites.items():
            site.scheduler.beyond = sum(each.manager.most_lent for n, each in self.sites.items() if n != number)
        self.manager = GManager(self.sites, SIZE)
        self.now = 0.0
        self.finished: set[int] = set()
        self.lent = self.returned = 0

    def beat(self) -> None:
        for site in self.sites.values():
            self.manager.heartbeat(site.manager.heartbeat())
        for number, site in self.sites.items():
            site.manager.view = {other: room for other, room in self.manager.view().items() if other != number}
        for move in self.manager.plan():
            self.sites[move.debtor].manager.move_kvcache(move.request_id, move.blocks, move.creditor)

    def deliver(self, number: int, some: bool) -> None:
        """Letters to an instance; `some` only."""
        site = self.sites[number]
        count = self.random.randint(0, len(site.letters)) if some else len(site.letters)
        arrived, site.letters = site.letters[:count], site.letters[count:]
        for sender, letter in arrived:
            if sender not in self.sites:
                continue
            if isinstance(letter, Returned):
                site.manager.take_back(sender, letter.away.blocks)
            elif isinstance(letter, Unclaimed):
                site.manager.unclaimed(sender)
            else:
                assert isinstance(letter, CalledBack)
                site.manager.called_back(sender, letter)

    def step(self, number: int) -> None:
        site = self.sites[number]
        self.now += 0.01
        for ask in site.manager.asks(self.now):
            creditor = self.sites.get(ask.creditor)
            if creditor is not None:
                self.deliver(ask.creditor, some=False)  # one wire: what was sent before comes before
                granted = creditor.manager.try_move_kvcache(number, ask, self.now)
                assert ask.firm <= (len(granted) in (0, ask.blocks))
                if not site.manager.granted(ask, granted) and ask.firm:
                    break
        site.manager.settle()
        self.post(number)
        batch = site.scheduler.schedule(self.now)
        if batch.chunks or site.manager.pending:
            moves = site.manager.moves()
            self.lent += sum(len(move.blocks) for move in moves if not move.home)
            self.returned += sum(len(move.blocks) for move in moves if move.home)
            self.compute(number, batch, moves)
            site.scheduler.postprocess(batch, [1 if chunk.samples else None for chunk in batch.chunks])
            site.manager.landed(moves)
            for chunk in batch.chunks:
                request = site.scheduler.requests[chunk.request_id]
                if len(request.tokens) >= request.longest:
                    site.scheduler.remove(chunk.request_id)
                    self.finished.add(chunk.request_id)
        self.post(number)

    def post(self, number: int) -> None:
        for notice in self.sites[number].manager.notices():
            if isinstance(notice, Returned):
                to = notice.away.creditor
            else:
                to = notice.debtor if isinstance(notice, CalledBack) else notice.creditor
            if to in self.sites:
                self.sites[to].letters.append((number, notice))

    def compute(self, number: int, batch: Batch, moves: tuple) -> None:
        """Move and write as the ranks do, and see that every token finds all tokens before it."""
        site = self.sites[number]
        for move in moves:
            there = self.sites[move.away.creditor].content
            for mine, theirs in zip(move.blocks, move.away.blocks):
                for offset in range(SIZE):
                    if move.home:
                        site.content[mine, offset] = there[theirs, offset]
                    else:
                        there[theirs, offset] = site.content[mine, offset]
        for chunk in batch.chunks:
            for position in range(chunk.start, chunk.end):
                block = chunk.block_table[position // SIZE]
                assert block != AWAY
                site.content[block, position % SIZE] = (chunk.request_id, position)
            away = [(each.creditor, block) for each in chunk.away for block in each.blocks]
            for position in range(chunk.end):
                place = position // SIZE
                where = away[place] if place < len(away) else (number, chunk.block_table[place])
                assert (chunk.block_table[place] == AWAY) == (place < len(away))
                found = self.sites[where[0]].content[where[1], position % SIZE]
                assert found == (chunk.request_id, position), "somebody has written over a block"

    def kill(self, number: int) -> list[ScheduledRequest]:
        """An instance is lost; returns what it had under way."""
        stranded = list(self.sites.pop(number).scheduler.requests.values())
        self.manager.leave(number)
        for site in self.sites.values():
            site.manager.lost(number)
            site.manager.over()
            site.scheduler.beyond = sum(e.manager.most_lent for e in self.sites.values() if e is not site)
        return stranded

    def check(self) -> None:
        """What creditors have lent is what debtors hold, have returned, or have under way."""
        for creditor, site in self.sites.items():
            pool, manager = site.scheduler.pool, site.manager
            assert manager.num_lent <= manager.most_lent
            own: Counter[int] = Counter()
            for request in site.scheduler.requests.values():
                if request.table is not None:
                    own.update(block for block in request.table.blocks if block != AWAY)
            own.update(block for blocks in manager.lent.values() for block in blocks)
            assert own == Counter({block: count for block, count in enumerate(pool.references) if count})
            assert all(count == 1 for count in own.values()), "a block has two holders"
            for debtor, other in self.sites.items():
                if debtor == creditor:
                    continue
                held = [away for request in other.scheduler.requests.values() if request.table is not None
                        for away in (*request.table.away, *request.table.reserved)]  # fmt: skip
                held += other.scheduler.pool.returned
                held += [
                    letter.away for sender, letter in site.letters if sender == debtor and isinstance(letter, Returned)
                ]
                books = sorted(block for away in held if away.creditor == creditor for block in away.blocks)
                assert books == sorted(manager.lent.get(debtor, [])), "ledger and pool disagree"


cases = st.fixed_dictionaries({
    "sizes": st.lists(st.integers(3, 12), min_size=2, max_size=4),
    "caps": st.lists(st.integers(0, 12), min_size=4, max_size=4),
    "on_demand": st.booleans(),
    "max_running": st.integers(1, 6),
    "requests": st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90), st.integers(1, 30)), min_size=1, max_size=10),
    "seed": st.integers(0, 10**6),
    "kills": st.integers(0, 2),
})  # fmt: skip


@given(cases)
@settings(max_examples=EXAMPLES)
def test_all_requests_end_in_any_order_of_events(case) -> None:
    sizes = case["sizes"]
    cluster = Cluster(sizes, case["caps"], case["on_demand"], case["max_running"], case["seed"])
    kills = case["kills"]
    wanted = set()
    for number, (home, prompt, most_new) in enumerate(case["requests"]):
        request = ScheduledRequest(number, [0] * prompt, prompt + most_new, arrival_s=number / 7)
        try:
            cluster.sites[home % len(sizes)].scheduler.add(request)
        except ValueError:
            continue  # longer than all pools together, as far as they lend
        wanted.add(number)
    for turn in range(6000):
        if cluster.finished >= wanted:
            break
        if turn % 5 == 0:
            cluster.beat()
        number = cluster.random.choice(sorted(cluster.sites))
        cluster.deliver(number, some=cluster.random.random() < 0.5)
        cluster.step(number)
        cluster.check()
        if kills and len(cluster.sites) > 1 and cluster.random.random() < 0.02:
            kills -= 1
            stranded = cluster.kill(cluster.random.choice(sorted(cluster.sites)))
            wanted -= {request.request_id for request in stranded}
            for site in cluster.sites.values():  # those too long for what is left
                for request in list(site.scheduler.requests.values()):
                    if (
                        site.scheduler.pool.blocks_for(request.most_cached)
                        > site.scheduler.pool.num_blocks + site.scheduler.beyond
                    ):
                        site.scheduler.remove(request.request_id)
                        wanted.discard(request.request_id)
    assert cluster.finished >= wanted, f"still waiting: {wanted - cluster.finished}"
    for _ in range(3):  # the last letters
        for number in sorted(cluster.sites):
            cluster.post(number)
            cluster.deliver(number, some=False)
    cluster.check()
    assert all(site.scheduler.pool.num_used == 0 for site in cluster.sites.values()), "a block has leaked"


def run(cluster: Cluster, turns: int = 400) -> None:
    for turn in range(turns):
        if not any(site.scheduler.has_work for site in cluster.sites.values()):
            return
        if turn % 3 == 0:
            cluster.beat()
        for number in sorted(cluster.sites):
            cluster.deliver(number, some=False)
            cluster.step(number)
            cluster.check()
    raise AssertionError("somebody waits for ever")


@pytest.mark.parametrize("on_demand", [True, False])
def test_a_request_longer_than_its_pool_borrows(on_demand) -> None:
    cluster = Cluster([10, 10], [8, 8], on_demand, 4, 0)
    cluster.sites[0].scheduler.add(ScheduledRequest(1, [0] * 60, 72))
    run(cluster)
    assert cluster.finished == {1} and cluster.lent >= 8


def test_two_long_requests_that_need_each_others_memory_take_turns() -> None:
    cluster = Cluster([10, 10], [10, 10], True, 4, 0)
    for number in (0, 1):
        cluster.sites[number].scheduler.add(ScheduledRequest(number, [0] * 50, 68, arrival_s=number))
    run(cluster)
    assert cluster.finished == {0, 1}


def test_a_creditor_that_needs_its_memory_gets_it_back() -> None:
    cluster = Cluster([10, 10], [10, 10], True, 8, 0)
    for number in range(3):  # together more than ten blocks
        cluster.sites[0].scheduler.add(ScheduledRequest(number, [0] * 14, 38, arrival_s=number))
    for _ in range(12):
        cluster.beat()
        cluster.step(0)
    creditor = cluster.sites[1].manager
    assert creditor.num_lent > 2
    cluster.sites[1].scheduler.add(ScheduledRequest(9, [0] * 38, 40, arrival_s=9))
    for _ in range(3):
        for number in (1, 0):
            cluster.deliver(number, some=False)
            cluster.step(number)
            cluster.check()
    cluster.deliver(1, some=False)
    cluster.step(1)
    assert (
        creditor.num_lent == 0
        and 9 in {each.request_id for each in cluster.sites[1].scheduler.running} | cluster.finished
    )
    run(cluster)
    assert cluster.finished == {0, 1, 2, 9}


def test_with_a_cap_of_zero_nobody_borrows_and_long_requests_are_refused() -> None:
    cluster = Cluster([10, 10], [0, 0], True, 4, 0)
    with pytest.raises(
        ValueError, match=r"room for 71 tokens, but the KV cache has room for 40 in all \(10 blocks of 4\)"
    ):
        cluster.sites[0].scheduler.add(ScheduledRequest(1, [0] * 60, 72))
    for number in range(3):
        cluster.sites[0].scheduler.add(ScheduledRequest(number, [0] * 14, 30))
    run(cluster)
    assert cluster.lent == 0


def test_a_sequence_longer_than_all_pools_together_is_refused() -> None:
    cluster = Cluster([10, 10], [8, 8], True, 4, 0)
    message = r"room for 72 in all \(10 blocks of 4, and 8 that others may lend\)"
    with pytest.raises(ValueError, match=message):
        cluster.sites[0].scheduler.add(ScheduledRequest(1, [0] * 73, 80))
    with pytest.raises(ValueError, match="one sample alone"):
        cluster.sites[0].scheduler.add(ScheduledRequest(1, [0] * 60, 70, samples=2))
    assert not cluster.sites[0].scheduler.has_work


def test_a_creditor_that_is_short_refuses() -> None:
    site = Site(0, 6, 6, True, 4)
    site.scheduler.add(ScheduledRequest(0, [0] * 10, 12))
    assert site.manager.try_move_kvcache(1, Ask(0, 7, 2, (0.0, 0.0, 7)), 0.0) == ()  # its own request waits
    site.scheduler.schedule(0.0)
    granted = site.manager.try_move_kvcache(1, Ask(0, 7, 9, (0.0, 0.0, 7)), 0.0)
    assert len(granted) == 2  # of four that are free, two stay for the request that runs
    site.manager.take_back(1, granted)
    assert site.manager.num_lent == 0 and site.scheduler.pool.num_free == 4
