"""One token's time on one, two, … devices that each hold some of the layers: what more devices buy, and what they do not."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.hardware.devices import Device, Link
from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.model.cost import USABLE
from minillm.viz.style import COMMUNICATION, DECODE, INK, WAITING, frame, legend, new_figure
from minillm.viz.words import plain, time_unit

MOST_DEVICES = 8


@dataclass(frozen=True)
class TokenTime:
    """Seconds of one decode step for one sequence: weights read where they are, weights fetched from the host because they
    do not fit, and hidden states handed on.
    """

    read_s: float
    fetched_s: float
    sent_s: float

    @property
    def total_s(self) -> float:
        """One after the other: a stage waits for the one before."""
        return self.read_s + self.fetched_s + self.sent_s


def token_time(devices: int, device: Device, link: Link, host: Link, config: ModelConfig, dtype: str) -> TokenTime:
    """By the roofline, the layers spread evenly over `devices` and joined by `link`; what does not fit into their memory comes
    from the host's over `host`, for every token.
    """
    size = DTYPE_BYTES[dtype]
    weights = config.parameters * size
    resident = min(weights, devices * USABLE * device.memory_bytes)
    message = config.hidden_size * size
    return TokenTime(
        resident / device.bytes_per_s, (weights - resident) / host.bytes_per_s, (devices - 1) * link.time_s(message)
    )


def draw_stack(device: Device, link: Link, host: Link, config: ModelConfig, dtype: str, caption: str) -> Figure:
    """A bar for each number of devices up to eight, in the three parts of `TokenTime`."""
    times = [token_time(count, device, link, host, config, dtype) for count in range(1, MOST_DEVICES + 1)]
    scale, unit = time_unit(max(time.total_s for time in times))
    figure, (axis,) = new_figure(3.7)
    for count, time in enumerate(times, 1):
        left = 0.0
        for part, colour in ((time.read_s, DECODE), (time.sent_s, COMMUNICATION), (time.fetched_s, WAITING)):
            hatch = "////" if colour == WAITING else None
            axis.barh(
                count, part * scale, left=left, height=0.62, color=colour, hatch=hatch, edgecolor="white", linewidth=0
            )
            left += part * scale
        axis.text(left, count, f"  {plain(left)} {unit}", va="center", color=INK, fontsize=9.5)
    axis.set(xlabel=f"{unit} for one token", ylabel="devices", ylim=(MOST_DEVICES + 0.6, 0.4))
    axis.set_yticks(range(1, MOST_DEVICES + 1))
    axis.set_xlim(0, max(time.total_s for time in times) * scale * 1.14)
    axis.tick_params(axis="y", length=0)
    handles = [
        Patch(color=DECODE),
        Patch(color=COMMUNICATION),
        Patch(facecolor=WAITING, hatch="////", edgecolor="white"),
    ]
    legend(
        axis, handles, ["reads weights from its own memory", "hidden states, sent on", "weights fetched from the host"]
    )
    return frame(figure, _finding(times), caption)


def _finding(times: list[TokenTime]) -> str:
    enough = next((count for count, time in enumerate(times, 1) if time.fetched_s == 0), None)
    if enough is None:
        return f"Even {MOST_DEVICES} do not hold it, so each token waits for the host"
    slower = times[-1].total_s / times[enough - 1].total_s
    more = f"{MOST_DEVICES} take {slower:.2g} times as long" if slower > 1.1 else "more gain nothing"
    if enough == 1:
        return f"One device holds it: {more}"
    gain = times[0].total_s / times[enough - 1].total_s
    return f"{enough} devices hold it, and are {gain:.2g} times as fast as one; {more}"
