"""Traces made up from numbers, to be put on the replay clock: what ranks would do, without any of them.

Times are each span's own; where it stands only says in which order a rank does things.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minillm.trace.trace import Kind, Span, Trace


def pipeline_program(
    times_s: Sequence[Sequence[float]],
    message_bytes: int = 0,
    depth: int | None = None,
    kind: Kind = Kind.PREFILL,
    token_bytes: int = 0,
) -> Trace:
    """A pipeline: `times_s[stage][micro-batch]` are what each stage computes for each micro-batch, in order.

    With a `depth`, stage 0 begins a micro-batch only when the last stage has sent the tokens of the one `depth` before it,
    as in decoding; without, all are there from the start (GPipe's forward pass). Raises `ValueError` for stages with
    different numbers of micro-batches.
    """
    stages, count = len(times_s), len(times_s[0])
    if any(len(row) != count for row in times_s):
        raise ValueError("every stage needs a time for each micro-batch")
    spans: list[Span] = []

    def add(rank: int, kind: Kind, name: str, step: int, seconds: float = 0.0, **about: Any) -> None:
        at = float(len(spans))
        spans.append(Span(rank, kind, name, at, at + seconds, step, cpu_s=seconds, **about))

    for batch in range(count):
        requests = (batch % depth if depth else batch,)
        for stage in range(stages):
            last = stage == stages - 1
            if stage > 0:
                add(stage, Kind.WAITING, "hidden states", batch, group="pipe", sequence=batch, peer=stage - 1)
            elif depth is not None and batch >= depth and stages > 1:
                add(0, Kind.WAITING, "tokens", batch, group="notes", sequence=batch - depth, peer=stages - 1)
            add(stage, kind, kind.value, batch, times_s[stage][batch], request_ids=requests)
            if not last:
                message: dict[str, Any] = {
                    "group": "pipe",
                    "sequence": batch,
                    "peer": stage + 1,
                    "message_bytes": message_bytes,
                }
                add(stage, Kind.COMMUNICATION, "hidden states", batch, lane="wire", **message)
            elif stages > 1:
                message = {"group": "notes", "sequence": batch, "peer": 0, "message_bytes": token_bytes}
                add(stage, Kind.COMMUNICATION, "tokens", batch, lane="wire", **message)
    return Trace(spans, about={"device": "cpu"})
