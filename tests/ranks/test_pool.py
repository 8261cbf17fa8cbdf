"""The pool: calls, cells, prints, events, results, and what each kind of failure says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
import torch.distributed as dist
from helpers import gone, total

from minillm import RankError, Ranks, context
from minillm.ranks import Fault


def test_results_come_in_rank_order(ranks4: Ranks) -> None:
    assert ranks4.run(lambda: dist.get_rank()) == [0, 1, 2, 3]
    assert ranks4.run(total) == [6.0] * 4


def test_functions_close_over_their_surroundings(ranks4: Ranks) -> None:
    factor = 3
    assert ranks4.run(lambda a, b=1: factor * a + b + context().rank, 2, b=5) == [11, 12, 13, 14]


def test_tensors_come_back_whole(ranks2: Ranks) -> None:
    first, second = ranks2.run(lambda: torch.arange(6).reshape(2, 3) + context().rank)
    assert torch.equal(second, first + 1)


def test_lines_come_in_rank_order(ranks4: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    def talk() -> None:
        time.sleep(0.02 * (3 - context().rank))
        print("one\ntwo", end="")

    ranks4.run(talk)
    assert capsys.readouterr().out == "".join(f"rank {r}: one\nrank {r}: two\n" for r in range(4))


def test_lines_stream_while_the_call_runs(ranks2: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    def talk() -> None:
        time.sleep(0.1 * (1 - context().rank))
        print("here")

    ranks2.run(talk, stream=True)
    assert capsys.readouterr().out == "rank 1: here\nrank 0: here\n"


def test_events_arrive_while_the_call_runs(ranks2: Ranks) -> None:
    seen: list[tuple[int, str]] = []
    ranks2.run(lambda: context().emit("now"), on_event=lambda rank, event: seen.append((rank, event)))
    assert sorted(seen) == [(0, "now"), (1, "now")]


def test_cells_share_a_namespace(ranks2: Ranks) -> None:
    ranks2.run_cell("x = torch.ones(2) * rank")
    assert [t.tolist() for t in ranks2.run_cell("dist.all_reduce(x)\nx")] == [[1.0, 1.0]] * 2


def test_raising_rank_is_named_and_the_others_places_too(ranks4: Ranks) -> None:
    def job() -> None:
        if dist.get_rank() == 1:
            raise ValueError("no such layer")
        dist.barrier()

    with pytest.raises(RankError) as caught:
        ranks4.run(job)
    error = caught.value
    assert (error.fault, error.ranks) == (Fault.RAISED, [1])
    assert str(error).startswith("rank 1 raised ValueError: no such layer\n")
    assert set(error.waiting) == {0, 2, 3}
    assert all("barrier" in text and "dist.barrier()" in text for text in error.waiting.values())
    assert ranks4.run(total) == [6.0] * 4


def test_an_error_on_all_ranks_keeps_them_alive(ranks2: Ranks) -> None:
    ranks2.run_cell("kept = 7")
    pids = ranks2.pids
    with pytest.raises(RankError, match="ranks 0 and 1 raised ZeroDivisionError"):
        ranks2.run(lambda: 1 // 0)
    assert ranks2.pids == pids
    assert ranks2.run_cell("kept") == [7, 7]


def test_killed_between_calls(ranks2: Ranks) -> None:
    ranks2.run(total)
    os.kill(ranks2.pids[1], signal.SIGKILL)
    with pytest.raises(RankError, match="rank 1 died: killed by SIGKILL") as caught:
        ranks2.run(total)
    assert caught.value.ranks == [1]
    assert ranks2.run(total) == [1.0, 1.0]


def test_progress_renews_patience(ranks2: Ranks) -> None:
    """A rank that gets on for longer than `timeout_s` is not late."""

    def job() -> None:
        if context().rank == 0:
            for _ in range(15):
                time.sleep(0.1)
                context().tick()
        dist.barrier()

    ranks2.run(job)


def test_waits_that_no_board_shows_end_too(ranks2: Ranks) -> None:
    def job() -> None:
        import torch.distributed._functional_collectives as functional

        if dist.get_rank() == 0:
            functional.all_reduce(torch.ones(2), "sum", dist.group.WORLD).sum().item()
        else:
            time.sleep(60)

    with pytest.raises(RankError) as caught:
        ranks2.run(job)
    assert caught.value.ranks == [1]


def test_circle_of_receives_is_a_deadlock(ranks4: Ranks) -> None:
    def ring() -> None:
        x, rank = torch.zeros(2), dist.get_rank()
        dist.recv(x, (rank - 1) % 4)
        dist.send(x, (rank + 1) % 4)

    with pytest.raises(RankError) as caught:
        ranks4.run(ring)
    assert caught.value.fault is Fault.DEADLOCK
    assert caught.value.waits_for == {0: [3], 1: [0], 2: [1], 3: [2]}


def test_asynchronous_work_is_watched(ranks2: Ranks) -> None:
    def job() -> float:
        x = torch.ones(2)
        work = dist.all_reduce(x, async_op=True)
        work.wait()
        right = dist.isend(x, 1 - dist.get_rank())
        dist.recv(x, 1 - dist.get_rank())
        right.wait()
        return x[0].item()

    assert ranks2.run(job) == [2.0, 2.0]

    def forgets() -> None:
        if dist.get_rank() == 0:
            dist.all_reduce(torch.ones(2), async_op=True).wait()

    with pytest.raises(RankError, match="rank 1 returned without calling all_reduce"):
        ranks2.run(forgets)


def test_batched_sends_and_receives_work(ranks2: Ranks) -> None:
    def job() -> float:
        mine, theirs, peer = torch.ones(2) * dist.get_rank(), torch.zeros(2), 1 - dist.get_rank()
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)]):
            work.wait()
        return theirs[0].item()

    assert ranks2.run(job) == [1.0, 0.0]


def test_subgroups_and_objects_are_watched(ranks4: Ranks) -> None:
    def job() -> list[object]:
        pair = dist.new_group([1, 3])
        if dist.get_rank() in (1, 3):
            dist.all_reduce(torch.ones(1), group=pair)
        out: list[object] = [None] * 4
        dist.all_gather_object(out, {"rank": dist.get_rank()})
        return out

    assert ranks4.run(job) == [[{"rank": r} for r in range(4)]] * 4


def test_stop_button_says_where_everyone_stood() -> None:
    with Ranks(2, device="cpu") as ranks:
        ranks.start()
        pids = ranks.pids
        timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt, match=r"rank 0  waits in barrier(.|\n)*rank 1  runs .*sleep"):
            ranks.run(lambda: time.sleep(60) if dist.get_rank() else dist.barrier())
        assert gone(pids)
        assert ranks.run(total) == [1.0, 1.0]


@pytest.mark.parametrize("end", ["killed, idle", "killed, busy", "normal"])
def test_ranks_end_with_their_launcher(end: str) -> None:
    script = textwrap.dedent(f"""
        import time, torch.distributed as dist
        from minillm import Ranks
        ranks = Ranks(2, device="cpu", timeout_s=60)
        ranks.start()
        print(*ranks.pids, flush=True)
        if "busy" in {end!r}:
            ranks.run(lambda: dist.barrier() if dist.get_rank() else time.sleep(60))
        if "idle" in {end!r}:
            time.sleep(60)
    """)
    launcher = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    pids = [int(word) for word in launcher.stdout.readline().split()]
    time.sleep(0.3)
    if "killed" in end:
        launcher.kill()
    launcher.wait(10)
    assert len(pids) == 2
    assert gone(pids)


def test_ranks_end_with_a_restarted_kernel() -> None:
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel()
    try:
        code = "from minillm import Ranks; r = Ranks(2, device='cpu'); r.start(); r.pids"
        pids: list[int] = []
        client.execute_interactive(
            code, timeout=60, output_hook=lambda m: pids.extend(eval(m["content"].get("data", {}).get("text/plain", "[]")))
        )  # fmt: skip
        assert len(pids) == 2
        manager.restart_kernel(now=True)
        assert gone(pids)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_twenty_pools_do_not_meet() -> None:
    pools = [Ranks(2, device="cpu") for _ in range(20)]
    try:
        for pool in pools:
            pool.start()
        assert len({pid for pool in pools for pid in pool.pids}) == 40
        with ThreadPoolExecutor(20) as threads:
            totals = list(threads.map(lambda pool: pool.run(total), pools))
        assert totals == [[1.0, 1.0]] * 20
    finally:
        for pool in pools:
            pool.close()


def test_only_the_loopback_interface_is_listened_on(ranks2: Ranks) -> None:
    ranks2.run(total)
    for pid in [os.getpid(), *ranks2.pids]:
        listening = [c.laddr.ip for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert set(listening) <= {"127.0.0.1", "::1"}, listening


def test_one_call_at_a_time(ranks2: Ranks) -> None:
    thread = threading.Thread(target=lambda: ranks2.run(time.sleep, 0.5))
    thread.start()
    time.sleep(0.2)
    with pytest.raises(RuntimeError, match="busy with another call"):
        ranks2.run(total)
    thread.join()
    assert ranks2.run(total) == [1.0, 1.0]


def test_without_a_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.ranks.process.start_method", lambda: "spawn")
    with Ranks(2, device="cpu") as ranks:
        assert ranks.run(total) == [1.0, 1.0]


def test_a_script_without_main_guard_runs_once(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from minillm import Ranks\nprint('once')\nwith Ranks(2, device='cpu') as r: print(r.run(lambda: 1))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["once", "[1, 1]"], done.stderr


def test_close_leaves_nothing() -> None:
    with Ranks(2, device="cpu") as ranks:
        ranks.start()
        pids = ranks.pids
    assert gone(pids)
    with pytest.raises(ValueError, match="closed"):
        ranks.run(total)


@pytest.mark.parametrize("size", [0, -1, 2.0, "2", True, 1000])
def test_bad_sizes(size: object) -> None:
    with pytest.raises(ValueError, match="world_size"):
        Ranks(size)  # type: ignore[arg-type]


def test_ranks_inside_a_rank(ranks2: Ranks) -> None:
    with pytest.raises(RankError, match="a rank cannot start ranks of its own"):
        ranks2.run(lambda: Ranks(2))


def test_bad_device() -> None:
    with pytest.raises(ValueError, match="choose one of cpu, cuda"):
        Ranks(2, device="tpu")


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
        ],
    ],
    ids=["torchrun", "accelerate"],
)
def test_the_same_context_under_launchers(tmp_path, launcher: list[str]) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist\nfrom minillm import context\nhere = context()\n"
        "x = here.comm().all_reduce(torch.ones(2))\ndist.all_reduce(x)\n"
        "sys.stdout.write(f'{here.rank}/{here.world_size} {x[0].item()}\\n')\n"
    )
    done = subprocess.run([sys.executable, *launcher, str(script)], capture_output=True, text=True, timeout=120)
    assert sorted(done.stdout.split("\n")) == ["", "0/2 4.0", "1/2 4.0"], done.stderr


def test_a_call_has_a_limit_if_its_caller_wants_one(ranks2: Ranks) -> None:
    """Ranks that compute for ever and wait for nobody are ended, and the error says where they stood."""

    def endless() -> None:
        while True:
            pass

    ranks2.start()
    pids = ranks2.pids
    began = time.monotonic()
    with pytest.raises(RankError, match="the call was ended after 0.5 s, its limit") as caught:
        ranks2.run(endless, limit_s=0.5)
    assert time.monotonic() - began < 5
    assert "while True" in str(caught.value) or "pass" in str(caught.value)
    assert gone(pids)
    assert ranks2.run(total, limit_s=30) == [1.0, 1.0]


def test_what_only_seemed_a_failure_hides_nobody_who_is_late(ranks2: Ranks) -> None:
    call = ranks2.begin(lambda: dist.barrier() if dist.get_rank() else time.sleep(60))
    call._job._note_failure()
    with pytest.raises(RankError) as caught:
        call.result()
    assert caught.value.fault is Fault.LATE and caught.value.ranks == [0]
