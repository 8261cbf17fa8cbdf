"""Instances that borrow of each other: the same tokens as one device, more room, and what is lost when one of them is."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from helpers import EXAMPLES
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from law import OPTIONS, WORK, check_law
from tiny import make_checkpoint

from minillm import LLM, EngineOptions, SamplingParams
from minillm.distkv.spread import answer_bytes
from minillm.engine.request import Request
from minillm.policy.router import Router
from minillm.ranks.membership import context
from minillm.trace.life import Event
from minillm.trace.trace import Kind

SHOW = [p for p in Phase if p is not Phase.shrink]
LAYOUTS = ["dp=2", "dp=3", "dp=2,tp=2", "dp=2,pp=2"]
SMALL = EngineOptions(block_size=4, num_blocks=26, max_running=8, max_step_tokens=32, borrowing=True)
LONG = SamplingParams(max_tokens=30, ignore_eos=True)
PROMPTS = [[(7 * n + 13 * i) % 250 for i in range(5 + 9 * n)] for n in range(5)]
GIANT = [(3 * i) % 250 for i in range(150)]  # with its answer 45 blocks of 4, of 26 in an instance


class First(Router):
    """All to the first instance, but for prompts that begin with 255."""

    def prefer(self, present: list[int], prompt: list[int]) -> int:
        return present[-1 if prompt[0] == 255 else 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("lending"), num_hidden_layers=3, max_position_embeddings=4096, tie_word_embeddings=True
    )


def books(instance: str, engine: int) -> tuple[int, int, dict[int, list[int]]] | None:
    """On an instance's first rank: blocks in use, blocks that others have, and whose they are."""
    borrower = context().held[instance].seats[engine].engine
    if borrower is None:
        return None
    manager = borrower.borrowing.manager
    return manager.pool.num_used, manager.num_lent, manager.lent


def told(llm: LLM) -> list[tuple[int, int]]:
    """The books of all instances, once the last letters are there."""
    for _ in range(100):
        found = []
        for engine in llm.engine.engines:
            each = engine.instance.ranks.run(books, engine.instance.name, engine.number)[0]
            found.append(each[:2])
        if not any(lent for _, lent in found):
            return found
        time.sleep(0.02)
    return found


def until_borrowed(llm: LLM, prompts: list[list[int]], params: SamplingParams, blocks: int = 1) -> list[Request]:
    """Requests that run, once the first instance has told that it has borrowed so many blocks."""
    requests = llm.prepare(prompts, params)
    llm.submit(requests)
    while True:
        llm.step()
        beat = llm.engine.engines[0].beat
        if beat and sum(entry.blocks for entry in beat.placements if not entry.local) >= blocks:
            return requests


def traffic(instance: str, engine: int) -> tuple[int, int, int]:
    """What went over this rank's links as a debtor: queries, answers, blocks."""
    links = context().held[instance].seats[engine].outfit.links._links.values()
    each = [(link.traffic.queries, link.traffic.answers, link.traffic.blocks) for link in links]
    return tuple(map(sum, zip((0, 0, 0), *each)))


