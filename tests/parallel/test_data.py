"""The law for replicas: whoever serves a request, and whoever is lost meanwhile, its tokens are those of one device."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers import EXAMPLES, gone
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from law import OPTIONS, WORK, check_law
from tiny import make_checkpoint

from minillm import LLM, EngineOptions, Ranks, SamplingParams
from minillm.parallel.data import split_evenly
from minillm.policy.router import Router
from minillm.ranks.membership import context
from minillm.trace.life import Event
from minillm.trace.replay import replay
from minillm.trace.trace import Kind

SHOW = [p for p in Phase if p is not Phase.shrink]
LAYOUTS = ["dp=2", "dp=3", "dp=2,tp=2", "dp=2,pp=2"]
LONG = SamplingParams(max_tokens=120, ignore_eos=True)
MIXED = [
    LONG,
    SamplingParams(max_tokens=100, temperature=1.0, seed=5, ignore_eos=True),
    SamplingParams(max_tokens=80, temperature=1.0, seed=6, n=3, ignore_eos=True),
    SamplingParams(max_tokens=150, stop=("zq", "e"), ignore_eos=True),
]
SEEDS = int(os.environ.get("MINILLM_FAULT_SEEDS", "20")) // 10  # of random losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("data"), num_hidden_layers=4, max_position_embeddings=4096, tie_word_embeddings=True
    )


@settings(deadline=None, max_examples=max(20, EXAMPLES // 2), phases=SHOW)
@given(st.sampled_from(LAYOUTS), st.sampled_from(["round-robin", "least-tokens", "prefix-aware"]), OPTIONS, WORK)
def test_tokens_are_those_of_one_device(
    one: LLM, several: dict[str, LLM], layout: str, router: str, options: EngineOptions, work: list
) -> None:
    check_law(one, several[layout].with_options(router=router), options, work)


def test_replicas_share_the_weights_they_can(several: dict[str, LLM]) -> None:
    """One read of the file; what is not packed lies in memory that both map."""
    for layout in ("dp=2", "dp=2,tp=2"):
        first, second = several[layout].instances
        config = several[layout].config
        assert sum(loaded.bytes_read for loaded in first.loaded) >= 4 * config.parameters
        assert [loaded.bytes_read for loaded in second.loaded] == [0] * second.ranks.world_size
        kept = [loaded.shared_bytes for loaded in first.loaded]
        assert kept == [loaded.shared_bytes for loaded in second.loaded]
        assert sum(kept) >= 4 * config.vocab_size * config.hidden_size
        for rank, size in enumerate(kept):
            here = [_mapped(instance.ranks.pids[rank]) for instance in (first, second)]
            assert here[0] & here[1], "no memory in common"
            assert any(length >= size for _, length in here[0] & here[1])


def _mapped(pid: int) -> set[tuple[str, int]]:
    """Inode and length of every piece of shared weights that a process maps."""
    found = set()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "minillm weights" in line:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            found.add((line.split()[4], end - begin))
    return found


def test_requests_go_where_the_router_says(one: LLM, several: dict[str, LLM]) -> None:
    class Odd(Router):
        """Long prompts to the second replica."""

        def prefer(self, present: list[int], prompt: list[int]) -> int:
            return 1 if len(prompt) > 3 else 0

    llm = several["dp=2,tp=2"].with_options(router=Odd)
    outputs = llm.generate([[1, 2], [3] * 9, [4], [5] * 4], SamplingParams(max_tokens=4))
    assert [output.metrics.rank for output in outputs] == [0, 2, 0, 2]
    computed = {
        (span.rank, request) for span in llm.trace.spans if span.kind is Kind.PREFILL for request in span.request_ids
    }
    assert computed == {(0, 0), (1, 0), (2, 1), (3, 1), (0, 2), (1, 2), (2, 3), (3, 3)}
    assert llm.trace.lives == [output.metrics for output in outputs]
    assert llm.trace.ranks == [0, 1, 2, 3]
    llm.close()


def test_a_recorded_run_replays(several: dict[str, LLM]) -> None:
    """Replicas number their groups alike; in one trace they are told apart. One rank of all computes at a time."""
    prompts = [[number] * 30 for number in range(6)]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    for layout in ("dp=2,tp=2", "dp=2,pp=2"):
        trace = several[layout].record_for_replay(prompts, params)
        again = replay(trace)
        assert again.ranks == [0, 1, 2, 3]
        groups = {
            span.group: {other.rank for other in trace.spans if other.group == span.group} for span in trace.spans
        }
        assert all(ranks <= {0, 1} or ranks <= {2, 3} for group, ranks in groups.items() if group)
        computing = sorted(
            (span.start_s, span.end_s) for span in trace.spans if span.kind in (Kind.PREFILL, Kind.DECODE)
        )
        assert all(begin >= end for (_, end), (begin, _) in zip(computing, computing[1:]))


@pytest.mark.parametrize(
    ("layout", "how"), [("dp=2", signal.SIGSTOP), ("dp=2,tp=2", signal.SIGKILL), ("dp=2,pp=2", signal.SIGSTOP)]
)
def test_a_replica_that_dies_under_load(one: LLM, folder: Path, layout: str, how: signal.Signals) -> None:
    """Its requests go on at the other, the same tokens, each once; the other's ranks never notice; it comes back."""
    prompts = [[number, 2, 3] for number in range(12)]
    params = [MIXED[number % len(MIXED)] for number in range(12)]
    expected = [[sample.token_ids for sample in each.samples] for each in one.generate(prompts, params)]
    size = 1 if layout == "dp=2" else 2
    pools = [Ranks(size, device="cpu", timeout_s=1) for _ in range(2)]
    with pools[0], pools[1], LLM(folder, layout=layout, device="cpu", ranks=pools) as llm:
        requests = llm.prepare(prompts, params)
        llm.submit(requests)
        inbox, pids = requests[0].inbox, [list(pool.pids) for pool in pools]
        while len(inbox) < 100:
            llm.step()
        moving = {each.request_id for each in llm.engine.engines[1].requests.values()}
        assert moving
        os.kill(pids[1][-1], how)
        with pytest.warns(RuntimeWarning, match="replica 1 was lost, its requests go on at others: rank"):
            while llm.engine.requests:
                llm.step()
        assert pools[0].pids == pids[0] and gone(pids[1])
        got = [[sample.token_ids for sample in request.output().samples] for request in requests]
        assert got == expected
        told = {}
        for piece in inbox:  # each token once, in order
            told.setdefault((piece.index, piece.sample), []).append(piece.token_id)
        assert told == {(i, s): tokens for i, samples in enumerate(expected) for s, tokens in enumerate(samples)}
        texts = {key: "" for key in told}
        for piece in inbox:
            texts[piece.index, piece.sample] += piece.text
        assert texts == {(r.index, s.sample): s.text for r in requests for s in [r, *r.twins]}
        moved = {life.request_id for life in llm.trace.lives if any(what is Event.MOVED for what, _ in life.moments)}
        assert moved <= moving and moved
        for life in llm.trace.lives:
            assert [when for _, when in life.moments] == sorted(when for _, when in life.moments)
            assert sum(what is Event.FINISHED for what, _ in life.moments) == 1
        assert len(llm.trace.lives) == len({life.request_id for life in llm.trace.lives}) == 12 + 2 * 3
        for _ in range(400):  # both serve again
            if not llm.engine.router.lost:
                break
            llm.engine.step()
        outputs = llm.generate(prompts[:4], LONG)
        assert {output.metrics.rank for output in outputs} == {0, size}
        assert [output.token_ids for output in outputs] == [each.token_ids for each in one.generate(prompts[:4], LONG)]
        assert llm.engine.load.used_blocks == 0


