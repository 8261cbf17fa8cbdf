"""How the KV cache grows with length and batch, beside the weights that stay: by formula, for any model's shape."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from minillm.hardware.devices import Device
from minillm.model.config import ModelConfig
from minillm.viz.style import FAINT, INK, KV_CACHE, WEIGHTS, frame, new_figure
from minillm.viz.words import plain, plain_log

CONTEXTS = [2**power for power in range(7, 16)]  # 128 … 32,768


def draw_kv_growth(
    name: str, config: ModelConfig, device: Device, batches: Sequence[int], finding: str, element_bytes: int = 2
) -> Figure:
    """A line per batch over tokens of context, weights and device memory as levels; both axes logarithmic."""
    per_token = 2 * config.layers * config.kv_heads * config.head_dim * element_bytes
    weights = config.parameters * element_bytes
    figure, (axis,) = new_figure(3.9)
    for batch in batches:
        sizes = [batch * context * per_token / 1e9 for context in CONTEXTS]
        axis.plot(CONTEXTS, sizes, color=KV_CACHE, linewidth=2)
        axis.text(CONTEXTS[-1] * 1.06, sizes[-1], f"KV cache, batch {batch}", color=KV_CACHE, va="center", fontsize=9.5)
    for level, text, colour in (
        (weights, f"weights, {plain(weights / 1e9)} GB", WEIGHTS),
        (device.memory_bytes, f"all of one {device.name}, {plain(device.memory_bytes / 1e9)} GB", FAINT),
    ):
        axis.axhline(level / 1e9, color=colour, linewidth=2, linestyle="-" if colour == WEIGHTS else ":")
        axis.text(CONTEXTS[0] * 1.05, level / 1e9 * 1.12, text, color=INK, fontsize=9.5)
    axis.set(xscale="log", yscale="log", xlabel="tokens of context, each request", ylabel="GB", xlim=(CONTEXTS[0], CONTEXTS[-1]))  # fmt: skip
    axis.set_xticks(CONTEXTS, [plain(context) for context in CONTEXTS])
    axis.minorticks_off()
    plain_log(axis, "y")
    return frame(
        figure,
        finding,
        f"planned from the formula · {name}, {element_bytes} bytes a number · {plain(per_token / 1e3)} kB a token",
    )
