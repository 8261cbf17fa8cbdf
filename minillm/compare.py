"""Every mode that fits this machine, on the same prompts: are the tokens the same, how fast, how much memory, what is sent.

Each mode generates as fast as it can (*measured*), and once more with one rank computing at a time, which is then *replayed*, as
if each rank had a device like this one to itself. The peak of activations is that of reading the prompts, where it is highest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from statistics import median

import psutil

from minillm.engine.request import RequestOutput
from minillm.hardware.devices import Link
from minillm.hardware.machine import usable_cores
from minillm.llm import LLM
from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.model.sampling import SamplingParams
from minillm.parallel.hybrid import fitting
from minillm.parallel.instance import start_pools
from minillm.parallel.layout import Layout
from minillm.parallel.shards import Shard
from minillm.policy.options import EngineOptions
from minillm.ranks.launch import Launch
from minillm.ranks.pool import Ranks
from minillm.ranks.speed import measure_link
from minillm.trace.life import RequestLife
from minillm.trace.metrics import Report
from minillm.trace.replay import replay, replayed_lives
from minillm.trace.trace import Category, Kind, Trace

REQUESTS, PROMPT, NEW = 6, 24, 8
ROOM_BYTES = 250e6  # that a rank takes beside its weights


@dataclass(frozen=True)
class Speed:
    """Medians over requests in seconds, and output tokens per second of all."""

    ttft_s: float
    tpot_s: float
    tokens_per_s: float

    @classmethod
    def of(cls, lives: Sequence[RequestLife]) -> Speed:
        """From the lives of requests that all finished."""
        rate = Report.of(lives).tokens_per_s
        return cls(median(life.ttft_s for life in lives), median(life.tpot_s for life in lives), rate)


@dataclass(frozen=True)
class Row:
    """What a mode did; with `reason` why it did nothing.

    `memory` is the peak of each rank's bytes by category; `sent` the messages and bytes of each name, of all ranks together.
    """

    mode: str
    layout: str
    ranks: int
    reason: str = ""
    same_tokens: bool = False
    measured: Speed | None = None
    replayed: Speed | None = None
    memory: dict[int, dict[str, int]] = field(default_factory=dict)
    sent: dict[str, dict[str, int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """All figures, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Mode:
    """A way to run the model: `in_flight` batches on a layout."""

    name: str
    layout: Layout
    in_flight: int | None = None


def modes(config: ModelConfig, ranks: int) -> list[Mode]:
    """One device, layers over devices, and every layout of `ranks` ranks that the model can be cut by, pure ones first; those of one
    stage also with the experts shared out, where the model has some.

    Raises `ValueError` for less than two ranks.
    """
    if ranks < 2:
        raise ValueError(f"--ranks {ranks}: give a whole number from 2; 4 is the least that has hybrids")
    found = [Mode("one device", Layout())]
    layouts = [layout for layout in fitting(config, ranks) if layout.world_size > 1]
    for layout in sorted(layouts, key=lambda each: (each.dp == 1 and -1, -each.dp, len(_axes(each)), each.tp)):
        if _axes(layout) == ["pp"]:
            found.append(Mode("layers over devices", layout, in_flight=1))
        found.append(Mode(_name(layout), layout))
    for layout in [mode.layout for mode in found if mode.layout.world_size > 1 and mode.layout.pp == 1]:
        if config.moe is not None and ranks <= config.moe.experts:
            found.append(Mode(f"experts, {_name(layout)}", replace(layout, ep=ranks)))
    return found


def compare(
    checkpoint: str | Path | None, ranks: int, on: str | None = None, launch: Launch | None = None
) -> Iterator[Row]:
    """Run mode after mode on CPUs or GPUs, and yield what each did. The first one, on one device, is what the others are held to.

    Raises `ValueError` for a number of ranks that a launcher has not started.
    """
    if launch is not None and ranks != len(launch.cards):
        raise ValueError(f"--ranks {ranks}: the launcher has started {len(launch.cards)}; leave --ranks out")
    prompts = [[100 + 7 * number + place for place in range(PROMPT)] for number in range(REQUESTS)]
    with LLM(checkpoint, device=on, dtype="float32") as one:
        expected = one.generate(prompts, SamplingParams(max_tokens=NEW, ignore_eos=True))
        todo = modes(one.config, ranks)
        config, dtype, device = one.config, str(one.dtype).removeprefix("torch."), one.device
        yield _run(todo[0], one, prompts, expected, None)
    for count, groups in groupby(_by_layout(todo[1:]), key=lambda group: group[0].layout.instances):
        with ExitStack() as held:  # layouts with as many replicas run on the same ranks, one after the other
            pools: list[Ranks] = []
            for group in groups:
                layout = group[0].layout
                needed, room = _bytes_needed(config, layout, dtype), psutil.virtual_memory().available
                if launch is None and device.type == "cpu" and needed > room:
                    reason = f"takes {needed / 1e9:.1f} GB of memory, and {room / 1e9:.1f} are free"
                    yield from (Row(mode.name, str(layout), layout.world_size, reason) for mode in group)
                    continue
                if not pools:
                    pools = launch.split(count, device.type) if launch else start_pools(layout, device.type)
                    for pool in pools:
                        held.enter_context(pool)
                yield from _on_ranks(
                    group, LLM(checkpoint, layout, device.type, "float32", ranks=pools), prompts, expected
                )


