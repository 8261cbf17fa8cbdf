"""One step on one, two, four … devices that share every layer: what computing and reading take, and what the sums take."""

from __future__ import annotations

from dataclasses import dataclass, replace

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.hardware.devices import Device, Link
from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.model.cost import USABLE
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
    fits: bool = True  # whether the fullest rank's weights are within what is used of a device's memory

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
    weights = max(shard.weight_bytes(DTYPE_BYTES[dtype]) for shard in shards)
    return StepTime(computed_s, (2 * config.layers + 1) * one_sum, weights <= USABLE * device.memory_bytes)


def _computed_s(config: ModelConfig, part: tuple[int, int, int, int], device: Device, dtype: str, load: Load) -> float:
    heads, kv_heads, columns, words = part
    mine = replace(config, heads=heads, kv_heads=kv_heads, intermediate_size=columns, vocab_size=words)
    costs = predict_costs(mine, device, dtype, load.sequences, load.tokens, load.context)
    return costs.embedding_s + config.layers * costs.layer_s + costs.head_s


def draw_slices(device: Device, link: Link, config: ModelConfig, dtype: str, load: Load, caption: str) -> Figure:
    """A bar for each number of devices, computing and sums, hatched where the weights do not fit. The dotted line is the least
    number that holds them. For single tokens it is any pipeline too; a prompt may go through one in pieces.
    """
    counts = [count for count in COUNTS if count <= config.heads]
    times = [step_time(count, device, link, config, dtype, load) for count in counts]
    least = next((row for row, time in enumerate(times) if time.fits), None)
    colour = DECODE if load.tokens == 1 else PREFILL
    scale, unit = time_unit(max(time.total_s for time in times))
    most = max(time.total_s for time in times) * scale
    figure, (axis,) = new_figure(3.3)
    for row, time in enumerate(times):
        looks = {} if time.fits else {"facecolor": "white", "edgecolor": FAINT, "hatch": "////"}
        axis.barh(row, time.computed_s * scale, height=0.62, **looks or {"color": colour})
        axis.barh(
            row, time.summed_s * scale, left=time.computed_s * scale, height=0.62, **looks or {"color": COMMUNICATION}
        )
        beside = _beside(times[least], time) if least is not None and time.fits and row != least else ""
        said = f"{plain(time.total_s * scale)} {unit}{beside}" if time.fits else "does not fit"
        place = axis.annotate(
            said, (time.total_s * scale, row), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9.5
        )
        place.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    if least is not None:
        at, who = times[least].total_s * scale, "one device" if least == 0 else f"{counts[least]} devices"
        axis.axvline(at, color=FAINT, linewidth=1.3, linestyle=":", zorder=0)
        also = ", or any pipeline" if load.tokens == 1 and least == 0 else ""
        axis.text(at, -0.5, f" {who}{also}", color=FAINT, fontsize=9, va="bottom")
    axis.set(xlabel=f"{unit} for a step", ylabel="devices", ylim=(len(counts) - 0.4, -0.9), xlim=(0, most * 1.2))
    axis.set_yticks(range(len(counts)), [str(count) for count in counts])
    axis.tick_params(axis="y", length=0)
    legend(
        axis,
        [Patch(color=colour), Patch(color=COMMUNICATION)],
        ["computes and reads, the fullest rank", "sums"],
    )
    heads = "" if counts == list(COUNTS) else f" · {config.heads} heads, so at most {config.heads} devices"
    return frame(figure, _finding(counts, times), caption + heads)


def _finding(counts: list[int], times: list[StepTime]) -> str:
    rows = [row for row, time in enumerate(times) if time.fits]
    if not rows:
        return f"Not even {counts[-1]} devices hold the weights"
    least, best = rows[0], min(rows, key=lambda row: times[row].total_s)
    few = "one" if least == 0 else f"{counts[least]}, the least that hold it"
    gain = times[least].total_s / times[best].total_s
    if best == least:
        who = "One device is" if least == 0 else f"{counts[least]} devices hold it, and are"
        if least == len(times) - 1:
            return f"{who} all there is"
        slower = times[least + 1].total_s / times[least].total_s
        return f"{who} fastest; {counts[least + 1]} take {plain(slower)} times as long"
    said = f"{counts[best]} devices are fastest, {plain(gain)} times as fast as {few}"
    if best == len(times) - 1:
        return f"{said}; sums are {times[best].summed_s / times[best].total_s:.0%} of their time"
    return f"{said}; with more, sums cost more than they save"


def _beside(one: StepTime, many: StepTime) -> str:
    gain = one.total_s / many.total_s
    return f", {plain(gain)} × as fast" if gain >= 1 else f", {plain(1 / gain)} × as long"
