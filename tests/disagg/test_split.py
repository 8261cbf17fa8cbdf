"""Prefill and decode on instances of any two layouts: the tokens are those of one device, and K and V move to the byte."""

from __future__ import annotations

import stat
import time
from collections import deque
from dataclasses import replace
from itertools import product
from pathlib import Path
from queue import Queue
from unittest.mock import Mock

import pytest
from helpers import EXAMPLES
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from law import OPTIONS, WORK, check_law
from tiny import make_checkpoint

from minillm import LLM, EngineOptions, SamplingParams
from minillm.calibrate import Calibration
from minillm.engine.handing import Handing
from minillm.engine.request import Request
from minillm.hardware.profiles import Fit
from minillm.parallel.links import connect
from minillm.policy.admission import GATES, Predictor
from minillm.policy.blocks import BlockPool
from minillm.policy.handing import Role
from minillm.policy.options import TRANSFERS, WIRES
from minillm.policy.queue import PROMPT_ORDERS
from minillm.policy.request import ScheduledRequest
from minillm.policy.scheduler import Scheduler
from minillm.serve.worker import Job, Worker
from minillm.trace.life import Event, RequestLife
from minillm.trace.trace import Kind
from minillm.trace.workload import Arrival
from minillm.twin import Twin, twin_of
from minillm.viz.requests import draw_requests

SHOW = [p for p in Phase if p is not Phase.shrink]
PAIRS = [
    "prefill=1xtp=1,decode=1xtp=1", "prefill=1xtp=2,decode=1xpp=2", "prefill=1xpp=2,decode=1xtp=2", "prefill=1xtp=3,decode=1xtp=2",
    "prefill=1xtp=1,decode=1xtp=4", "prefill=1xtp=4,decode=1xpp=3", "prefill=1xpp=3,decode=1xpp=2", "prefill=1xcp=2,decode=1xtp=1",
    "prefill=1xtp=2,decode=1xcp=2", "prefill=1xcp=2,decode=1xcp=3", "prefill=1xtp=2,pp=2,decode=1xtp=1", "prefill=1xtp=1,decode=1xtp=2,cp=2",
    "prefill=2xtp=1,decode=1xtp=1", "prefill=1xtp=1,decode=2xpp=2",
]  # fmt: skip
CONTROL = st.fixed_dictionaries(
    {
        "control": st.sampled_from([("roles", "least-tokens"), ("roles", "power-of-two"), ("pools", "least-tokens")]),
        "gate": st.sampled_from(list(GATES)),
        "predictor": st.none() | st.builds(Predictor, st.integers(1, 20), st.sampled_from([0.0, 0.5, 1.0])),
    }
)
OFTEN = ["prefill=1xtp=1,decode=1xtp=1", "prefill=1xtp=2,decode=1xpp=2", "prefill=2xtp=1,decode=2xtp=1"]
PROMPTS = [[255, *range(70)], [7], [3, 1, 4] * 11, list(range(48)), [9] * 33]
PARAMS = SamplingParams(max_tokens=9, ignore_eos=True)
SMALL = EngineOptions(num_blocks=24, max_step_tokens=32, max_running=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("split"),
        num_attention_heads=6,
        num_key_value_heads=3,
        hidden_size=48,
        head_dim=8,
        num_hidden_layers=4,
        max_position_embeddings=1024,
    )


