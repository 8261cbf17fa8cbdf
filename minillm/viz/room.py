"""How many sequences fit beside the weights, by block size: from single tokens to one reservation of the whole context."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from minillm.hardware.devices import Device
from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.model.cost import cache_room_bytes
from minillm.viz.style import FAINT, GUESS, INK, KV_CACHE, frame, new_figure
from minillm.viz.words import plain, plain_log, round_ticks


def sequences_at_a_time(
    device: Device, config: ModelConfig, dtype: str, lengths: Sequence[int], block_size: int
) -> float:
    """Sequences of these lengths that the memory left by the weights holds, in blocks of `block_size` tokens.

    Raises `ValueError` for a model whose weights do not fit.
    """
    places = sum(-(-length // block_size) * block_size for length in lengths) / len(lengths)
    return cache_room_bytes(config, device, dtype) / (places * config.kv_numbers_per_token * DTYPE_BYTES[dtype])


def draw_room(device: Device, config: ModelConfig, dtype: str, lengths: Sequence[int], caption: str) -> Figure:
    """Sequences at a time over the block size, both logarithmic; blocks of 16 and the whole context are marked."""
    sizes = [2**power for power in range(20) if 2**power < config.max_positions] + [config.max_positions]
    room = [sequences_at_a_time(device, config, dtype, lengths, size) for size in sizes]
    figure, (axis,) = new_figure(3.4)
    axis.plot(sizes, room, color=KV_CACHE, marker="o", markersize=5, linewidth=2)
    axis.set(xscale="log", yscale="log", xlabel="tokens in a block", ylabel="sequences at a time")
    axis.set_ylim(min(room) / 3, max(room) * 2)
    axis.axhline(1, color=FAINT, linewidth=0.8)
    axis.set_yticks(round_ticks(*axis.get_ylim()))
    plain_log(axis)
    axis.set_xticks(sizes[::3])
    marked = room[sizes.index(16)]
    axis.annotate(
        f"16 tokens: {_count(marked)}", (16, marked), xytext=(0, 12), textcoords="offset points", ha="center", color=INK
    )
    axis.annotate(
        f"the whole context, {config.max_positions:,}: {_count(room[-1])}", (sizes[-1], room[-1]), xytext=(0, -18),
        textcoords="offset points", ha="right", color=GUESS,
    )  # fmt: skip
    gain = marked / room[-1]
    finding = f"Blocks of 16 hold {plain(gain)} times as many sequences as reservations"
    if gain < 1.3:
        finding = "Little is wasted by reservations when sequences fill them"
    if marked < 1:
        finding = "Not one such sequence fits beside the weights"
    return frame(figure, finding, caption)


def _count(sequences: float) -> str:
    """As many as whole ones fit."""
    return f"{int(sequences):,}" if sequences >= 1 else "not one"
