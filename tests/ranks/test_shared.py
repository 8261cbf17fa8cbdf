"""Collectives over shared memory: right under every interleaving, safe when somebody dies, gone without a trace."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.ranks import shared
from minillm.ranks.errors import RankError
from minillm.ranks.membership import context
from minillm.ranks.pool import Ranks
from minillm.ranks.shared import LINE, SLOT_BYTES, SharedMemory

pytestmark = pytest.mark.skipif(not shared.keeps_store_order(), reason="needs Linux on x86")


def random_sums(rounds: int) -> str:
    """On every rank: sums of random messages, with random pauses, against what everybody can work out."""
    here = context()
    comm, size = here.comm(), here.world_size
    assert comm.shared is not None
    dice, pauses = random.Random(1), random.Random(here.rank)
    for number in range(rounds):
        dtype = dice.choice([torch.float32, torch.float32, torch.bfloat16, torch.int64])
        numbers = dice.choice([0, 1, 7, 576, 4096]) if dice.random() < 0.99 else dice.randrange(SLOT_BYTES)
        parts = [
            torch.randint(-50, 50, (numbers,), generator=torch.Generator().manual_seed(size * number + rank)).to(dtype)
            for rank in range(size)
        ]
        if pauses.random() < 0.3:
            time.sleep(pauses.random() * 2e-3)
        assert comm.all_reduce(parts[here.rank].clone()).tolist() == sum(parts[1:], parts[0]).tolist(), number
        if number % 3 == 0:
            assert torch.equal(comm.all_gather(parts[here.rank]), torch.cat(parts))
        if number % 5 == 0:
            assert torch.equal(comm.broadcast(parts[here.rank].clone(), number % size), parts[number % size])
        if number % 4 == 0:
            moved(dice.choice([0, 1, 5, 100]) if number else SLOT_BYTES // 1000, dice.choice([1, 576]), number)
    return f"{comm.counts['all_reduce'].calls} sums"


def moved(most: int, width: int, seed: int) -> None:
    """An all-to-all of random splits, each of at most so many rows."""
    here = context()
    size, dice = here.world_size, random.Random(seed)
    rows = [[dice.randint(0, most) for _ in range(size)] for _ in range(size)]  # [from, to]
    said = [[torch.full((rows[a][b], width), 10.0 * a + b).int() for b in range(size)] for a in range(size)]
    send, take = rows[here.rank], [rows[other][here.rank] for other in range(size)]
    got = here.comm().all_to_all(torch.cat(said[here.rank]), send, take)
    assert torch.equal(got, torch.cat([said[other][here.rank] for other in range(size)]))


def test_sums_with_random_pauses(ranks2: Ranks, ranks4: Ranks) -> None:
    for ranks in (ranks2, ranks4):
        assert set(ranks.run(random_sums, 500)) == {"500 sums"}


def fractions() -> str:
    """On every rank: the bits of sums that rounding makes depend on the order."""
    comm, mark = context().comm(), sha256()
    dice = torch.Generator().manual_seed(context().rank)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for numbers in (1, 7, 1003, SLOT_BYTES // 4 + 5):
            total = comm.all_reduce((1e3 * torch.randn(numbers, generator=dice)).to(dtype))
            mark.update(total.view(torch.uint8).numpy().tobytes())
    return mark.hexdigest()


def test_all_ranks_get_the_same_bits(ranks2: Ranks, ranks4: Ranks) -> None:
    for ranks in (ranks2, ranks4):
        assert len(set(ranks.run(fractions))) == 1


class Gated:
    """Flags of which each look and each raising waits for its turn."""

    def __init__(self, flags: Any, gate: Any) -> None:
        self.flags, self.gate = flags, gate

    def __getitem__(self, at: int) -> int:
        self.gate()
        return self.flags[at]

    def __setitem__(self, at: int, value: int) -> None:
        self.gate()
        self.flags[at] = value


def interleave(size: int, seed: int, sums: int) -> None:
    """So many sums by threads of which one runs at a time, from flag to flag, in an order that the seed decides."""
    memory = mmap.mmap(-1, size * (LINE * 8 + 2 * SLOT_BYTES))
    dice, turn, wrong = random.Random(seed), threading.Condition(), []
    waiting: set[int] = set()
    chosen = [-1]
    left = set(range(size))

    def gate(rank: int) -> None:
        with turn:
            waiting.add(rank)
            if waiting == left:
                chosen[0] = dice.choice(sorted(waiting))
                turn.notify_all()
            turn.wait_for(lambda: chosen[0] == rank)
            chosen[0] = -1
            waiting.discard(rank)

    def rank_does(rank: int) -> None:
        try:
            mine = SharedMemory(memory, rank, [os.pidfd_open(os.getpid()) for _ in range(size)], 60.0)
            mine.flags = Gated(mine.flags, lambda: gate(rank))  # type: ignore[assignment]
            for number in range(sums):
                part = torch.full((3,), float(10**rank * (number + 1)))
                slots = mine.exchange(part, 1)
                gate(rank)  # others may go on before this one has read
                if slots.sum(0).tolist() != [float((number + 1) * sum(10**other for other in range(size)))] * 3:
                    wrong.append((rank, number, slots.tolist()))
            for descriptor in mine.lives:
                os.close(descriptor)
        except BaseException as error:
            wrong.append((rank, -1, repr(error)))
        with turn:
            left.discard(rank)
            if left and waiting == left:
                chosen[0] = dice.choice(sorted(waiting))
                turn.notify_all()

    threads = [threading.Thread(target=rank_does, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [] and not any(thread.is_alive() for thread in threads)


def test_a_thousand_interleavings() -> None:
    for seed in range(1000):
        interleave(size=2 + seed % 3, seed=seed, sums=3)


def test_in_and_out_of_inference_mode(ranks2: Ranks) -> None:
    """What is kept from a call within it serves calls outside, and the other way round."""

    def sums() -> list[float]:
        comm = context().comm(name="modes")
        with torch.inference_mode():
            inside = torch.ones(3)
            first = [float(comm.all_reduce(torch.ones(3))[0]) for _ in range(2)]
        assert comm.all_reduce(inside)[0] == 2 and comm.broadcast(inside, 0)[0] == 2
        then = [float(comm.all_reduce(torch.ones(3))[0]) for _ in range(2)]
        with torch.inference_mode():
            return [*first, *then, float(comm.all_gather(torch.ones(3)).sum())]

    assert ranks2.run(sums) == [[2.0, 2.0, 2.0, 2.0, 6.0]] * 2


def test_messages_of_different_sizes_are_named(ranks2: Ranks) -> None:
    with pytest.raises(RankError, match=r"gives \d bytes, rank . \d|disagree|shape|\[1\]"):
        ranks2.run(lambda: context().comm().all_reduce(torch.zeros(1 + context().rank)))
    assert ranks2.run(lambda: 1) == [1, 1]


def test_splits_that_do_not_fit_each_other_are_named(ranks2: Ranks) -> None:
    with pytest.raises(RankError, match="rank 1 of the group sends 2 rows to rank 0, which waits for 3"):
        ranks2.run(lambda: context().comm().all_to_all(torch.zeros(4, 2), [2, 2], [2, 3 - context().rank]))
    assert ranks2.run(lambda: 1) == [1, 1]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.zeros(SLOT_BYTES), torch.zeros(SLOT_BYTES // 2)),  # of as many bytes each, part by part
        (torch.zeros(4), torch.zeros(8, dtype=torch.bfloat16)),
        (torch.zeros(1), None),
    ],
)
def test_different_calls_are_noticed_before_anything_is_added(first: torch.Tensor, second: torch.Tensor | None) -> None:
    """Where no notice boards are compared, as under torchrun: by the memory itself."""
    memory, said = mmap.mmap(-1, 2 * (LINE * 8 + 2 * SLOT_BYTES)), []

    def rank_does(rank: int) -> None:
        mine = SharedMemory(memory, rank, [os.pidfd_open(os.getpid()) for _ in range(2)], 2.0)
        try:
            if rank == 0:
                mine.all_reduce(first)
            elif second is not None:
                mine.all_reduce(second)
            else:
                mine.broadcast(torch.zeros(1), 0)
        except ValueError as error:
            said.append(str(error))

    threads = [threading.Thread(target=rank_does, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(said) == 2 and all("of the group is in another collective, of " in text for text in said)


def test_what_one_rank_cannot_have_nobody_has() -> None:
    """A sandbox that forbids a call, on one rank: all go by gloo, and nobody hangs."""

    def without(call: str, where: int) -> tuple[bool, float]:
        def refused(*_: Any) -> None:
            raise PermissionError("not here")

        if context().rank == where:
            setattr(os, call, refused)
        comm = context().comm(name=f"without {call} on {where}")
        return comm.shared is None, float(comm.all_reduce(torch.ones(1)))

    with Ranks(2, device="cpu", timeout_s=5) as ranks:
        for call, where in (("pidfd_open", 1), ("memfd_create", 0), ("ftruncate", 0)):
            assert ranks.run(without, call, where) == [(True, 2.0)] * 2


def test_a_killed_rank_leaves_nobody_waiting() -> None:
    with Ranks(3, device="cpu", timeout_s=1) as ranks:
        ranks.start()
        pids = ranks.pids

        def wait_for_one() -> None:
            here = context()
            here.comm().barrier()
            if here.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            here.comm().all_reduce(torch.zeros(576))

        with pytest.raises(RankError, match="rank 1"):
            ranks.run(wait_for_one)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        assert ranks.run(lambda: float(context().comm().all_reduce(torch.ones(1)))) == [3.0] * 3


def test_switched_off_or_not_trusted_gloo_carries_all(ranks2: Ranks) -> None:
    def untrusted() -> tuple[bool, float]:
        if context().rank == 1:
            shared.keeps_store_order = lambda: False
        comm = context().comm(name="one rank does not trust it")
        return comm.shared is None, float(comm.all_reduce(torch.ones(1)))

    with Ranks(2, device="cpu", timeout_s=1) as ranks:
        assert ranks.run(untrusted) == [(True, 2.0)] * 2
    with Ranks(2, device="cpu", timeout_s=1, shared_memory=False) as ranks:
        assert ranks.run(lambda: context().comm().shared is None) == [True, True]
    assert ranks2.run(lambda: context().comm().shared is None) == [False, False]


ALONE = """
import os, sys, time, torch, torch.distributed as dist
from minillm.ranks.shared import open_shared
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, is_master=False)
memory = open_shared(store, rank, 2, 600.0)
x = torch.ones(4)
memory.all_reduce(x)
print(int(x[0]), [line.split()[-2:] for line in open("/proc/self/maps") if "minillm" in line][0], flush=True)
if rank == 1:
    time.sleep(600)
try:
    memory.all_reduce(x)
except ConnectionError as error:
    print(error, flush=True)
"""


def test_without_a_launcher_a_death_is_noticed_and_nothing_is_left() -> None:
    """Processes that nobody watches, as under torchrun: the one that waits says who is gone."""
    before = sorted(os.listdir("/dev/shm"))
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        subprocess.Popen([sys.executable, "-c", ALONE, str(rank), str(store.port)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "2 ['/memfd:minillm', '(deleted)']\n"
        os.kill(processes[1].pid, signal.SIGKILL)
        out, _ = processes[0].communicate(timeout=10)
        assert out == "rank 1 of the group has ended\n"
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert sorted(os.listdir("/dev/shm")) == before
