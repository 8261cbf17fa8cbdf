"""Programs that are in order, however odd, run to their end: no false alarm. And what once was one, case by case."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest
import torch
import torch.distributed as dist
from helpers import gone, total

from minillm import RankError, Ranks, context
from minillm.ranks import Fault
from minillm.ranks.board import BOARD_BYTES, Board, Operation, read


def long_mix(seed: int, steps: int) -> int:
    """Collectives, subgroups, engine groups, tags, asynchronous work and messages from anyone, in a random order."""
    dice, rank, world = random.Random(seed), dist.get_rank(), dist.get_world_size()
    pair = dist.new_group([0, 1])
    for number in range(steps):
        kind = dice.choice(
            ["reduce", "broadcast", "barrier", "pair", "comm", "tag", "async", "anyone", "gather object"]
        )
        x = torch.ones(dice.choice([1, 7, 5000]))
        if kind == "reduce":
            dist.all_reduce(x, op=dice.choice([dist.ReduceOp.SUM, dist.ReduceOp.MAX]))
        elif kind == "broadcast":
            dist.broadcast(x, dice.randrange(world))
        elif kind == "barrier":
            dist.barrier()
        elif kind == "pair" and rank in (0, 1):
            dist.all_reduce(x, group=pair)
        elif kind == "comm":
            context().comm().all_reduce(x)
        elif kind == "tag" and rank < 2:
            dist.send(x, 1, tag=number) if rank == 0 else dist.recv(x, 0, tag=number)
        elif kind == "async":
            dist.all_reduce(x, async_op=True).wait()
        elif kind == "anyone" and rank < 2:
            dist.send(x, 1) if rank == 0 else dist.recv(x)
        elif kind == "gather object":
            out: list[object] = [None] * world
            dist.all_gather_object(out, rank)
    return steps


@pytest.mark.parametrize("seed", range(4))
def test_long_healthy_programs(ranks4: Ranks, seed: int) -> None:
    assert ranks4.run(long_mix, seed, 400) == [400] * 4


def test_more_groups_than_the_board_has_room_for() -> None:
    def job() -> None:
        for number in range(700):
            x = torch.ones(1)
            dist.send(x, 1, tag=number) if dist.get_rank() == 0 else dist.recv(x, 0, tag=number)
            if number % 100 == 0:
                dist.all_reduce(x)

    with Ranks(2, device="cpu", timeout_s=1) as ranks:
        ranks.run(job)
        assert ranks.run(total) == [1.0, 1.0]


def test_a_board_read_while_it_is_written() -> None:
    """No torn notice, no count that goes back, whatever the moment."""
    memory = bytearray(BOARD_BYTES)
    board = Board(memory)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            name = "all_reduce" if number % 2 else "broadcast with a long name"
            slot, _ = board.enter(Operation(name, f"[{number % 2}]", "world", "", (0, 1), f"cell:{number % 2}"))
            board.leave(slot)

    writer = threading.Thread(target=write)
    writer.start()
    ticks = 0
    for _ in range(3000):
        view = read(memory)
        assert view.ticks >= ticks
        ticks = view.ticks
        for notice in view.notices.values():
            assert notice.signature == f"[{(notice.index + 1) % 2}]"
    stop.set()
    writer.join()


def test_tensors_with_gaps_and_turned_tensors(ranks2: Ranks) -> None:
    def job() -> tuple[list[list[float]], list[list[float]]]:
        comm = context().comm()
        x, y = torch.ones(3, 4), torch.arange(6.0).reshape(2, 3).t() * (1 - comm.rank)
        comm.all_reduce(x[:, :2])
        comm.broadcast(y, root=0)
        return x.tolist(), y.tolist()

    expected = ([[2.0, 2.0, 1.0, 1.0]] * 3, torch.arange(6.0).reshape(2, 3).t().tolist())
    assert ranks2.run(job) == [expected] * 2


def test_an_engine_group_that_one_rank_never_joins(ranks2: Ranks) -> None:
    def job() -> None:
        if context().rank == 0:
            context().comm(name="lonely")

    with pytest.raises(RankError, match="rank 1 returned without calling comm named lonely"):
        ranks2.run(job)


def test_refused_arguments_that_are_caught(ranks2: Ranks) -> None:
    def job() -> float:
        try:
            dist.all_reduce("no tensor")  # type: ignore[arg-type]
        except TypeError:
            time.sleep(0.5 * dist.get_rank())
        return total()

    assert ranks2.run(job) == [1.0, 1.0]


@pytest.mark.parametrize(("peer", "shown"), [(2, "2"), (-1, "-1"), (0, "0"), (1.0, "1.0")])
def test_a_neighbour_that_does_not_exist(ranks2: Ranks, peer: object, shown: str) -> None:
    def job() -> None:
        if dist.get_rank() == 0:
            dist.send(torch.ones(1), dst=peer)  # type: ignore[arg-type]

    if peer == 1.0:
        ranks2.run(lambda: dist.send(torch.ones(1), 1) if dist.get_rank() == 0 else dist.recv(torch.ones(1), 0))
        return
    with pytest.raises(RankError, match=rf"send\(dst={shown}\) on rank 0: there is no such other rank; give one of 1"):
        ranks2.run(job)


def test_asking_is_completed_again_and_again_is_waiting(ranks2: Ranks) -> None:
    def job() -> None:
        if dist.get_rank() == 0:
            work = dist.all_reduce(torch.ones(1), async_op=True)
            while not work.is_completed():
                time.sleep(0.01)

    with pytest.raises(RankError, match="rank 1 returned without calling all_reduce"):
        ranks2.run(job)


def test_a_busy_bystander_does_not_hide_a_fault(ranks4: Ranks) -> None:
    def job() -> None:
        rank = dist.get_rank()
        if rank < 2:
            dist.recv(torch.ones(1), 1 - rank)
        while True:
            context().tick()
            time.sleep(0.01)

    with pytest.raises(RankError) as caught:
        ranks4.run(job)
    assert (caught.value.fault, caught.value.ranks) == (Fault.DEADLOCK, [0, 1])


def test_another_reduction_is_another_call(ranks2: Ranks) -> None:
    def job() -> None:
        dist.all_reduce(torch.ones(1), op=dist.ReduceOp.MAX if dist.get_rank() else dist.ReduceOp.SUM)

    with pytest.raises(RankError, match="MAX where rank 0 calls all_reduce .* SUM"):
        ranks2.run(job)


def test_the_earliest_error_is_the_cause(ranks2: Ranks) -> None:
    def job() -> None:
        time.sleep(0.3 * (1 - dist.get_rank()))
        raise KeyError(dist.get_rank())

    with pytest.raises(RankError) as caught:
        ranks2.run(job)
    assert caught.value.ranks == [1, 0]
    assert str(caught.value).startswith("rank 1 raised KeyError")


def test_an_own_error_about_sockets_is_no_consequence(ranks2: Ranks) -> None:
    def job() -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("cannot open socket file")
        dist.barrier()

    with pytest.raises(RankError, match="^rank 1 raised RuntimeError: cannot open socket file"):
        ranks2.run(job)


def test_results_that_cannot_be_sent(ranks2: Ranks) -> None:
    with pytest.raises(RankError, match="what this rank returned, a generator, cannot be sent"):
        ranks2.run(lambda: (n for n in range(3)))
    assert ranks2.run(total) == [1.0, 1.0]


def test_errors_without_a_text(ranks2: Ranks) -> None:
    def job() -> None:
        class Mute(Exception):
            def __str__(self) -> str:
                raise ValueError

        raise Mute

    with pytest.raises(RankError, match="Mute"):
        ranks2.run(job)


def test_a_destroyed_group_is_made_anew(ranks2: Ranks) -> None:
    with pytest.raises(RankError, match="leave the default group to Ranks"):
        ranks2.run(dist.destroy_process_group)
    assert ranks2.run(total) == [1.0, 1.0]


def test_printing_threads(ranks2: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> int:
        threads = [threading.Thread(target=lambda: [print("x" * 100) for _ in range(200)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(torch.ones(1_000_000))

    assert ranks2.run(job) == [1_000_000] * 2
    assert capsys.readouterr().out.count("x" * 100) == 1200


def test_the_environment_is_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILLM_TEST", "now")
    with Ranks(2, device="cpu") as ranks:
        assert ranks.run(lambda: os.environ.get("MINILLM_TEST")) == ["now", "now"]


def test_a_view_of_something_large_is_sent_alone(ranks2: Ranks) -> None:
    first, _ = ranks2.run(lambda: torch.ones(5_000_000)[:3])
    assert first.untyped_storage().nbytes() < 1000


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own kill at the end of a pipe is Linux's")
@pytest.mark.parametrize("state", ["stopped", "holding the interpreter"])
def test_even_these_ranks_end_with_a_killed_launcher(state: str) -> None:
    script = textwrap.dedent(f"""
        import ctypes, os, signal, torch.distributed as dist
        from minillm import Ranks
        ranks = Ranks(2, device="cpu", timeout_s=60)
        ranks.start()
        print(*ranks.pids, flush=True)
        def job():
            if {state == "stopped"}:
                os.kill(os.getpid(), signal.SIGSTOP)
            ctypes.PyDLL(None).sleep(60)  # without letting go of the interpreter
        ranks.run(job)
    """)
    launcher = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    pids = [int(word) for word in launcher.stdout.readline().split()]
    time.sleep(0.5)
    assert all(psutil.pid_exists(pid) for pid in pids)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    assert gone(pids)