def _on_ranks(
    group: list[Mode], llm: LLM, prompts: list[list[int]], expected: list[RequestOutput]
) -> Iterator[Row]:  # fmt: skip
    """Modes that have their weights in common."""
    with llm:
        ranks = llm.instance.ranks
        link = measure_link(ranks) if ranks.world_size > 1 else None
        for mode in group:
            twin = llm.with_options(EngineOptions(in_flight=mode.in_flight))
            yield _run(mode, twin, prompts, expected, link)
            twin.close()


def _run(mode: Mode, llm: LLM, prompts: list[list[int]], expected: list[RequestOutput], link: Link | None) -> Row:
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    llm.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True))  # warm
    outputs = llm.generate(prompts, params)
    measured = Speed.of(list(llm.trace.lives))
    peaks = _peaks(llm.trace)
    for rank, held in _peaks(llm.measure_memory(prompts, replace(params, max_tokens=1))).items():
        peaks[rank][Category.ACTIVATIONS.value] = held.get(Category.ACTIVATIONS.value, 0)
    recorded = llm.record_for_replay(prompts, params)
    again = Speed.of(replayed_lives(recorded, replay(recorded, link)))
    same = [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    return Row(
        mode.name, str(mode.layout), mode.layout.world_size, "", same, measured, again, peaks, sent_by_name(recorded)
    )  # fmt: skip


def _peaks(trace: Trace) -> dict[int, dict[str, int]]:
    return {rank: {key.value: size for key, size in trace.peak_bytes(rank).items()} for rank in trace.ranks}


def sent_by_name(trace: Trace) -> dict[str, dict[str, int]]:
    """The messages of a trace by what they carry: how many, and their bytes, of all ranks together."""
    sums: dict[str, dict[str, int]] = defaultdict(lambda: {"messages": 0, "bytes": 0})
    for span in trace.spans:
        if span.kind is Kind.COMMUNICATION:
            sums[span.name]["messages"] += 1
            sums[span.name]["bytes"] += span.message_bytes
    return dict(sums)


def _axes(layout: Layout) -> list[str]:
    return [axis for axis in ("dp", "pp", "tp") if getattr(layout, axis) > 1]


def _name(layout: Layout) -> str:
    names = {"dp": "data", "pp": "pipeline", "tp": "tensor"}
    return " × ".join(names[axis] for axis in _axes(layout))


def _by_layout(each: Sequence[Mode]) -> list[list[Mode]]:
    """Modes that run on the same weights, together."""
    groups: dict[Layout, list[Mode]] = defaultdict(list)
    for mode in each:
        groups[mode.layout].append(mode)
    return list(groups.values())


def _bytes_needed(config: ModelConfig, layout: Layout, dtype: str) -> float:
    """Of all ranks together; while they load, a replica's weights are there twice."""
    each = sum(Shard(config, layout, rank).weight_bytes(DTYPE_BYTES[dtype]) for rank in range(layout.world_size))
    return each * (1 + 1 / layout.instances) + layout.world_size * ROOM_BYTES


def as_text(rows: Sequence[Row]) -> str:
    """A table for people, and what its columns mean."""
    head = ["mode", "layout", "tokens", "TTFT", "TPOT", "tokens/s", "TTFT", "TPOT", "tokens/s", "weights", "KV", "activ.", "sent for a token"]  # fmt: skip
    table = [head]
    for row in rows:
        if row.measured is None or row.replayed is None:
            table.append([row.mode, row.layout, row.reason])
            continue
        speeds = [
            f"{value:.0f}" for speed in (row.measured, row.replayed)
            for value in (speed.ttft_s * 1e3, speed.tpot_s * 1e3, speed.tokens_per_s)
        ]  # fmt: skip
        fullest = max(row.memory.values(), key=lambda held: sum(held.values()))
        held = [f"{fullest.get(name, 0) / 1e6:.0f}" for name in ("weights", "KV cache", "activations")]
        each = {name: count["bytes"] / REQUESTS / NEW for name, count in row.sent.items() if name != "work"}
        much = sorted((name for name in each if each[name] > 0.01 * max(each.values())), key=lambda name: -each[name])
        sent = ", ".join(f"{name} {each[name] / 1e3:.0f} kB" for name in much)
        table.append([row.mode, row.layout, "same" if row.same_tokens else "DIFFER", *speeds, *held, sent or "nothing"])
    widths = [max(len(line[place]) for line in table if len(line) == len(head)) for place in range(len(head))]
    pad = ["<", "<", "<", *">" * 9, "<"]
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, pad, widths)).rstrip() for line in table
    ]
    begin = [sum(widths[:place]) + 2 * place for place in (3, 6, 9)]
    above = " " * begin[0] + "measured (ms)".ljust(begin[1] - begin[0]) + "replayed (ms)".ljust(begin[2] - begin[1])
    return "\n".join([above + "peak of the fullest rank (MB)", *lines, "", *_legend()])


def _legend() -> list[str]:
    return [
        f"{REQUESTS} prompts of {PROMPT} tokens at once, {NEW} new tokens each; medians over requests; tokens beside those of one device.",
        f"measured: as it ran, on {usable_cores()} cores. replayed: each rank has a device like this one to itself, and messages take",
        "what they take between two ranks here. sent: bytes of all ranks for each new token; what is below 1 % of it is left out.",
    ]
