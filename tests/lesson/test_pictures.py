"""Pictures: they draw, they hold what they must say, and nothing in them overlaps the title."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from minillm import RankError, Ranks
from minillm.distkv.worth import worth_of
from minillm.hardware.devices import DEVICES, find_device, find_link
from minillm.model.cost import decode_cost
from minillm.model.shapes import SHAPES
from minillm.parallel.balance import predict_costs
from minillm.parallel.layout import Layout, share
from minillm.parallel.plan import Load, step_time
from minillm.policy.blocks import BlockPool
from minillm.policy.options import EngineOptions
from minillm.policy.request import ScheduledRequest
from minillm.policy.scheduler import Scheduler
from minillm.trace.life import Event, RequestLife
from minillm.trace.metrics import Estimate
from minillm.trace.trace import Category, Kind, MemorySample, Span, Trace
from minillm.viz.block import Sending, draw_block, sendings, sent_numbers
from minillm.viz.blocks import BlockMap, draw_blocks, look, split
from minillm.viz.curve import Point, draw_curve
from minillm.viz.live import Timeline
from minillm.viz.loans import FREE, SHADES, draw_held, draw_lending
from minillm.viz.memory import draw_memory
from minillm.viz.merge import draw_merge
from minillm.viz.queue import LOADS, Measured, draw_bought, draw_routers, draw_waits
from minillm.viz.requests import _again, _waits, draw_latency, draw_requests
from minillm.viz.ring import RingView
from minillm.viz.roofline import draw_roofline, measured_dots
from minillm.viz.room import draw_room, sequences_at_a_time
from minillm.viz.seats import busy_share, draw_seats, take_seats
from minillm.viz.slices import draw_slices
from minillm.viz.style import new_figure, png
from minillm.viz.timeline import draw_runs, draw_timeline, memory_steps
from minillm.viz.traffic import draw_traffic, traffic_of
from minillm.viz.travel import draw_travel
from minillm.viz.waiting import draw_waiting
from minillm.viz.walk import BATCHES, CONTEXTS, RooflineWalk
from minillm.viz.whatif import WhatIf
from minillm.viz.widget import InteractivePicture
from minillm.viz.words import batch_letters, bytes_text, plain
from minillm.viz.worth import draw_worth


def texts(figure) -> str:
    return "\n".join([t.get_text() for axis in figure.axes for t in axis.texts] + [t.get_text() for t in figure.texts])


def test_waiting_names_the_culprit_and_every_place(ranks4: Ranks) -> None:
    def job() -> None:
        if dist.get_rank() != 1:
            dist.all_reduce(torch.ones(2))

    with pytest.raises(RankError) as caught:
        ranks4.run(job)
    figure = draw_waiting(caught.value)
    assert png(figure).startswith(b"\x89PNG")
    assert "waits in all_reduce [2] float32" in texts(figure)
    assert figure.get_suptitle() == "Rank 1 never came; the others wait for it"


def run_of(ranks: int = 2) -> Trace:
    """A made-up run: three requests, prefill and decode, messages, waiting, memory."""
    traces = []
    for rank in range(ranks):
        start = 5.0 + 0.01 * rank
        spans = [
            Span(
                rank,
                Kind.PREFILL,
                "prefill",
                start,
                start + 1,
                tokens=64,
                request_ids=(0,),
                flops=10**9,
                memory_bytes=10**7,
            )
        ]
        spans += [
            Span(
                rank,
                Kind.DECODE,
                "decode",
                start + 1 + n / 10,
                start + 1.1 + n / 10,
                request_ids=(0, 1),
                flops=10**7,
                memory_bytes=10**7,
                cpu_s=0.1,
            )
            for n in range(4)
        ]
        spans += [Span(rank, Kind.COMMUNICATION, "all_reduce", start + 1.4, start + 1.5, message_bytes=2_300_000)]
        spans += [Span(rank, Kind.WAITING, "wait", start + 1.5, start + 1.6)]
        memory = [
            MemorySample(rank, Category.WEIGHTS, 4.0, 10**9),
            MemorySample(rank, Category.KV_CACHE, start + 1, 2 * 10**8),
        ]
        traces.append(
            Trace(spans, memory, about={"model": "SmolLM2-135M-Instruct-1", "dtype": "float32", "device": "cpu"})
        )
    whole = Trace.of_ranks(traces)
    for number in range(3):
        life = RequestLife(number, prompt_tokens=64)
        for event, when in (
            (Event.ARRIVED, 5.0),
            (Event.STARTED, 5.1 + number / 10),
            (Event.TOKEN, 6.0),
            (Event.TOKEN, 6.1),
            (Event.FINISHED, 6.1),
        ):
            life.note(event, when)
        whole.lives.append(life)
    return whole


PICTURES: dict[str, Callable[[Trace], Figure]] = {
    "timeline": lambda trace: draw_timeline(trace, "A finding"),
    "memory": lambda trace: draw_memory({"one": trace, "two": trace}, "A finding", guess_bytes=5e8),
    "requests": lambda trace: draw_requests(trace, "A finding"),
    "latency": lambda trace: draw_latency(trace, "A finding"),
    "traffic": lambda trace: draw_traffic(trace, "A finding"),
    "roofline": lambda trace: draw_roofline(DEVICES["T4"], "float32", measured_dots(trace), "A finding", trace=trace),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_say_finding_clock_device_model_and_units(name: str) -> None:
    figure = PICTURES[name](run_of())
    assert png(figure).startswith(b"\x89PNG")
    assert figure.get_suptitle() == "A finding"
    assert figure.get_supxlabel().startswith("measured · CPU, one thread a rank · SmolLM2-135M float32")
    labels = " ".join(axis.get_xlabel() + axis.get_ylabel() for axis in figure.axes)
    assert re.search(r"\(s\)|\(MB\)|MB|GB|ms|GFLOP/s", labels), labels


def test_timeline_names_lanes_and_shows_the_memory_of_the_fullest_rank() -> None:
    figure = draw_timeline(run_of(), "A finding", "a caption", ["first", "second"])
    assert "first" in texts(figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["rank 0", "rank 1"]
    assert figure.axes[1].get_ylabel() == "MB on rank 0"
    assert memory_steps(run_of(), 1)[Category.KV_CACHE][0] == (6.01, 2 * 10**8)


@pytest.mark.parametrize("name", ["timeline", "memory", "requests", "latency"])
def test_an_empty_trace_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match="generate something first"):
        PICTURES[name](Trace())


def test_traffic_counts_calls_and_bytes() -> None:
    assert traffic_of(run_of()) == {"all_reduce": {0: (1, 2_300_000), 1: (1, 2_300_000)}}
    assert "2.3 MB in 1 call" in texts(draw_traffic(run_of(), "A finding"))
    assert "no messages" in texts(draw_traffic(Trace(run_of().spans[:1]), "A finding"))


def test_the_live_timeline_grows_and_ends_as_the_still_one() -> None:
    run = run_of()
    view = Timeline(finding="It grows")
    assert still(view)
    view.push(run.spans[0])
    assert view.spans == [[0, "prefill", 0.0, 1.0, view.spans[0][4], ""]]
    assert "rank 0 · prefill · 1,000 ms" in view.spans[0][4]
    view.on_event(1, run.spans[0])
    view.on_event(1, "no span")
    view.show(run)
    assert len(view.spans) == len(run.spans)
    assert view.lanes == ["rank 0", "rank 1"]
    assert view.caption.startswith("measured")
    assert [category for category, _ in view.memory] == ["weights", "KV cache"]
    assert "sends 2.3 MB" in "".join(row[4] for row in view.spans)


def test_the_walk_is_worked_out_from_the_engines_own_formulas() -> None:
    walk = RooflineWalk()
    assert still(walk)
    config, table = SHAPES["Llama-3.1-8B"], walk.models["Llama-3.1-8B"]
    place = (BATCHES.index(64), CONTEXTS.index(4096))
    cost = decode_cost(config, 64, 4096, 2)
    assert table["products"][place[0]] == [cost.products.flops, cost.products.memory_bytes // 2]
    assert table["attention"][place[0]][place[1]] == [cost.attention.flops, cost.attention.memory_bytes // 2]
    assert table["weights"] == pytest.approx(8.03e9, rel=1e-3)  # the model's card
    intensities = {batch: decode_cost(config, batch, 4096, 2) for batch in BATCHES}
    assert intensities[512].products.intensity > 100 * intensities[1].products.intensity
    assert intensities[512].attention.intensity == pytest.approx(intensities[1].attention.intensity)


def test_shapes_are_the_published_ones() -> None:
    counts = {name: round(config.parameters / 1e6) for name, config in SHAPES.items()}
    llama = {"Llama-2-7B": 6738, "Llama-3.1-8B": 8030, "Llama-3.1-70B": 70554, "Llama-3.1-405B": 405853}
    assert counts == {"SmolLM2-135M": 135, **llama}


def test_a_picture_with_controls_answers_every_question() -> None:
    """Even the same one twice, and one whose picture fails: the browser must never wait for ever."""

    def draw(ranks: int, who_is_away: str) -> Figure:
        if ranks == 9:
            raise KeyError("nine")
        return new_figure(1.0)[0]

    view = WhatIf(draw, "What if?", ranks=[4, 2, 9], who_is_away=["nobody", "rank 0"])
    assert still(view)
    assert view.controls == {"ranks": [2, 4, 9], "who is away": ["nobody", "rank 0"]}
    assert (view.first, view.drawn) == ({"ranks": 4, "who is away": "nobody"}, 1)
    for ranks in (2, 4, 4, 9, 2):
        number = view.drawn
        view.asked = {"number": number + 1, "values": {"ranks": ranks, "who is away": "nobody"}}
        assert view.drawn == number + 1
        assert view.problem == ("KeyError: 'nine'" if ranks == 9 else "")
        assert bool(view.picture) == (ranks != 9)  # never that of other values
    with pytest.raises(ValueError, match="at least one control"):
        WhatIf(draw, "What if?")


def test_a_timeline_of_one_run_is_not_touched_by_the_next() -> None:
    run, view = run_of(), Timeline()
    view.show(run)
    count = len(run.spans)
    view.push(run.spans[0])
    assert len(run.spans) == count
    assert len(view.spans) == 1
    assert view.memory == []


def test_a_request_waits_while_steps_run_without_it() -> None:
    """Two steps of others in a row are one wait; after a preemption it waits, and is prefilled again."""
    life = RequestLife(0)
    moments = [(Event.ARRIVED, 0), (Event.STARTED, 0), (Event.TOKEN, 1), (Event.TOKEN, 4), (Event.PREEMPTED, 4), (Event.STARTED, 6), (Event.TOKEN, 7)]  # fmt: skip
    for what, when in moments:
        life.note(what, float(when))
    who = [(0,), (1,), (2,), (0, 1), (1,), (1,), (0, 1)]
    spans = [Span(0, Kind.DECODE, "decode", float(n), n + 1.0, n, request_ids=ids) for n, ids in enumerate(who)]
    assert _waits(Trace(spans, lives=[life]), life) == [(4.0, 6.0), (1.0, 3.0), (4.0, 6.0)]
    assert _again(life) == [(6.0, 7.0)]


def test_bars_survive_many_tokens() -> None:
    """White ticks and edges are left out where they would cover the bars."""
    life = RequestLife(0)
    life.note(Event.ARRIVED, 0.0)
    life.note(Event.STARTED, 0.1)
    for number in range(1500):
        life.note(Event.TOKEN, 1.0 + number / 100)
    spans = [Span(0, Kind.DECODE, "decode", 1.0 + n / 100, 1.01 + n / 100) for n in range(1500)]
    for figure in (draw_requests(Trace(lives=[life]), "A finding"), draw_timeline(Trace(spans), "A finding")):
        pixels = plt_image(figure)
        blue = (abs(pixels[..., 0] - 0.0) < 0.1) & (abs(pixels[..., 2] - 0.698) < 0.1)
        assert blue.sum() > 20_000


def plt_image(figure: Figure) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png(figure)))


def test_words() -> None:
    assert [plain(x) for x in (0, 1234.5, 45.67, 0.07891)] == ["0", "1,234", "45.7", "0.0789"]
    assert [bytes_text(x) for x in (12, 1500, 134.5e6, 1.6e10)] == ["12 bytes", "1.5 kB", "134 MB", "16 GB"]


def still(view: InteractivePicture) -> bool:
    """Whether a widget stores a PNG and a constant text."""
    bundle = view._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    return "image/png" in data and data["text/plain"] == f"{type(view).__name__}()"


def test_ring_view_lights_up_and_has_a_still_form() -> None:
    view = RingView(3)
    before = view.value
    view.on_event(1, "7")
    assert view.value != before
    assert ">7</text>" in view.value
    bundle = view._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert data["text/plain"] == "RingView(3)"
    assert "image/png" in data


def sitting(number: int, began: float, *tokens: float) -> RequestLife:
    moments = [(Event.ARRIVED, 0.0), (Event.STARTED, began), *((Event.TOKEN, at) for at in tokens)]
    return RequestLife(number, moments=moments)


def test_seats_are_taken_in_turn() -> None:
    """Two seats: the third request sits where the first one left."""
    lives = [sitting(0, 0.0, 1.0, 2.0), sitting(1, 0.0, 1.0, 5.0), sitting(2, 2.0, 3.0, 4.0)]
    assert [[life.request_id for life in seat] for seat in take_seats(lives)] == [[0, 2], [1]]
    assert busy_share(lives) == pytest.approx(0.9)
    figure = draw_seats({"one": Trace(lives=lives), "two": Trace(lives=lives[:2])}, "Seats are taken")
    assert png(figure).startswith(b"\x89PNG")
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "one: 5 s, seats taken 90% of the time",
        "two: 5 s, seats taken 70% of the time",
    ]
    with pytest.raises(ValueError, match="no request that got a token"):
        draw_seats({"none": Trace()}, "x")


def test_a_curve_of_throughput_over_latency() -> None:
    points = [Point(1, 20.0, 0.05), Point(8, 100.0, 0.08)]
    figure = draw_curve({"here": points}, "There is a knee", "measured · here", (60.0, "your guess"))
    axis = figure.axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("ms per token of one request (TPOT)", "tokens/s of all requests")
    assert {text.get_text() for text in axis.texts} == {"batch 1", "8", "your guess 60"}
    both = draw_curve({"a": points, "b": points[:1]}, "x", "y").axes[0]
    assert [text.get_text() for text in both.texts] == ["batch 1", "8", "1"]
    assert png(draw_curve({"a": points, "b": points[:1]}, "x", "y")).startswith(b"\x89PNG")


def test_a_look_at_the_blocks() -> None:
    """Two requests, one of them forked in the middle of a block; a finished one is kept."""
    scheduler = Scheduler(BlockPool(8, 4, reuse=True), EngineOptions())
    for number, length in enumerate((6, 3, 4)):
        scheduler.add(ScheduledRequest(number, [number] * length, length + 4, number))
    scheduler.postprocess(scheduler.schedule(0.0), [0, 0, 0])
    scheduler.remove(2)
    scheduler.fork(0, ScheduledRequest(9, [0] * 6 + [7], 10))
    cells = look(scheduler)
    assert cells[:4] == [(0, 2, 1.0), (0, 2, 0.5), (1, 1, 0.75), (-1, 0, 1.0)]
    assert set(cells[4:]) == {(-1, 0, 0.0)}
    assert split([(3, 1, 0.75), (-1, 0, 0.0)], 2) == [(3, 1, 1.0), (3, 1, 0.5), (-1, 0, 0.0), (-1, 0, 0.0)]
    figure = draw_blocks({"one": cells, "two": split(cells, 2)}, "Blocks", "measured")
    assert figure.axes[0].get_title(loc="left") == "one: 38% of the memory held, 75% of that filled"
    assert {"×2", "1"} == {text.get_text() for text in figure.axes[0].texts}
    live = BlockMap("Blocks")
    live.watch(scheduler)
    live.finish()
    assert live.steps[live.at][1] == [0, 2, 0.5]
    assert live.png().startswith(b"\x89PNG")
    assert BlockMap("nothing yet").png().startswith(b"\x89PNG")


def test_room_for_sequences() -> None:
    """Worked out by hand: Llama-2-7B in half precision leaves 0.5 MiB a token."""
    device, config = find_device("A100 80GB"), SHAPES["Llama-2-7B"]
    left = 0.9 * device.memory_bytes - 2 * config.parameters
    assert sequences_at_a_time(device, config, "float16", [100, 101], 50) == pytest.approx(left / (125 * 2**19))
    figure = draw_room(device, config, "float16", [100, 2000], "computed")
    assert figure.axes[0].get_xlabel() == "tokens in a block"
    assert png(figure).startswith(b"\x89PNG")
    none = draw_room(find_device("T4"), SHAPES["Llama-2-7B"], "float16", [4096], "computed")
    assert none.get_suptitle() == "Not one such sequence fits beside the weights"
    with pytest.raises(ValueError, match="the weights take 141.1 GB, and of the 16 GB of T4 90% are used"):
        draw_room(find_device("T4"), SHAPES["Llama-3.1-70B"], "float16", [10], "computed")


def test_batches_on_several_ranks_have_letters() -> None:
    """In the order in which they begin; a single request, a single rank or too many batches have none."""
    spans = [
        Span(rank, Kind.PREFILL, "prefill", rank + n, rank + n + 1, request_ids=(number,))
        for n, number in enumerate((7, 3, 7))
        for rank in (0, 1)
    ]
    assert batch_letters(Trace(spans)) == {(7,): "A", (3,): "B"}
    assert batch_letters(Trace(spans[::2])) == {}
    assert batch_letters(Trace([replace(span, request_ids=(1,)) for span in spans])) == {}
    assert batch_letters(Trace([replace(spans[n % 2], request_ids=(n,)) for n in range(40)])) == {}


@given(st.sampled_from(["columns", "rows"]), st.sampled_from(["columns", "rows"]), st.integers(2, 4))
@settings(deadline=None, max_examples=20)
def test_a_block_gives_the_whole_result_with_the_collectives_that_are_drawn(
    first: str, second: str, ranks: int
) -> None:
    """Computed as drawn: each rank multiplies its parts, and nothing is sent but what `sendings` says."""
    hidden, wide = 12, 24
    generator = torch.Generator().manual_seed(ranks)
    x, w, v = (
        torch.randn(shape, generator=generator).double() for shape in ((hidden,), (hidden, wide), (wide, hidden))
    )
    halves = lambda total: [slice(part.start, part.stop) for part in (share(total, ranks, r) for r in range(ranks))]  # noqa: E731

    def product(inputs: list[torch.Tensor], weight: torch.Tensor, cut: str) -> list[torch.Tensor]:
        if cut == "columns":
            return [each @ weight[:, part] for each, part in zip(inputs, halves(weight.shape[1]))]
        return [each @ weight[part] for each, part in zip(inputs, halves(weight.shape[0]))]

    def send(parts: list[torch.Tensor], sending: Sending | None) -> list[torch.Tensor]:
        if sending is None:
            return parts
        whole = torch.cat(parts) if sending.name == "all-gather" else torch.stack(parts).sum(0)
        assert sending.numbers == len(whole)
        return [whole[part] for part in halves(len(whole))] if sending.name == "reduce-scatter" else [whole] * ranks

    middle, end = sendings(first, second, hidden, wide)  # type: ignore[arg-type]
    asked = [x[part] for part in halves(hidden)] if first == "rows" else [x] * ranks
    made = [torch.tanh(each) for each in send(product(asked, w, first), middle)]
    for result in send(product(made, v, second), end):
        torch.testing.assert_close(result, torch.tanh(x @ w) @ v)
    if (first, second) != ("columns", "rows"):
        sent = [sent_numbers(*cut, ranks, 576, 1536) for cut in ((first, second), ("columns", "rows"))]  # type: ignore[arg-type]
        assert sent[0] > sent[1]
    figure = draw_block(first, second, ranks)  # type: ignore[arg-type]
    assert figure.get_suptitle().startswith(f"First by {first}, then by {second}: ")
    assert png(figure).startswith(b"\x89PNG")


def test_slices_over_devices_stop_helping_where_sums_cost_more() -> None:
    """By hand for one token on two A100s over NVLink: half of the weights to read, and 65 sums of 8 KB."""
    config, device, load = SHAPES["Llama-3.1-8B"], find_device("A100 80GB"), Load(1, 1, 0)
    one, two = (step_time(Layout(tp=count), device, find_link("NVLink 3"), config, "float16", load) for count in (1, 2))
    assert one.summed_s == 0 and two.computed_s == pytest.approx(one.computed_s / 2, rel=0.01)
    assert two.summed_s == pytest.approx(65 * (2e-6 + 8192 / 300e9), rel=0.01)  # both send all they have, once
    small = SHAPES["SmolLM2-135M"]
    uneven = step_time(Layout(tp=4), device, find_link("NVLink 3"), small, "float16", Load(1, 2048, 0)).computed_s
    fullest = replace(small, heads=3, kv_heads=1, intermediate_size=384, vocab_size=12288)  # ranks 2 and 3 of 4
    costs = predict_costs(fullest, device, "float16", 1, 2048)
    assert uneven == pytest.approx(costs.embedding_s + 30 * costs.layer_s + costs.head_s)
    said = {
        link: draw_slices(device, find_link(link), config, "float16", Load(1, 2048, 0), "planned").get_suptitle()
        for link in ("NVLink 3", "1 Gbit/s")
    }
    assert said["NVLink 3"].startswith("16 devices are fastest")
    assert said["1 Gbit/s"].startswith("One device is fastest; 2 take ")


def test_the_key_of_several_runs_names_the_colours_of_all() -> None:
    """The first run has no messages, the second has."""
    runs = {"one": replace(run_of(1), spans=run_of(1).spans[:5]), "two": run_of(2)}
    keys = [text.get_text() for text in draw_runs(runs, "A finding", "measured").axes[0].get_legend().get_texts()]
    assert keys == ["prefill: reads the prompt", "decode: next tokens", "communication", "waiting"]


def test_waits_grow_with_the_load_and_the_guess_stands_beside_them() -> None:
    runs = [Measured(0.5, [0.1, 0.4, 0.9]), Measured(0.9, [3.0, 5.0, 4.0])]
    axis = draw_waits(runs, "finding", "caption", guess=4.0).axes[0]
    worst, middle = (line.get_ydata() for line in axis.lines[:2])
    assert all(b > a for a, b in zip(middle, middle[1:])) and all(w > m for w, m in zip(worst, middle))
    assert middle[LOADS.index(0.9)] == pytest.approx(4.5)
    assert "your guess, 4 ×" in [text.get_text() for text in axis.texts]


def test_routers_stand_in_the_order_of_their_tails() -> None:
    points = {name: [(0.5, Estimate(value, None, value + 1)), (0.9, Estimate(9 * value, 8 * value, None))]
              for name, value in (("round-robin", 2.0), ("least-tokens", 1.0))}  # fmt: skip
    axis = draw_routers(points, "finding", "caption").axes[0]
    heights = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert heights["round-robin"] > heights["least-tokens"]
    bars = draw_bought({"one": 1.0, "two": 1.1}, {"one": 50, "two": 90}, "finding", "caption").axes
    assert [text.get_text() for text in bars[1].texts] == ["50 tokens/s", "90 tokens/s"]


def test_who_holds_what_is_drawn_in_the_colour_of_the_requests() -> None:
    axis = draw_held([{0: 3}, {1: 1, 0: 2}], 5, ["", ""], "finding", "caption").axes[0]
    colours = [to_hex(patch.get_facecolor()) for patch in axis.patches]
    assert colours == [SHADES[0]] * 3 + [FREE] * 2 + [SHADES[1], SHADES[0].lower(), SHADES[0].lower()] + [FREE] * 2
    history = [(0.0, [{0: 1}, {}]), (1.0, [{0: 5}, {0: 2}])]
    drawn = draw_lending(history, 5, {"somebody comes": 0.5}, "finding", "caption").axes
    assert [axis.get_title(loc="left") for axis in drawn] == ["instance 0: 5 blocks", "instance 1: 5 blocks"]
    with pytest.raises(ValueError, match="nothing has been heard"):
        draw_lending([], 5, {}, "finding", "caption")


def test_a_link_on_which_borrowing_stops_paying_is_named() -> None:
    names = ("NVLink 4", "25 Gbit/s", "1 Gbit/s")
    config, device = SHAPES["Llama-3.1-8B"], find_device("H100")
    worths = {name: worth_of(config, device, find_link(name), "bfloat16", 8192, 0.9) for name in names}
    figure = draw_worth(worths, "caption")
    assert figure._suptitle.get_text().endswith("it pays down to 25 Gbit/s")
    assert draw_worth({name: worths[name] for name in names[:2]}, "")._suptitle.get_text().endswith("on every link")
    assert "on none" in draw_worth({name: worths[name] for name in names[2:]}, "")._suptitle.get_text()


@pytest.mark.parametrize("queries", [1, 4096])
def test_the_lighter_of_queries_and_keys_travels(queries: int) -> None:
    figure = draw_travel(SHAPES["Llama-3.1-8B"], 2, queries, 1024, "caption")
    assert figure._suptitle.get_text().startswith("Send the query" if queries == 1 else "Send the keys")


def test_the_merge_is_that_of_all_keys_together() -> None:
    scores, values = [0.5, 2.0, -1.0, 0.0], [1.0, 2.0, 3.0, 4.0]
    weights = [math.exp(score) for score in scores]
    right = sum(weight * value for weight, value in zip(weights, values)) / sum(weights)
    for lengths in ([4], [2, 2], [1, 0, 3]):
        texts = [text.get_text() for text in draw_merge(scores, values, lengths, "caption").axes[0].texts]
        assert f"merged: {right:.3f}" in texts
    with pytest.raises(ValueError, match="3 keys on the ranks, but there are 4"):
        draw_merge(scores, values, [3], "caption")
