"""The engine's collectives: right, counted, and refusing what does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import RankError, Ranks, context


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 5), columns=st.integers(1, 7))
def test_collectives_equal_their_definition(ranks4: Ranks, seed: int, rows: int, columns: int) -> None:
    def job() -> dict[str, torch.Tensor]:
        comm = context().comm()
        mine = torch.randn(4 * rows, columns, generator=torch.Generator().manual_seed(seed + comm.rank))
        out = {"mine": mine, "sum": comm.all_reduce(mine.clone()), "gather": comm.all_gather(mine)}
        out["scatter"] = comm.reduce_scatter(mine)
        out["from 2"] = comm.broadcast(mine.clone(), root=2)
        sizes = [(comm.rank + peer + seed) % 3 for peer in range(4)]
        out["all_to_all"] = (
            comm.all_to_all(mine.repeat(3, 1)[: sum(sizes)].contiguous(), sizes, sizes)
            if sum(sizes) <= 12 * rows
            else mine
        )
        return out

    results = ranks4.run(job)
    all_mine = [r["mine"] for r in results]
    total = sum(all_mine)
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["sum"], total)
        assert torch.equal(result["gather"], torch.cat(all_mine))
        torch.testing.assert_close(result["scatter"], total.chunk(4)[rank])
        assert torch.equal(result["from 2"], all_mine[2])


def test_send_and_recv(ranks4: Ranks) -> None:
    def job() -> float:
        comm = context().comm()
        x = torch.tensor([float(comm.rank)])
        if comm.rank % 2 == 0:
            comm.send(x, comm.rank + 1)
            return -1.0
        return comm.recv(x, comm.rank - 1).item()

    assert ranks4.run(job) == [-1.0, 0.0, -1.0, 2.0]


def test_counts_are_calls_and_message_bytes(ranks4: Ranks) -> None:
    def job() -> dict[str, tuple[int, int]]:
        comm = context().comm(name="counted")
        comm.all_reduce(torch.ones(10))
        comm.all_reduce(torch.ones(10))
        comm.broadcast(torch.ones(3, dtype=torch.float64), root=1)
        comm.barrier()
        return {name: (count.calls, count.bytes) for name, count in comm.counts.items()}

    results = ranks4.run(job)
    assert results[0] == {"all_reduce": (2, 80), "broadcast": (1, 0), "barrier": (1, 0)}
    assert results[1]["broadcast"] == (1, 24)


def test_a_group_of_some_ranks_leaves_the_rest_alone(ranks4: Ranks) -> None:
    def job() -> float:
        if context().rank in (1, 3):
            return context().comm((1, 3)).all_reduce(torch.tensor([float(context().rank)])).item()
        return 0.0

    assert ranks4.run(job) == [0.0, 4.0, 0.0, 4.0]


def test_a_forgotten_engine_collective_has_a_name(ranks4: Ranks) -> None:
    def job() -> None:
        comm = context().comm()
        if comm.rank != 3:
            comm.all_gather(torch.ones(2))

    with pytest.raises(RankError, match=r"rank 3 returned without calling all_gather \[2\] float32"):
        ranks4.run(job)


def test_splits_that_do_not_fit(ranks2: Ranks) -> None:
    with pytest.raises(RankError, match="reduce_scatter of 3 rows over 2 ranks: give a multiple of 2"):
        ranks2.run(lambda: context().comm().reduce_scatter(torch.ones(3)))
    with pytest.raises(RankError, match="for 3 rows"):
        ranks2.run(lambda: context().comm().all_to_all(torch.ones(3), [1, 1], [1, 1]))


def test_context_outside_a_rank() -> None:
    with pytest.raises(RuntimeError, match="this process is no rank"):
        context()


def test_messages_go_while_the_rank_goes_on(ranks4: Ranks) -> None:
    """Round the ring, all sends and receives started before any is waited for; `done` needs no wait."""

    def job() -> tuple[float, bool, bool]:
        comm = context().comm(name="ring", host=True)
        after, before = (comm.rank + 1) % 4, (comm.rank - 1) % 4
        coming = [comm.irecv(torch.zeros(1000), before) for _ in range(3)]
        going = [comm.isend(torch.full((1000,), float(comm.rank + 10 * n)), after) for n in range(3)]
        got = sum(transfer.wait()[-1].item() for transfer in coming)
        for transfer in going:
            transfer.wait()
        ended = [transfer.ended_s for transfer in coming]
        return got, all(transfer.done for transfer in coming + going), ended == sorted(ended)

    assert ranks4.run(job) == [(30.0 + 3 * ((rank - 1) % 4), True, True) for rank in range(4)]


def test_a_call_under_way_takes_posts(ranks4: Ranks) -> None:
    """What is posted reaches its rank within the call, or in the next one; other calls are refused meanwhile."""

    def echo() -> list[str]:
        got: list[str] = []
        while "end" not in got:
            got += context().posted(timeout_s=5.0 if context().rank == 2 else 0.0)
            if context().rank != 2:
                return got
        context().emit(len(got))
        return got

    events: list[tuple[int, int]] = []
    call = ranks4.begin(echo, on_event=lambda rank, event: events.append((rank, event)))
    assert not call.poll(0.0)
    with pytest.raises(RuntimeError, match="busy with another call"):
        ranks4.run(echo)
    for word in ("a", "b", "end"):
        ranks4.post(2, word)
    assert call.result() == [[], [], ["a", "b", "end"], []]
    assert events == [(2, 3)]
    for number in range(50):  # a call never overtakes what was posted before it
        ranks4.post(1, number)
        assert ranks4.run(lambda: context().posted())[1] == [number]


def test_a_call_under_way_fails_as_any_other(ranks4: Ranks) -> None:
    call = ranks4.begin(lambda: 1 // context().rank)
    with pytest.raises(RankError, match="ZeroDivisionError"):
        call.result()
    assert call.over
    assert ranks4.run(lambda: 1) == [1] * 4


def test_a_group_of_one_and_a_lone_number(ranks2: Ranks) -> None:
    """What needs nobody else is over at once; a tensor without dimensions is broadcast too."""

    def lonely() -> tuple[float, float]:
        here = context()
        alone = here.comm((here.rank,), name=f"alone {here.rank}")
        transfer = alone.iall_reduce(torch.ones(2))
        return float(transfer.wait().sum()), float(here.comm().broadcast(torch.tensor(float(here.rank)), root=1))

    assert ranks2.run(lonely) == [(2.0, 1.0)] * 2