def kv_bytes(llm: LLM, prompts: list[list[int]], block_size: int = 16) -> int:
    """What the K and V of these prompts take, in whole blocks."""
    each = 2 * llm.config.layers * llm.config.kv_heads * llm.config.head_dim * block_size * 4
    return sum(-(-len(prompt) // block_size) * each for prompt in prompts)


def moved(llm: LLM) -> int:
    """What went from prefill to decode, by the trace."""
    return sum(span.message_bytes for span in llm.trace.spans if span.name == "KV cache")


def copies(layout: str) -> int:
    """How many ranks of a decode instance hold the same heads: each of them gets its own."""
    return {"prefill=1xtp=1,decode=1xtp=4": 4 / 3}.get(layout, 1)


@pytest.mark.parametrize("layout", PAIRS)
def test_pairs_of_layouts(one: LLM, folder: Path, layout: str) -> None:
    expected = [each.token_ids for each in one.generate(PROMPTS, PARAMS)]
    with LLM(folder, layout, device="cpu", options=SMALL) as llm:
        for transfer, wire in [*product(TRANSFERS, ["memory"]), ("layer", "group")]:
            mode = llm.with_options(replace(SMALL, kv_transfer=transfer, kv_wire=wire))
            assert [each.token_ids for each in mode.generate(PROMPTS, PARAMS)] == expected, (transfer, wire)
            assert moved(mode) == kv_bytes(llm, PROMPTS) * copies(layout)
            for life in mode.trace.lives:
                assert {Event.TRANSFER, Event.CAME} <= {event for event, _ in life.moments}
            assert mode.engine.load.used_blocks == 0
            mode.close()


@settings(deadline=None, max_examples=max(20, EXAMPLES // 2), phases=SHOW)
@given(st.sampled_from(OFTEN), st.sampled_from(TRANSFERS), st.sampled_from(WIRES), CONTROL, OPTIONS, WORK)
def test_tokens_are_those_of_one_device(
    one: LLM,
    several: dict[str, LLM],
    layout: str,
    transfer: str,
    wire: str,
    control: dict,
    options: EngineOptions,
    work: list,
) -> None:
    dispatch, router = control.pop("control")
    about = {"kv_transfer": transfer, "kv_wire": wire, "dispatch": dispatch, "decode_router": router}
    check_law(one, several[layout], replace(options, **about, **control), work)


@pytest.mark.parametrize("transfer", ["whole", "layer"])
def test_pools_borrow_machines(one: LLM, folder: Path, transfer: str) -> None:
    """Splitwise: what is too much for the instance that reads prompts is read, and goes on, where others only decode."""
    prompts = [[number] * 200 for number in range(6)]
    expected = [each.token_ids for each in one.generate(prompts, PARAMS)]
    options = replace(SMALL, num_blocks=48, dispatch="pools", kv_transfer=transfer)
    with LLM(folder, "prefill=1xtp=1,decode=1xtp=1", device="cpu", options=options) as llm:
        pools = llm.engine.dispatcher.pools
        assert pools.cache_tokens == [48 * 16] * 2
        pools.most_pending = 300
        requests = llm.prepare(prompts, PARAMS)
        llm.submit(requests)
        assert 1 in pools.mixed and {each.prompt_at for each in pools.placed.values()} == {0, 1}
        while llm.engine.requests:
            llm.step()
        assert [each.output().token_ids for each in requests] == expected
        assert not pools.mixed and not pools.placed and not any(pools.taken)
        read_at = {span.rank for span in llm.trace.spans if span.kind is Kind.PREFILL}
        assert read_at == {0, 1} and moved(llm) < kv_bytes(llm, prompts)


def test_what_would_do_nothing_is_refused(one: LLM, several: dict[str, LLM]) -> None:
    with pytest.raises(ValueError, match="gate='reserve-static': layout '' has no prefill and decode instances"):
        one.with_options(replace(SMALL, gate="reserve-static"))
    with pytest.raises(ValueError, match="dispatch='pools' settles who reads and who decodes"):
        several[OFTEN[0]].with_options(replace(SMALL, dispatch="pools", decode_router="power-of-two"))


def test_a_request_that_fills_the_cache_is_let_in(one: LLM, several: dict[str, LLM]) -> None:
    """Prompt and answer as long as the cache: alone it may start, whatever the gate."""
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    expected = one.generate([[7] * 63], params)[0].token_ids
    for gate in GATES:
        for transfer in TRANSFERS:
            options = EngineOptions(num_blocks=4, max_running=4, gate=gate, kv_transfer=transfer)
            mode = several[OFTEN[0]].with_options(options)
            assert mode.generate([[7] * 63], params)[0].token_ids == expected, (gate, transfer)
            mode.close()


def test_samples_stay_with_pools(one: LLM, several: dict[str, LLM]) -> None:
    """Several samples of a prompt are not handed over, and nothing is kept of them."""
    params = SamplingParams(max_tokens=12, ignore_eos=True, n=3, temperature=0.8, seed=5)
    expected = [each.token_ids for each in one.generate([PROMPTS[0], PROMPTS[2]], params)]
    mode = several[OFTEN[2]].with_options(replace(SMALL, dispatch="pools", predictor=Predictor(200, 1.0)))
    assert [each.token_ids for each in mode.generate([PROMPTS[0], PROMPTS[2]], params)] == expected
    assert moved(mode) == 0 and not mode.engine.dispatcher.pools.placed
    assert mode.generate([PROMPTS[0]], PARAMS)[0].token_ids == one.generate([PROMPTS[0]], PARAMS)[0].token_ids
    assert moved(mode) > 0, "a short answer is handed over, whatever is predicted"
    mode.close()


def test_gates_hold_requests_back(one: LLM, folder: Path) -> None:
    """TetriInfer: a decode instance lets requests in as the gate says; greedy lets in more than fit, and preempts more."""
    prompts, params = [[number] * 40 for number in range(6)], SamplingParams(max_tokens=60, ignore_eos=True)
    expected = [each.token_ids for each in one.generate(prompts, params)]
    options = replace(SMALL, num_blocks=18, predictor=Predictor(10, 1.0))
    preempted = {}
    with LLM(folder, "prefill=1xtp=1,decode=1xtp=1", device="cpu") as llm:
        for gate in GATES:
            mode = llm.with_options(replace(options, gate=gate))
            assert [each.token_ids for each in mode.generate(prompts, params)] == expected
            preempted[gate] = sum(event is Event.PREEMPTED for life in mode.trace.lives for event, _ in life.moments)
            mode.close()
    assert preempted["greedy"] > preempted["reserve-static"] >= preempted["reserve-dynamic"], preempted


@pytest.mark.parametrize("order", PROMPT_ORDERS)
def test_prompts_are_read_in_the_order_asked_for(one: LLM, folder: Path, order: str) -> None:
    """By ranks as by their simulated twin: a window at a time."""
    lengths = [60, 20, 90, 40, 30, 10]
    prompts = [[number] * length for number, length in enumerate(lengths)]
    expected = [each.token_ids for each in one.generate(prompts, PARAMS)]
    options = replace(SMALL, num_blocks=48, max_step_tokens=8, prompt_order=order, prompt_window=3)
    fit = Fit((1.0, 0.1, 0.0), (1.0, 0.0, 0.1), (1.0, 0.0, 0.1))
    with LLM(folder, "prefill=1xtp=1,decode=1xtp=1", device="cpu", options=options) as llm:
        assert [each.token_ids for each in llm.generate(prompts, PARAMS)] == expected
        read = sorted(range(6), key=lambda number: llm.trace.lives[number].first(Event.TOKEN))
        tasks = twin_of(llm, Calibration(fit, 0.0, 0.0)).serve([Arrival(0.0, each, 9) for each in lengths])
    sign = PROMPT_ORDERS[order]
    windows = [sorted(some, key=lambda number: sign * lengths[number]) for some in (range(3), range(3, 6))]
    assert read == windows[0] + windows[1] == sorted(range(6), key=lambda number: tasks[number].first_s)


def test_twins_watch_who_is_idle(folder: Path) -> None:
    """Its machines are as large as the instances, and change their roles as those do."""
    options = replace(SMALL, idle_s=0.3, decode_router="power-of-two")
    with LLM(folder, "prefill=2xtp=1,decode=1xcp=2", device="cpu", options=options) as llm:
        twin = twin_of(llm, Calibration(Fit((1.0, 0.1, 0.0), (9.0, 0.0, 0.1), (9.0, 0.0, 0.1)), 0.0, 0.0))
        assert isinstance(twin, Twin)
        assert [each.limits.cache_tokens for each in twin.machines] == [384, 384, 768]
        (task,) = twin.serve([Arrival(0.0, 20, 250)])
        assert task.given == 250 and twin.dispatcher.roles.count(Role.DECODE) == 2 and len(twin.flips) == 1


def test_an_idle_instance_changes_its_role(one: LLM, folder: Path) -> None:
    """Two that read and one that decodes: once nobody comes, one that reads has nothing to do, and decodes from then on."""
    options = replace(SMALL, idle_s=0.3, decode_router="power-of-two")
    params = SamplingParams(max_tokens=250, ignore_eos=True)
    expected = one.generate(PROMPTS[:1], params)[0].token_ids
    with LLM(folder, "prefill=2xtp=1,decode=1xtp=1", device="cpu", options=options) as llm:
        assert llm.generate(PROMPTS[:1], params)[0].token_ids == expected
        assert llm.engine.dispatcher.roles.count(Role.DECODE) == 2 and len(llm.engine.control.flips) == 1


def test_layers_leave_while_the_prompt_is_computed(folder: Path) -> None:
    """Each layer's part leaves before the step that computes it is over; the whole cache, after it."""
    prompt = [[5] * 200]
    for transfer in ("layer", "whole"):
        options = EngineOptions(num_blocks=24, max_step_tokens=256, kv_transfer=transfer)
        with LLM(folder, "prefill=1xtp=1,decode=1xtp=1", device="cpu", options=options) as llm:
            llm.generate(prompt, PARAMS)
            llm.generate(prompt, PARAMS)
            (step,) = [span for span in llm.trace.spans if span.kind is Kind.PREFILL and span.rank == 0]
            parts = [span for span in llm.trace.spans if span.name == "KV cache"]
            assert all(part.rank == 0 for part in parts)
            within = sum(part.start_s < step.end_s for part in parts)
            assert within > 0 if transfer == "layer" else within == 0


def test_prefill_waits_until_decode_has_room(one: LLM, folder: Path) -> None:
    """Caches that are not fetched fill its pool; nothing is lost."""
    options = replace(SMALL, num_blocks=8, kv_transfer="whole")
    prompts = [[number] * 60 for number in range(6)]
    expected = [each.token_ids for each in one.generate(prompts, PARAMS)]
    with LLM(folder, "prefill=1xtp=1,decode=1xtp=1", device="cpu", options=options) as llm:
        out = llm.generate(prompts, PARAMS)
        assert [each.token_ids for each in out] == expected
        starts = sorted(life.first(Event.STARTED) for life in llm.trace.lives)
        ends = sorted(life.first(Event.CAME) for life in llm.trace.lives)
        assert starts[2] > ends[0]  # two prompts fill the pool


def test_cancelled_at_every_stage(one: LLM, folder: Path) -> None:
    """Both sides let go of a request, whatever it waits for."""
    expected = one.generate([PROMPTS[0]], PARAMS)[0].token_ids
    slow = replace(SMALL, link_gbits=0.002)  # a tenth of a second for a prompt
    with LLM(folder, "prefill=1xtp=1,decode=1xtp=1", device="cpu", options=slow) as llm:
        for pulls in range(12):
            requests = llm.prepare([PROMPTS[0], PROMPTS[2]], PARAMS)
            llm.submit(requests)
            for _ in range(pulls):
                llm.step()
            llm.cancel(requests[:1])
            while llm.engine.requests:
                llm.step()
            assert requests[1].finish_reason == "length"
        fast = llm.with_options(SMALL)
        assert fast.generate([PROMPTS[0]], PARAMS)[0].token_ids == expected
        llm.generate([PROMPTS[1]], PARAMS)
        assert llm.engine.load.used_blocks == 0 and llm.engine.load.running == 0


def test_roles_are_changed_without_reading_weights(one: LLM, folder: Path) -> None:
    expected = [each.token_ids for each in one.generate(PROMPTS, PARAMS)]
    with LLM(folder, "prefill=2xtp=1,decode=1xtp=1", device="cpu", options=SMALL) as llm:
        pids = [instance.ranks.pids for instance in llm.instances]
        assert [each.token_ids for each in llm.generate(PROMPTS, PARAMS)] == expected
        requests = llm.prepare(PROMPTS, PARAMS)
        llm.submit(requests)
        llm.engine.flip(0, Role.DECODE)
        while llm.engine.requests:
            llm.step()
        assert [request.output().token_ids for request in requests] == expected
        assert llm.engine.dispatcher.roles == [Role.DECODE, Role.PREFILL, Role.DECODE]
        assert [each.token_ids for each in llm.generate(PROMPTS, PARAMS)] == expected
        assert {life.rank for life in llm.trace.lives} == {0, 2}, "both decode"
        with pytest.raises(ValueError, match="instance 1 is the last one for prefill"):
            llm.engine.flip(1, Role.DECODE)
        assert [instance.ranks.pids for instance in llm.instances] == pids


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ("prefill=1xtp=2", "there is no decode instance"),
        ("decode=1xtp=2", "there is no prefill instance"),
        ("prefill=0xtp=1,decode=1xtp=1", "there must be at least one prefill instance"),
        ("prefill=1xdp=2,decode=1xtp=1", "type prefill=2x"),
        ("prefill=1,decode=1", "it is not understood; write 'prefill=1xtp=2"),
        ("prefill=1xtp=9,decode=1xtp=1", "tp=9 does not fit 6 query heads"),
    ],
)
def test_layouts_that_cannot_be(folder: Path, layout: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LLM(folder, layout, device="cpu")


def test_bad_input_is_refused(several: dict[str, LLM], folder: Path) -> None:
    small = several[OFTEN[0]].with_options(replace(SMALL, num_blocks=3))
    with pytest.raises(ValueError, match="may need room for 68 tokens, but the KV cache has room for 48"):
        small.generate([[1] * 60], PARAMS)
    assert len(small.generate([[1] * 20], PARAMS)) == 1
    small.close()
    with pytest.raises(ValueError, match="are not replayed"):
        several[OFTEN[0]].record_for_replay([[1, 2]], PARAMS)
    with pytest.raises(ValueError, match="lends none"):
        LLM(folder, OFTEN[0], device="cpu", options=EngineOptions(borrowing=True))
    for options, text in (
        ({"kv_transfer": "fast"}, "give one of whole, chunk, layer"),
        ({"kv_wire": "post"}, "give one of memory, group"),
        ({"dispatch": "queue"}, "give one of roles, pools"),
        ({"decode_router": "random"}, "give one of least-tokens, power-of-two"),
        ({"gate": "open"}, "give one of greedy, reserve-static, reserve-dynamic"),
        ({"predictor": 200}, "predictor=200: give Predictor\\(width, accuracy\\), or None"),
        ({"idle_s": 0}, "idle_s=0: give a number above 0, or None"),
        ({"link_gbits": 0}, "a number above 0"),
    ):
        with pytest.raises(ValueError, match=text):
            EngineOptions(**options)


def test_a_server_lets_clients_go(one: LLM, folder: Path) -> None:
    """Jobs of a server: one client hangs up in the middle; the others get what one device gives."""
    expected = [each.token_ids for each in one.generate(PROMPTS, PARAMS)]
    with LLM(folder, OFTEN[0], device="cpu", options=replace(SMALL, link_gbits=0.01)) as llm:
        worker, told = Worker(llm), [Queue() for _ in PROMPTS]
        jobs = [Job(llm.prepare([prompt], PARAMS), box.put) for prompt, box in zip(PROMPTS, told)]
        for job in jobs:
            worker.submit(job)
        told[0].get(timeout=20)
        worker.cancel(jobs[2])
        for number in (0, 1, 3, 4):
            while told[number].get(timeout=20) is not None:
                pass
            assert jobs[number].requests[0].token_ids == expected[number]
        worker.close()
        worker.join(20)
        while llm.engine.has_work:
            llm.step()
        assert llm.engine.load.used_blocks == 0 and not llm.engine.dispatcher.ways


def test_two_jobs_do_not_meet(one: LLM, folder: Path) -> None:
    """Two at once on one machine: each has a folder of its own, and a stranger without its key is sent away."""
    expected = [each.token_ids for each in one.generate(PROMPTS, PARAMS)]
    with LLM(folder, OFTEN[0], device="cpu", options=SMALL) as first, LLM(folder, OFTEN[0], device="cpu", options=SMALL) as second:  # fmt: skip
        requests = [llm.prepare(PROMPTS, PARAMS) for llm in (first, second)]
        first.submit(requests[0])
        second.submit(requests[1])
        while first.engine.requests or second.engine.requests:
            for llm in (first, second):
                if llm.engine.requests:
                    llm.step()
        assert [[each.token_ids for each in some] for some in requests] == [expected] * 2
        doors = [llm.engine.engines[0].house.door() for llm in (first, second)]
        assert doors[0].folder != doors[1].folder
        assert stat.S_IMODE(doors[0].folder.stat().st_mode) == 0o700
        stranger = replace(doors[0], key=doors[1].key)
        with pytest.raises(OSError):
            connect(stranger, first.engine.engines[0].party, 0)
        assert [each.token_ids for each in first.generate(PROMPTS, PARAMS)] == expected


def test_the_life_of_a_request_is_drawn(folder: Path) -> None:
    options = replace(SMALL, kv_transfer="whole", link_gbits=0.002)
    with LLM(folder, OFTEN[0], device="cpu", options=options) as llm:
        llm.generate(PROMPTS[:2], PARAMS)
        (life, _) = llm.trace.lives
        order = [life.first(each) for each in (Event.ARRIVED, Event.STARTED, Event.TOKEN, Event.CAME, Event.FINISHED)]
        assert order == sorted(order)
        names = [text.get_text() for text in draw_requests(llm.trace, "finding").axes[0].get_legend().get_texts()]
        assert "its cache moves" in names


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("transfer", TRANSFERS)
def test_what_was_told_of_a_request_is_not_taken_for_the_next_one_of_its_number(one: LLM, folder: Path, transfer: str, wire: str) -> None:  # fmt: skip
    """Streams are closed at any moment; the requests that follow count from 0 again."""
    expected = [each.token_ids for each in one.generate(PROMPTS, PARAMS)]
    options = replace(SMALL, kv_transfer=transfer, kv_wire=wire, link_gbits=0.02)
    with LLM(folder, OFTEN[0], device="cpu", options=options) as llm:
        for pulls in range(8):
            requests = llm.prepare(PROMPTS[::-1], PARAMS)
            llm.submit(requests)
            for _ in range(pulls):
                llm.step()
            time.sleep(0.01 * (pulls % 3))  # so that something is told that nobody has heard yet
            llm.cancel(requests)
            assert [each.token_ids for each in llm.generate(PROMPTS, PARAMS)] == expected
        assert llm.engine.load.used_blocks == 0 and not llm.engine.dispatcher.ways


class Courier:
    """Transfers that come when the test says so."""

    def __init__(self) -> None:
        self.sources, self.told, self.stopped = {}, [], []

    def expect(self, request_id: int, blocks: list[int]) -> None: ...

    def news(self) -> list[tuple[int, bool]]:
        told, self.told = self.told, []
        return told

    def stop(self, request_id: int) -> None:
        self.stopped.append(request_id)


def arriving() -> tuple[Scheduler, Handing, Courier, Request]:
    """A request whose 5 tokens' K and V are to come."""
    scheduler, courier = Scheduler(BlockPool(4, 4), EngineOptions(block_size=4, num_blocks=4)), Courier()
    scheduled = ScheduledRequest(0, [1, 2, 3, 4, 5], 12, arriving=5)
    request = Request(
        0,
        scheduled,
        5,
        SamplingParams(max_tokens=7),
        0,
        frozenset(),
        Mock(step=lambda token: ""),
        RequestLife(0),
        deque(),
    )
    handing = Handing(scheduler, {0: request}, courier, early=True)
    scheduler.add(scheduled)
    handing.scheduled(scheduler.schedule(0.0), [], 0.0)
    return scheduler, handing, courier, request


def test_decode_begins_when_both_the_cache_and_the_token_are_there() -> None:
    scheduler, handing, courier, request = arriving()
    courier.told = [(0, True)]
    handing.hear(1.0)
    assert not scheduler.schedule(1.0).chunks and request.scheduled.in_flight == 5, "no victim of preemption meanwhile"
    life = RequestLife(0, moments=[(Event.ARRIVED, 0.0), (Event.STARTED, 0.1), (Event.TOKEN, 0.9)])
    handing.give(0, [7], life)
    (chunk,) = scheduler.schedule(1.0).chunks
    assert (chunk.start, chunk.token_ids) == (5, (7,))


def test_who_has_the_cache_but_no_token_computes_it_when_prefill_is_lost() -> None:
    scheduler, handing, courier, request = arriving()
    courier.told = [(0, True)]
    handing.hear(1.0)
    handing.go_on_alone(0)
    (chunk,) = scheduler.schedule(1.0).chunks
    assert (chunk.start, chunk.token_ids) == (0, (1, 2, 3, 4, 5)) and courier.stopped == [0]


def test_an_instance_of_another_layout_reads_prompts(one: LLM, folder: Path) -> None:
    """README's example: one of two pipelines that decode becomes a reader beside tp=2, while requests run."""
    expected = [each.token_ids for each in one.generate(PROMPTS, PARAMS)]
    with LLM(folder, "prefill=1xtp=2,decode=2xpp=2", device="cpu", options=SMALL) as llm:
        requests = llm.prepare(PROMPTS, PARAMS)
        llm.submit(requests)
        llm.engine.flip(1, Role.PREFILL)
        while llm.engine.requests:
            llm.step()
        assert [each.token_ids for each in requests] == expected
        assert llm.engine.dispatcher.roles == [Role.PREFILL, Role.PREFILL, Role.DECODE]
        assert [each.token_ids for each in llm.generate(PROMPTS, PARAMS)] == expected
        assert {span.rank for span in llm.trace.spans if span.name == "KV cache"} > {0, 1}, "the new reader sends, too"
