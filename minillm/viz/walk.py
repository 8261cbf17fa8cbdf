"""The roofline walk: one decode step as two dots on a device's roof, moved by batch and context.

Products with weights gain a reader with every request of the batch; attention reads every request's own cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import traitlets
from matplotlib.figure import Figure

from minillm.hardware.devices import DEVICES, Device
from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.model.cost import decode_cost
from minillm.model.shapes import SHAPES
from minillm.viz.roofline import Dot, draw_roofline
from minillm.viz.style import KV_CACHE, WEIGHTS, png
from minillm.viz.widget import InteractivePicture, script

BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
CONTEXTS = [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
STILL = "Llama-3.1-8B"
QUESTION = "One decode step on the roof: which dot does a larger batch lift?"
FINDING = "A larger batch lifts the products with weights; it never lifts attention"


def dtype_on(device: Device) -> str:
    """What serving uses there: half precision where the device has a rate for it."""
    return next(name for name in ("bfloat16", "float16", "float32") if name in device.flops)


class RooflineWalk(InteractivePicture):
    """Sliders for batch and context, selectors for model and device; redrawn in the browser.

    `here` is this machine as `measure_ceilings()` found it; it stands first in the list. The costs are those of
    `model/cost.py`, worked out for every position of the sliders.
    """

    _esm = script("walk")
    devices: Any = traitlets.List().tag(sync=True)
    models: Any = traitlets.Dict().tag(sync=True)
    batches: Any = traitlets.List(BATCHES).tag(sync=True)
    contexts: Any = traitlets.List(CONTEXTS).tag(sync=True)
    question = traitlets.Unicode(QUESTION).tag(sync=True)  # the title until the batch has been at its end
    finding = traitlets.Unicode(FINDING).tag(sync=True)

    def __init__(self, here: Device | None = None, models: Mapping[str, ModelConfig] | None = None) -> None:
        super().__init__()
        self._here = here
        self._shapes = dict(models or SHAPES)
        self.devices = [_row(device) for device in [*([here] if here else []), *DEVICES.values()]]
        self.models = {name: _table(config) for name, config in self._shapes.items()}

    def png(self) -> bytes:
        """The still form: an H200 and the 8B model, or the first there is."""
        name = STILL if STILL in self._shapes else next(iter(self._shapes))
        return png(draw_walk(name, self._shapes[name], DEVICES["H200"]))


def draw_walk(
    name: str, config: ModelConfig, device: Device, batches: Sequence[int] = (1, 16, 64, 512), context: int = 4096
) -> Figure:
    """The same picture standing still: products at several batches, attention, on the roof of one device."""
    dtype = dtype_on(device)
    peak = device.flops_per_s(dtype)
    dots = []
    for batch in batches:
        products = decode_cost(config, batch, context, DTYPE_BYTES[dtype]).products
        allowed = min(peak, products.intensity * device.bytes_per_s)
        dots.append(Dot(f"products, batch {batch}", products.intensity, allowed, WEIGHTS))
    attention = decode_cost(config, 1, context, DTYPE_BYTES[dtype]).attention
    allowed = min(peak, attention.intensity * device.bytes_per_s)
    dots.append(Dot("attention, any batch", attention.intensity, allowed, KV_CACHE))
    caption = (
        f"planned from formulas and {device.name}'s datasheet · decode of {name} {dtype}, {context:,} tokens of context"
    )
    return draw_roofline(device, dtype, dots, FINDING, caption, shares=False)


def _row(device: Device) -> dict[str, Any]:
    dtype = dtype_on(device)
    return {
        "name": device.name, "dtype": dtype, "element_bytes": DTYPE_BYTES[dtype], "flops": device.flops[dtype],
        "bytes_per_s": device.bytes_per_s, "memory_bytes": device.memory_bytes, "source": device.source,
    }  # fmt: skip


def _table(config: ModelConfig) -> dict[str, Any]:
    """Operations and numbers moved (bytes of one-byte numbers) at every position of the sliders."""
    costs = {(batch, context): decode_cost(config, batch, context, 1) for batch in BATCHES for context in CONTEXTS}
    return {
        "weights": config.parameters,
        "kv_per_token": config.kv_numbers_per_token,
        "room": config.max_positions,
        "products": [_pair(costs[batch, CONTEXTS[0]].products) for batch in BATCHES],
        "attention": [[_pair(costs[batch, context].attention) for context in CONTEXTS] for batch in BATCHES],
    }


def _pair(cost: Any) -> list[int]:
    return [cost.flops, cost.memory_bytes]