def test_a_replica_that_ends_while_it_has_nothing_to_do(one: LLM, folder: Path) -> None:
    with LLM(folder, layout="dp=2", device="cpu") as llm:
        llm.generate([[1], [2]], LONG)
        pids = [instance.ranks.pids[0] for instance in llm.instances]
        os.kill(pids[0], signal.SIGKILL)
        assert gone(pids[:1])
        with pytest.warns(RuntimeWarning, match="replica 0 was lost"):
            outputs = llm.generate([[1], [2]], LONG)
        assert [each.token_ids for each in outputs] == [each.token_ids for each in one.generate([[1], [2]], LONG)]
        assert [each.metrics.rank for each in outputs] == [1, 1]


def test_when_all_are_lost_requests_wait_until_one_is_back(one: LLM, folder: Path) -> None:
    prompts = [[1], [2], [3]]
    with LLM(folder, layout="dp=2", device="cpu") as llm:
        requests = llm.prepare(prompts, LONG)
        llm.submit(requests)
        while len(requests[0].inbox) < 20:
            llm.step()
        for instance in llm.instances:
            os.kill(instance.ranks.pids[0], signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match="was lost"):
            while llm.engine.requests:
                llm.step()
        assert [each.token_ids for each in requests] == [each.token_ids for each in one.generate(prompts, LONG)]
        assert len(llm.engine.losses) == 2


