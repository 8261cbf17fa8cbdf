"""Queries and the keys they need are on different ranks: which of the two should travel, in bytes."""

from __future__ import annotations

from matplotlib.figure import Figure

from minillm.distkv.spread import answer_bytes, key_bytes
from minillm.model.config import ModelConfig
from minillm.viz.style import COMMUNICATION, FAINT, INK, KV_CACHE, frame, legend, new_figure
from minillm.viz.words import bytes_text, plain, plain_log, round_ticks

LENGTHS = [2**power for power in range(4, 18)]


def draw_travel(config: ModelConfig, element_bytes: int, queries: int, keys: int, caption: str) -> Figure:
    """Bytes of one layer over how many keys are elsewhere: the queries go and answers come back, or the keys come. `keys` is marked."""
    asking = queries * answer_bytes(config.heads, config.head_dim, element_bytes)
    one_key = key_bytes(config.kv_heads, config.head_dim, element_bytes)
    figure, (axis,) = new_figure(3.7)
    asked = axis.axhline(asking, color=COMMUNICATION, linewidth=2.4)
    (moved,) = axis.plot(LENGTHS, [length * one_key for length in LENGTHS], color=KV_CACHE, linewidth=2.4)
    meet = asking / one_key
    if LENGTHS[0] < meet < LENGTHS[-1]:
        axis.plot([meet], [asking], marker="o", markersize=8, markerfacecolor="white", markeredgecolor=INK, zorder=4)
        place, side = ((0, -16), "left") if meet < LENGTHS[-5] else ((0, 8), "right")  # where no line runs
        axis.annotate(
            f"as many bytes at {plain(meet)} keys", (meet, asking), xytext=place, textcoords="offset points",
            ha=side, color=INK,
        )  # fmt: skip
    axis.axvline(keys, color=FAINT, linestyle=":", linewidth=1.3, zorder=0)
    what = "the query goes, its answer comes" if queries == 1 else f"{queries:,} queries go, answers come"
    said = [f"{what}: {bytes_text(asking)}", f"{keys:,} keys and values come: {bytes_text(keys * one_key)}"]
    legend(axis, [asked, moved], said)
    axis.plot([keys], [keys * one_key], marker="o", markersize=6, color=KV_CACHE)
    axis.set(xscale="log", yscale="log", xlabel="keys that lie on the other rank", ylabel="bytes, one layer")
    low, high = min(asking, LENGTHS[0] * one_key), max(asking, LENGTHS[-1] * one_key)
    axis.set_ylim(low / 4, high * 4)
    axis.set_yticks(
        round_ticks(*axis.get_ylim())[::2], [bytes_text(tick) for tick in round_ticks(*axis.get_ylim())[::2]]
    )
    axis.set_xticks(LENGTHS[::3])
    plain_log(axis, "x")
    axis.minorticks_off()
    moving, times = keys * one_key, max(asking, keys * one_key) / min(asking, keys * one_key)
    finding = f"Send the quer{'y' if queries == 1 else 'ies'}: the keys would be {plain(times)} times the bytes"
    if moving < asking:
        finding = f"Send the keys: so many queries would be {plain(times)} times the bytes"
    return frame(figure, finding, caption)