@settings(deadline=None, max_examples=max(20, EXAMPLES // 2), phases=SHOW)
@given(st.sampled_from(LAYOUTS), st.booleans(), st.none() | st.integers(0, 8), st.integers(1, 3), OPTIONS, WORK)
def test_tokens_are_those_of_one_device(one, several, layout, on_demand, most_lent, at_once, options, work) -> None:
    options = replace(options, borrowing=True, on_demand=on_demand, most_lent=most_lent, move_blocks=at_once)
    check_law(one, several[layout].with_options(router=First), options, work)


@pytest.mark.parametrize("on_demand", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_room_of_others_is_used(one: LLM, several: dict[str, LLM], layout: str, on_demand: bool) -> None:
    """All run together in less memory than they take, and a request of 1.7 pools is served."""
    llm = several[layout].with_options(replace(SMALL, on_demand=on_demand), router=First)
    expected = [each.token_ids for each in one.generate(PROMPTS, LONG)]
    assert [each.token_ids for each in llm.generate(PROMPTS, LONG)] == expected
    moved = [span for span in llm.trace.spans if span.name.startswith("blocks to")]
    assert moved and all(span.kind is Kind.COMMUNICATION for span in moved)
    assert all(used == lent == 0 for used, lent in told(llm))
    assert llm.generate([GIANT], LONG)[0].token_ids == one.generate([GIANT], LONG)[0].token_ids
    assert all(used == lent == 0 for used, lent in told(llm))
    assert llm.engine.load.used_blocks == 0
    llm.close()


@pytest.mark.parametrize("layout", ["dp=2", "dp=2,tp=2", "dp=2,pp=2"])
def test_bytes_are_those_of_the_formula(several: dict[str, LLM], layout: str) -> None:
    """For each token that follows, a query goes out and an answer comes back in each layer, and nothing else."""
    llm = several[layout].with_options(SMALL, router=First)
    config, found = llm.config, []
    for tokens in (1, 21):
        before = _traffic(llm)
        llm.generate([GIANT], SamplingParams(max_tokens=tokens, ignore_eos=True))
        found.append([after - was for was, after in zip(before, _traffic(llm))])
    queries, answers = (long - short for short, long in list(zip(*found))[:2])
    assert queries + answers == 20 * config.layers * answer_bytes(config.heads, config.head_dim, 4)
    assert found[1][2] % (SMALL.block_size * 4 * config.kv_numbers_per_token) == 0  # whole blocks
    llm.close()


def _traffic(llm: LLM) -> list[int]:
    engine = llm.engine.engines[0]
    each = engine.instance.ranks.run(traffic, engine.instance.name, engine.number)
    return [sum(kind) for kind in zip(*each)]


def test_blocks_move_while_tokens_are_computed(several: dict[str, LLM]) -> None:
    llm = several["dp=2"].with_options(SMALL, router=First)
    llm.generate(PROMPTS, LONG)
    steps = [span for span in llm.trace.spans if span.kind in (Kind.DECODE, Kind.PREFILL) and span.rank == 0]
    moved = [span for span in llm.trace.spans if span.name.startswith("blocks to")]
    inside = [any(step.start_s <= span.start_s and span.step == step.step for step in steps) for span in moved]
    assert moved and all(inside)
    llm.close()


@pytest.mark.parametrize(("layout", "which"), [("dp=2", 0), ("dp=2,tp=2", 1), ("dp=2,pp=2", 1), ("dp=3", 0)])
def test_a_creditor_that_dies_costs_only_what_was_borrowed(one: LLM, folder: Path, layout: str, which: int) -> None:
    expected = [
        each.token_ids for each in one.generate([*PROMPTS, GIANT], SamplingParams(max_tokens=90, ignore_eos=True))
    ]
    options = replace(SMALL, num_blocks=64)
    with LLM(folder, layout, device="cpu", options=options, router=First) as llm, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        requests = until_borrowed(llm, [*PROMPTS, GIANT], SamplingParams(max_tokens=90, ignore_eos=True))
        pids = llm.instances[0].ranks.pids
        os.kill(llm.instances[1].ranks.pids[which], signal.SIGKILL)
        while llm.engine.requests:
            llm.step()
        assert [request.output().token_ids for request in requests] == expected
        assert llm.instances[0].ranks.pids == pids, "the debtor went too"
        again = {
            life.request_id for life in llm.trace.lives if any(what is Event.PREEMPTED for what, _ in life.moments)
        }
        assert again
        assert [each.token_ids for each in llm.generate(PROMPTS, LONG)] == [each[:30] for each in expected[:5]]


def test_a_creditor_that_stands_still_is_given_up(one: LLM, folder: Path) -> None:
    expected = [each.token_ids for each in one.generate(PROMPTS, LONG)]
    with LLM(folder, "dp=2", device="cpu", options=SMALL, router=First) as llm, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        requests = until_borrowed(llm, PROMPTS, LONG)
        pid = llm.instances[1].ranks.pids[0]
        os.kill(pid, signal.SIGSTOP)
        try:
            while llm.engine.requests:
                llm.step()
        finally:
            os.kill(pid, signal.SIGCONT)
        assert [request.output().token_ids for request in requests] == expected
        assert llm.generate([GIANT], LONG)[0].token_ids == one.generate([GIANT], LONG)[0].token_ids  # it lends again
        assert llm.instances[1].ranks.pids[0] == pid, "it was loaded anew for nothing"
        assert all(used == lent == 0 for used, lent in told(llm))


def test_who_needs_a_neighbour_that_does_not_come_back_is_told(one: LLM, folder: Path) -> None:
    expected = one.generate([GIANT], LONG)[0].token_ids
    with LLM(folder, "dp=2", device="cpu", options=SMALL, router=First) as llm, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (request,) = until_borrowed(llm, [GIANT], LONG)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llm.instances[1], "open", Mock(side_effect=MemoryError("no room here")))
            os.kill(llm.instances[1].ranks.pids[0], signal.SIGKILL)
            while llm.engine.requests:
                llm.step()
            assert request.finish_reason == "failed"
            with pytest.raises(ValueError, match="may need room for"):
                llm.generate([GIANT], LONG)
            assert len(llm.generate(PROMPTS[:1], LONG)) == 1
        llm.generate(PROMPTS[:1], LONG)  # somebody asks: another try
        for _ in range(400):
            if not llm.engine.router.lost:
                break
            llm.engine.step()
        assert llm.generate([GIANT], LONG)[0].token_ids == expected


def test_a_debtor_that_dies_leaves_nothing_behind(one: LLM, folder: Path) -> None:
    expected = [each.token_ids for each in one.generate(PROMPTS, LONG)]
    with LLM(folder, "dp=2", device="cpu", options=SMALL, router=First) as llm, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        requests = until_borrowed(llm, PROMPTS, LONG)
        os.kill(llm.instances[0].ranks.pids[0], signal.SIGKILL)
        while llm.engine.requests:
            llm.step()
        assert [request.output().token_ids for request in requests] == expected
        for _ in range(400):
            if not llm.engine.router.lost:
                break
            llm.engine.step()
        assert [each.token_ids for each in llm.generate(PROMPTS, LONG)] == expected
        assert all(used == lent == 0 for used, lent in told(llm))


@pytest.mark.parametrize("seed", range(max(1, EXAMPLES // 50)))
def test_whoever_is_lost_at_any_moment_costs_no_token(one: LLM, folder: Path, seed: int) -> None:
    """An instance is killed or stands still at a random moment; all requests end as on one device, and nobody owes anything."""
    dice = random.Random(seed)
    layout, params = dice.choice(LAYOUTS), SamplingParams(max_tokens=dice.randint(10, 60), ignore_eos=True)
    work = dice.sample([*PROMPTS, GIANT], 5)
    expected = [each.token_ids for each in one.generate(work, params)]
    options = replace(SMALL, on_demand=dice.random() < 0.5, num_blocks=26 if layout != "dp=3" else 20)
    with LLM(folder, layout, device="cpu", options=options, router=First) as llm, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        requests = llm.prepare(work, params)
        llm.submit(requests)
        for _ in range(dice.randint(1, 60)):
            llm.step()
        pid = dice.choice(dice.choice(llm.instances).ranks.pids)
        stands = dice.random() < 0.3
        os.kill(pid, signal.SIGSTOP if stands else signal.SIGKILL)
        try:
            while llm.engine.requests:
                llm.step()
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        assert [request.output().token_ids for request in requests] == expected
        for _ in range(400):
            if not llm.engine.router.lost:
                break
            llm.engine.step()
        assert [each.token_ids for each in llm.generate(work, params)] == expected
        assert all(used == lent == 0 for used, lent in told(llm))


def test_a_creditor_gets_its_memory_back(one: LLM, folder: Path) -> None:
    """Requests of its own come: all end, those of the debtor too, and each with its own tokens."""
    own = [[255, *range(60 + n)] for n in range(2)]
    long = SamplingParams(max_tokens=36, ignore_eos=True)
    expected = [each.token_ids for each in one.generate([*PROMPTS, *own], long)]
    with LLM(folder, "dp=2", device="cpu", options=SMALL, router=First) as llm:
        first = until_borrowed(llm, PROMPTS, long, 4)
        second = llm.prepare(own, long)
        llm.submit(second)
        while llm.engine.requests:
            llm.step()
        assert [request.output().token_ids for request in [*first, *second]] == expected
        assert all(used == lent == 0 for used, lent in told(llm))


def test_bad_input_is_refused(several: dict[str, LLM]) -> None:
    for layout in ("", "tp=2", "cp=2,dp=2"):
        with pytest.raises(ValueError, match="borrowing=True: layout .*(has one instance|shares its KV cache)"):
            LLM("smollm2-135m", layout, options=EngineOptions(borrowing=True))
    llm = several["dp=2"].with_options(replace(SMALL, most_lent=0), router=First)
    with pytest.raises(ValueError, match=r"room for 104 in all \(26 blocks of 4\)"):
        llm.generate([GIANT], LONG)
    llm.close()
    llm = several["dp=2"].with_options(SMALL, router=First)
    with pytest.raises(ValueError, match=r"room for 208 in all \(26 blocks of 4, and 26 that others may lend\)"):
        llm.generate([[1] * 300], LONG)
    assert llm.engine.load.used_blocks == 0 and not llm.engine.requests
    llm.close()