def test_a_request_that_loses_every_replica_it_meets_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the reason."""
    monkeypatch.setattr("minillm.parallel.data.MOST_MOVES", 1)
    with LLM(folder, layout="dp=2", device="cpu") as llm, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stream = llm.stream([[1]], SamplingParams(max_tokens=3000, ignore_eos=True))
        with pytest.raises(RuntimeError, match="the ranks that served this request were lost"):
            for piece in stream:
                at = llm.engine.router.under_way.get(piece.request_id)
                if at is not None and llm.instances[at.replica].alive:
                    os.kill(llm.instances[at.replica].ranks.pids[0], signal.SIGKILL)
        assert llm.generate([[2]], SamplingParams(max_tokens=3))[0].finish_reason == "length"


def _break(instance: str, after: int) -> None:
    """From the `after`-th step on this rank's first layer raises, as one that has no memory left."""
    layer = context().held[instance].model.layers[0]
    forward, calls = type(layer).forward, iter(range(after))

    def failing(*args: object) -> object:
        if next(calls, None) is None:
            del layer.forward
            raise RuntimeError("no memory")
        return forward(layer, *args)

    layer.forward = failing


@pytest.mark.parametrize("layout", ["dp=2", "dp=2,tp=2"])
def test_a_step_that_raises_moves_its_requests_and_leaves_no_ghosts(one: LLM, folder: Path, layout: str) -> None:
    """The ranks live on, and what they had is forgotten there: nobody is computed twice, ids may be used again."""
    prompts, params = [[number, 2] for number in range(8)], MIXED * 2
    expected = [[sample.token_ids for sample in each.samples] for each in one.generate(prompts, params)]
    with LLM(folder, layout=layout, device="cpu") as llm:
        llm.generate(prompts[:2], LONG)
        for _ in range(
            4 if layout == "dp=2" else 1
        ):  # as many as would give a request up, if they were counted together
            llm.instances[1].ranks.run(_break, llm.instances[1].name, 20)
            pids = list(llm.instances[1].ranks.pids)
            with pytest.warns(RuntimeWarning, match="replica 1 was lost, its requests go on at others: "):
                outputs = llm.generate(prompts, params)
            assert [[sample.token_ids for sample in each.samples] for each in outputs] == expected
            for _ in range(100):
                if not llm.engine.router.lost:
                    break
                llm.engine.step()
            assert llm.instances[1].ranks.pids == pids or layout != "dp=2"
        outputs = llm.generate(prompts, params)
        assert [[sample.token_ids for sample in each.samples] for each in outputs] == expected
        assert {output.metrics.rank for output in outputs} == {0, llm.layout.world_size // 2}
        assert llm.engine.load.used_blocks == 0 and not any(llm.engine.router.tokens)


def test_two_engines_on_the_same_replicas_notice_the_same_loss(one: LLM, folder: Path) -> None:
    expected = [output.token_ids for output in one.generate([[1], [2]], LONG)]
    with LLM(folder, layout="dp=2", device="cpu") as llm, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = llm.with_options(EngineOptions(block_size=3))
        for each in (llm, twin):
            assert [output.token_ids for output in each.generate([[1], [2]], LONG)] == expected
        os.kill(llm.instances[0].ranks.pids[0], signal.SIGKILL)
        for _ in range(2):
            for each in (llm, twin):
                assert [output.token_ids for output in each.generate([[1], [2]], LONG)] == expected
        twin.close()


@pytest.mark.parametrize("layout", ["dp=2", "prefill=1xtp=1,decode=1xtp=1"])
def test_what_gets_lost_on_its_way_is_noticed(
    one: LLM, folder: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that never arrives: the ranks come to rest, and say nothing of its requests, which then go on elsewhere."""
    prompts, params = [[number, 2, 3] for number in range(6)], SamplingParams(max_tokens=20, ignore_eos=True)
    expected = [each.token_ids for each in one.generate(prompts, params)]
    post, posted = Ranks.post, []

    def once(ranks: Ranks, rank: int, message: Any) -> None:
        posted.append(message)
        if len(posted) != 2:
            post(ranks, rank, message)

    with LLM(folder, layout, device="cpu") as llm:
        monkeypatch.setattr(Ranks, "post", once)
        with pytest.warns(RuntimeWarning, match="came to rest, and said nothing of requests"):
            assert [each.token_ids for each in llm.generate(prompts, params)] == expected
        assert len(llm.engine.losses) == 1 and llm.engine.load.used_blocks == 0


def test_a_router_with_a_mistake_is_told(several: dict[str, LLM]) -> None:
    class Beyond(Router):
        def prefer(self, present: list[int], prompt: list[int]) -> int:
            return len(present)

    class Broken(Router):
        def prefer(self, present: list[int], prompt: list[int]) -> int:
            return [][0]

    for router, error, text in (
        (Beyond, ValueError, "the router chose replica 2; there are 0, 1"),
        (Broken, IndexError, "list"),
    ):
        with pytest.raises(error, match=text):
            several["dp=2"].with_options(router=router).generate([[1]], LONG)
    assert several["dp=2"].generate([[1]], LONG)[0].finish_reason == "length"


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_losses(one: LLM, folder: Path, seed: int) -> None:
    """Requests come, are dropped, and replicas are killed at random moments: nobody is lost or answered twice."""
    dice = random.Random(seed)
    with LLM(folder, layout="dp=2", device="cpu") as llm, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        streams, dropped = [], set()
        for _ in range(40):
            act = dice.random()
            if act < 0.4:
                prompt, params = [dice.randrange(256) for _ in range(dice.randint(1, 20))], dice.choice(MIXED)
                request = llm.prepare([prompt], params)
                llm.submit(request)
                streams.append((prompt, params, request[0]))
            elif act < 0.45 and streams:
                number = dice.randrange(len(streams))
                llm.cancel([streams[number][2]])
                dropped.add(number)
            elif act < 0.5 and (pids := dice.choice(llm.instances).ranks.pids):
                os.kill(pids[0], signal.SIGKILL)
            for _ in range(dice.randint(0, 8)):
                llm.step()
        while llm.engine.requests:
            llm.step()
        failed = 0
        for number, (prompt, params, request) in enumerate(streams):
            wanted = [sample.token_ids for sample in one.generate([prompt], params)[0].samples]
            got = [sample.token_ids for sample in request.output().samples]
            if number in dropped or request.finish_reason == "failed":
                failed += request.finish_reason == "failed"
                wanted = [tokens[: len(mine)] for tokens, mine in zip(wanted, got)]
            assert got == wanted
        assert failed == 0 or len(llm.engine.losses) > 3
        assert llm.engine.load.used_blocks == 0 and not any(llm.engine.router.tokens)


def test_no_rank_outlives_its_llm(folder: Path) -> None:
    llm = LLM(folder, layout="dp=2,tp=2", device="cpu")
    llm.generate([[1, 2]], SamplingParams(max_tokens=2))
    pids = [pid for instance in llm.instances for pid in instance.ranks.pids]
    assert len(pids) == 4
    llm.close()
    assert gone(pids)
    with pytest.raises(ValueError, match="this LLM is closed"):
        llm.generate([[1]])


def test_refusals(folder: Path, ranks2: Ranks) -> None:
    for changes, text in (
        ({"layout": "dp=2", "router": "best"}, "router='best': there are round-robin, least-tokens, prefix-aware"),
        ({"layout": "dp=2", "router": Ranks}, "give a subclass of Router"),
        ({"layout": "dp=2", "ranks": ranks2}, "takes 1 ranks for each replica, but these are 2"),
        ({"layout": "dp=2,tp=2", "ranks": ranks2}, "has 2 replicas, each on ranks of its own, but there are 1"),
        (
            {"layout": "dp=2,tp=2", "ranks": [ranks2, ranks2]},
            "has 2 replicas, each on ranks of its own, but there are 1",
        ),
        ({"layout": "dp=0"}, "dp=0; give a whole number of data parallel replicas from 1"),
        ({"layout": "dp=2,ep=2"}, "needs a mixture of experts"),
    ):
        with pytest.raises(ValueError) as error:
            LLM(folder, device="cpu", **changes)
        assert text in str(error.value) and "\n" not in str(error.value)


def test_scores_and_interrupts_leave_all_replicas(one: LLM, several: dict[str, LLM]) -> None:
    text = list(range(3, 30))
    assert (several["dp=2,pp=2"].score(text) - one.score(text)).abs().max() < 1e-5
    stream = several["dp=2"].stream([[1], [2]], LONG)
    next(stream)
    stream.close()
    time.sleep(0.1)
    assert several["dp=2"].engine.load.used_blocks == 0
    assert not several["dp=2"].engine.has_work


def test_offline_by_accelerate_and_by_length(one: LLM, folder: Path) -> None:
    """A list that is known beforehand: every rank has a model of its own and takes its share; nobody talks until the end."""
    prompts = [[number] * (3 + 20 * (number % 4 == 0)) for number in range(9)]
    params = SamplingParams(max_tokens=5)

    def by_accelerate(shares: list[list[int]] | None = None) -> list[tuple[int, list[int]]]:
        from accelerate import PartialState
        from accelerate.utils import gather_object

        state = PartialState(cpu=True)
        if shares is None:
            with state.split_between_processes(list(range(9))) as numbers:
                mine = list(numbers)
        else:
            mine = shares[state.process_index]
        with LLM(folder, device="cpu") as llm:
            outputs = llm.generate([prompts[number] for number in mine], params)
        return gather_object([(number, output.token_ids) for number, output in zip(mine, outputs)])

    expected = [output.token_ids for output in one.generate(prompts, params)]
    with Ranks(3, device="cpu") as ranks:
        for shares in (None, split_evenly([len(prompt) for prompt in prompts], 3)):
            found = ranks.run(by_accelerate, shares)
            assert found[0] == found[1] == found[2]
            assert [tokens for _, tokens in sorted(found[0])] == expected


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 4))
def test_shares_of_a_list_are_fair(lengths: list[int], parts: int) -> None:
    shares = split_evenly(lengths, parts)
    assert sorted(number for share in shares for number in share) == list(range(len(lengths)))
    loads = [sum(lengths[number] for number in share) for share in shares]
    assert max(loads) <= max(lengths) or max(loads) - min(loads) <= min(
        lengths[n] for n in shares[loads.index(max(loads))]
    )
