"""One step on one, two, four … devices that share every layer: what computing and reading take, and what the sums take."""

from __future__ import annotations

from dataclasses import dataclass, replace

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.hardware.devices import Device, Link
from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.parallel.balance import predict_costs
from minillm.parallel.layout import Layout
from minillm.parallel.shards import Shard
from minillm.trace.collectives import ALGORITHMS
from minillm.viz.style import COMMUNICATION, DECODE, FAINT, PREFILL, frame, legend, new_figure
from minillm.viz.words import plain, time_unit

COUNTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Load:
    """What a step takes in: `tokens` new ones of each of some `sequences`, after `context` others."""

    sequences: int
    tokens: int
    context: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: what the fullest rank computes, and what all ranks wait for the sums."""

    computed_s: float
    summed_s: float

    @property
    def total_s(self) -> float:
        """A block begins when the sum of the one before is there, so that they add."""
        return self.computed_s + self.summed_s


def step_time(count: int, device: Device, link: Link, config: ModelConfig, dtype: str, load: Load) -> StepTime:
    """By the roofline, with tp=`count`; 2 sums a layer and the embedding's, each by the algorithm that is fastest then."""
    shards = [Shard(config, Layout(tp=count), rank) for rank in range(count)]
    parts = {(len(shard.heads), len(shard.kv_heads), len(shard.columns), len(shard.vocabulary)) for shard in shards}
    computed_s = max(_computed_s(config, part, device, dtype, load) for part in parts)
    message = load.sequences * load.tokens * config.hidden_size * DTYPE_BYTES[dtype]
    one_sum = min(algorithm(count, message, link) for algorithm in ALGORITHMS.values())
    return StepTime(computed_s, (2 * config.layers + 1) * one_sum)


def _computed_s(config: ModelConfig, part: tuple[int, int, int, int], device: Device, dtype: str, load: Load) -> float:
    heads, kv_heads, columns, words = part
    mine = replace(config, heads=heads, kv_heads=kv_heads, intermediate_size=columns, vocab_size=words)
    costs = predict_costs(mine, device, dtype, load.sequences, load.tokens, load.context)
    return costs.embedding_s + config.layers * costs.layer_s + costs.head_s


def draw_slices(device: Device, link: Link, config: ModelConfig, dtype: str, load: Load, caption: str) -> Figure:
    """A bar for each number of devices, computing and sums; the dotted line is one device. For single tokens it is any pipeline too;
    a prompt may go through one in pieces.
    """
    counts = [count for count in COUNTS if count <= config.heads]
    times = [step_time(count, device, link, config, dtype, load) for count in counts]
    colour = DECODE if load.tokens == 1 else PREFILL
    scale, unit = time_unit(max(time.total_s for time in times))
    most = max(time.total_s for time in times) * scale
    figure, (axis,) = new_figure(3.3)
    for row, time in enumerate(times):
        axis.barh(row, time.computed_s * scale, height=0.62, color=colour)
        axis.barh(row, time.summed_s * scale, left=time.computed_s * scale, height=0.62, color=COMMUNICATION)
        said = f"{plain(_two_digits(time.total_s * scale))} {unit}{_beside(times[0], time) if row else ''}"
        place = axis.annotate(
            said, (time.total_s * scale, row), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9.5
        )
        place.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    axis.axvline(times[0].total_s * scale, color=FAINT, linewidth=1.3, linestyle=":", zorder=0)
    axis.text(
        times[0].total_s * scale,
        -0.5,
        f" one device{', or any pipeline' if load.tokens == 1 else ''}",
        color=FAINT,
        fontsize=9,
        va="bottom",
    )
    axis.set(xlabel=f"{unit} for a step", ylabel="devices", ylim=(len(counts) - 0.4, -0.9), xlim=(0, most * 1.2))
    axis.set_yticks(range(len(counts)), [str(count) for count in counts])
    axis.tick_params(axis="y", length=0)
    legend(
        axis,
        [Patch(color=colour), Patch(color=COMMUNICATION)],
        ["computes and reads, the fullest rank", "sums"],
    )
    return frame(figure, _finding(counts, times), caption)


def _finding(counts: list[int], times: list[StepTime]) -> str:
    best = min(range(len(times)), key=lambda row: times[row].total_s)
    gain = times[0].total_s / times[best].total_s
    if best == 0:
        slower = times[1].total_s / times[0].total_s
        return f"One device is fastest; two take {plain(_two_digits(slower))} times as long"
    said = f"{counts[best]} devices are fastest, {plain(_two_digits(gain))} times as fast as one"
    if best == len(times) - 1:
        share = times[best].summed_s / times[best].total_s
        return f"{said}; sums are {share:.0%} of their time"
    return f"{said}; with more, sums cost more than they save"


def _beside(one: StepTime, many: StepTime) -> str:
    gain = one.total_s / many.total_s
    return f", {plain(_two_digits(gain))} × as fast" if gain >= 1 else f", {plain(_two_digits(1 / gain))} × as long"


def _two_digits(number: float) -> float:
    return float(f"{number:.2g}")
