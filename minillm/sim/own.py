"""Clusters whose step times are nobody's publication: by the roofline of a device, or as `python -m minillm calibrate --json` has found them on
a machine. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.hardware.devices import Link, find_device, find_link
from minillm.hardware.profiles import Fit
from minillm.model.config import DTYPE_BYTES
from minillm.model.cost import USABLE, cache_room_bytes
from minillm.model.shapes import SHAPES
from minillm.policy.handing import Dispatcher, Role
from minillm.policy.router import LeastTokens, Router, ShortestQueue
from minillm.sim.cluster import Apart, Cluster, Kind, Together, Wires
from minillm.sim.costs import Fitted, Roofline
from minillm.sim.machine import Limits

MAX_RUNNING, MAX_TOKENS = 256, 2048


@dataclass(frozen=True)
class Own:
    """What an instance of so many tensor parallel ranks is: `kind(tp)`; caches of `token_bytes` a token move over `link`."""

    kind: Callable[[int], Kind]
    token_bytes: float
    link: Link | None


def by_roofline(model: str, device: str, link: str, dtype: str = "bfloat16", chunk: int | None = None) -> Own:
    """A model of the table on a device of the table, ranks joined by a link of the table. Raises `ValueError` that lists what there is."""
    if model not in SHAPES:
        raise ValueError(f"--model {model!r}: with --costs roofline there are {', '.join(SHAPES)}")
    config, gpu, wire = SHAPES[model], find_device(device), find_link(link)
    token_bytes = config.kv_numbers_per_token * float(DTYPE_BYTES[dtype])

    def kind(tp: int) -> Kind:
        room = USABLE * gpu.memory_bytes * tp - config.parameters * DTYPE_BYTES[dtype]
        if room <= token_bytes:
            cache_room_bytes(config, gpu, dtype)  # says what does not fit
        costs = Roofline(config, gpu, dtype, tp, wire if tp > 1 else None)
        return Kind(costs, _limits(int(room / token_bytes), chunk), tp)

    return Own(kind, token_bytes, wire)


def by_calibration(path: str | Path, chunk: int | None = None) -> Own:
    """What a file of `calibrate --json` says. Raises `ValueError` for one that is none, and for other instances than it was measured on."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        fit = Fit(_three(found, "prompt_ms"), _three(found, "decode_ms"), _three(found, "decode_ms"))
        tokens, token_bytes = int(found["cache_tokens"]), float(found["token_bytes"])
        alpha_s, byte_s = (float(each) for each in found.get("transfer_s") or (0.0, 0.0))
    except OSError as error:
        raise ValueError(f"--costs {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--costs {path} is not what python -m minillm calibrate --json prints ({error})") from None
    link = Link("calibrated", 1 / byte_s if byte_s else 1e15, alpha_s, str(path)) if found.get("transfer_s") else None

    def kind(tp: int) -> Kind:
        if tp != 1:
            raise ValueError(f"--cluster: {path} was measured on one kind of instance: write tp=1 for it, not tp={tp}")
        return Kind(Fitted(fit), _limits(tokens, chunk))

    return Own(kind, token_bytes, link)


def _limits(tokens: int, chunk: int | None) -> Limits:
    return Limits(tokens, MAX_RUNNING, chunk or MAX_TOKENS, chunked=chunk is not None)


def _three(found: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    a, b, c = (float(each) for each in found[name])
    return a, b, c


def together(own: Own, tp: int, count: int, router: type[Router]) -> Cluster:
    """Instances that do both."""
    return Together([own.kind(tp)] * count, router(count))


def apart(own: Own, prefill: tuple[int, int], decode: tuple[int, int]) -> Cluster:
    """Instances for each phase, (ranks, how many): caches move once prompts are read, over the link between instances."""
    kinds = [own.kind(prefill[0])] * prefill[1] + [own.kind(decode[0])] * decode[1]
    roles = [Role.PREFILL] * prefill[1] + [Role.DECODE] * decode[1]
    dispatcher = Dispatcher(roles, ShortestQueue(len(roles)), LeastTokens(len(roles)), early=True)
    return Apart(kinds, dispatcher, Wires(own.link, own.token_bytes, 1))
