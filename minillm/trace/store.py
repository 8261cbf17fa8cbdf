"""Traces as files: our own format, read back whole, and the Chrome trace format, which Perfetto opens."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from minillm.trace.life import Event, RequestLife
from minillm.trace.trace import Category, Clock, Kind, MemorySample, Span, Trace

FORMAT, VERSION = "minillm trace", 4
_SPAN = [field.name for field in fields(Span)]
_SAMPLE = [field.name for field in fields(MemorySample)]


def save_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace as gzipped JSON, whole or not at all; the same trace gives the same bytes."""
    values = {
        "format": FORMAT,
        "version": VERSION,
        "clock": trace.clock.value,
        "about": trace.about,
        "spans": [_row(span) for span in trace.spans],
        "memory": [_row(sample) for sample in trace.memory],
        "lives": [_life_row(life) for life in trace.lives],
        "columns": {"spans": _SPAN, "memory": _SAMPLE},
    }
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(gzip.compress(json.dumps(values).encode(), mtime=0))
    scratch.replace(path)


def load_trace(path: str | Path) -> Trace:
    """Read a trace. Raises `ValueError` in one line for a file that is missing, truncated, no trace, or of another version."""
    values = _read(Path(path))
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} is no minillm trace: give a file that save_trace wrote")
    if values.get("version") != VERSION:
        raise ValueError(
            f"{path} is a trace of version {values.get('version')}; this program reads {VERSION}: record it again"
        )
    try:
        columns = values["columns"]
        spans = [_span(dict(zip(columns["spans"], row, strict=True))) for row in values["spans"]]
        memory = [_sample(dict(zip(columns["memory"], row, strict=True))) for row in values["memory"]]
        lives = [_life(row) for row in values["lives"]]
        return Trace(spans, memory, Clock(values["clock"]), values["about"], lives)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is a damaged trace ({type(error).__name__}: {error}): record it again") from None


def _read(path: Path) -> Any:
    try:
        return json.loads(gzip.decompress(path.read_bytes()))
    except FileNotFoundError:
        raise ValueError(f"there is no trace {path}") from None
    except (OSError, EOFError, zlib.error, ValueError):
        raise ValueError(f"{path} is truncated or no trace: record it again") from None


def _row(item: Span | MemorySample) -> list[Any]:
    return [value.value if isinstance(value, (Kind, Category)) else value for value in vars(item).values()]


def _span(values: dict[str, Any]) -> Span:
    return Span(**{**values, "kind": Kind(values["kind"]), "request_ids": tuple(values["request_ids"])})


def _sample(values: dict[str, Any]) -> MemorySample:
    return MemorySample(**{**values, "category": Category(values["category"])})


def _life_row(life: RequestLife) -> list[Any]:
    moments = [[event.value, when] for event, when in life.moments]
    return [life.request_id, life.rank, life.prompt_tokens, life.reused_tokens, moments]


def _life(row: list[Any]) -> RequestLife:
    request_id, rank, prompt_tokens, reused_tokens, moments = row
    return RequestLife(request_id, rank, prompt_tokens, [(Event(what), when) for what, when in moments], reused_tokens)


def chrome_trace(trace: Trace) -> dict[str, Any]:
    """The trace in Chrome's JSON format: a process per rank, a thread per lane, a counter per kind of memory.

    Times are microseconds from the first span. Open the file in Perfetto or chrome://tracing.
    """
    events: list[dict[str, Any]] = []
    lanes = sorted({span.lane for span in trace.spans})
    for rank in trace.ranks:
        events.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        for number, lane in enumerate(lanes):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": number, "args": {"name": lane}})
    for span in trace.spans:
        events.append(
            {
                "ph": "X",
                "name": span.name,
                "cat": span.kind.value,
                "pid": span.rank,
                "tid": lanes.index(span.lane),
                "ts": (span.start_s - trace.start_s) * 1e6,
                "dur": span.duration_s * 1e6,
                "args": _arguments(span),
            }
        )
    for sample in trace.memory:
        moment = max(0.0, (sample.time_s - trace.start_s) * 1e6)
        counter = {"ph": "C", "name": "memory", "pid": sample.rank, "tid": 0, "ts": moment}
        events.append({**counter, "args": {sample.category.value: sample.bytes}})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"clock": trace.clock.value, **trace.about}}


def save_chrome_trace(trace: Trace, path: str | Path) -> None:
    """Write `chrome_trace` to a file."""
    Path(path).write_text(json.dumps(chrome_trace(trace)), encoding="utf-8")


def _arguments(span: Span) -> dict[str, Any]:
    shown = asdict(span)
    hidden = ("rank", "kind", "name", "start_s", "end_s", "lane")
    return {key: value for key, value in shown.items() if key not in hidden and value not in (None, 0, -1, "", ())}
