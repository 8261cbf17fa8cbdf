"""What each command of `cli.py` does with its options. It returns the exit status; what is wrong is raised."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import fields
from typing import Any


def doctor(options: argparse.Namespace) -> int:
    """Look at the machine; 1 when something that the course needs is missing."""
    from minillm.lesson.doctor import examine

    report = examine()
    print(json.dumps(report.as_dict(), indent=1) if options.json else report.as_text())
    return 0 if report.ready else 1


def generate(options: argparse.Namespace) -> int:
    """Answer one prompt, streaming the text, or with --json all at once with its figures."""
    from minillm import SamplingParams

    params = SamplingParams(options.max_tokens, options.temperature, options.top_k, options.top_p, options.seed)
    if not options.prompt:
        raise ValueError("the prompt is empty: give --prompt a text")
    with _llm(options) as llm:
        chat = not options.raw and llm.tokenizer.chat_template is not None
        prompt = llm.tokenizer.chat([{"role": "user", "content": options.prompt}]) if chat else options.prompt
        if not options.json:
            for piece in llm.stream(prompt, params):
                print(piece.text, end="", flush=True)
            print()
            return 0
        output = llm.generate([prompt], params)[0]
    metrics = output.metrics
    figures = {
        "model": options.model or llm.folder.name,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "ttft_s": metrics.ttft_s,
        "tpot_s": metrics.tpot_s,
        "e2e_s": metrics.e2e_s,
    }
    print(json.dumps(figures, indent=1, ensure_ascii=False))
    return 0


def compare(options: argparse.Namespace) -> int:
    """Run every mode; 1 when one gives other tokens than one device."""
    from minillm.compare import as_text, compare
    from minillm.hardware.machine import machine

    ranks = options.ranks or (len(options.launch.cards) if options.launch else 4)
    rows = []
    for row in compare(options.model, ranks, options.device, options.launch):
        rows.append(row)
        if sys.stderr.isatty():
            print(f"{row.mode} {row.layout}: {row.reason or 'done'}", file=sys.stderr)
    if options.json:
        print(json.dumps({**machine(), "modes": [row.as_dict() for row in rows]}, indent=1))
    else:
        print(as_text(rows))
    return 0 if all(row.same_tokens or row.reason for row in rows) else 1


def _arrivals(options: argparse.Namespace) -> list[Any]:
    """The requests that a bench asks for, with the lengths of their source."""
    from random import Random

    from minillm.trace.workload import PUBLISHED, TRACES, find_trace, poisson, read_trace, resample

    if options.trace is None:
        if options.lengths not in PUBLISHED:
            raise ValueError(f"--lengths {options.lengths!r} is not known; choose one of {', '.join(PUBLISHED)}")
        return poisson(options.requests, options.rate, PUBLISHED[options.lengths], Random(options.seed))
    file = find_trace(options.trace) if options.trace in TRACES else options.trace
    if file is None:
        raise ValueError(
            f"{TRACES[options.trace]} is not here: get it from Azure/AzurePublicDataset on GitHub, and set MINILLM_DATA to its folder"
        )
    return resample(read_trace(file), options.requests, options.rate)


def bench(options: argparse.Namespace) -> int:
    """Drive the engine with requests that arrive at random, and report what users would feel."""
    from minillm.hardware.machine import machine
    from minillm.load import drive
    from minillm.trace.metrics import SLO, Report
    from minillm.trace.workload import fit

    if (options.slo_ttft is None) != (options.slo_tpot is None):
        raise ValueError("an SLO has two sides: give both --slo-ttft and --slo-tpot")
    slo = SLO(options.slo_ttft, options.slo_tpot) if options.slo_ttft is not None else None
    drawn = _arrivals(options)
    with _served(options) as llm:
        arrivals = fit(drawn, options.scale, llm.config.max_positions)
        report = Report.of(drive(llm, arrivals, options.seed).lives, slo)
    if options.json:
        where = {"layout": str(llm.layout), "router": options.router, "device": llm.device.type}
        about = {"model": llm.folder.name, **where, "engine": vars(llm.options), **machine()}
        print(json.dumps({**about, **report.as_dict()}, indent=1))
    else:
        prompts = sum(arrival.prompt_tokens for arrival in arrivals)
        print(f"{llm.folder.name} on {llm.device.type}: {len(arrivals)} requests, {prompts:,} prompt tokens")
        print(report.as_text())
    return 0


def serve(options: argparse.Namespace) -> int:
    """Answer HTTP requests until interrupted."""
    from minillm.serve.app import serve as run

    key = options.api_key or os.environ.get("MINILLM_API_KEY")
    with _served(options) as llm:
        run(llm, options.host, options.port, key, options.max_queue)
    return 0


def simulate(options: argparse.Namespace) -> int:
    """Serve a load on a simulated cluster."""
    from minillm.sim.command import simulate as run

    return run(options)


def calibrate(options: argparse.Namespace) -> int:
    """Fit what steps take on this machine."""
    from minillm.calibrate import calibrate as run
    from minillm.hardware.machine import machine

    with _llm(options) as llm:
        found = run(llm)
        about = {"model": llm.folder.name, "layout": str(llm.layout), "device": llm.device.type}
        about |= {
            "cache_tokens": llm.engine.load.num_blocks * llm.options.block_size // max(1, llm.layout.instances),
            "token_bytes": llm.config.kv_numbers_per_token * llm.dtype.itemsize,
        }
    if options.json:
        print(json.dumps({**about, **machine(), **found.as_dict()}, indent=1))
    else:
        print(f"{about['model']} on {about['device']}, layout {about['layout'] or 'one device'}")
        print(found.as_text())
    return 0


def _served(options: argparse.Namespace) -> Any:
    """The model with the engine that the options ask for."""
    from minillm.policy.options import EngineOptions

    engine = EngineOptions(**{field.name: getattr(options, field.name) for field in fields(EngineOptions)})
    return _llm(options, engine, router=options.router)


def _llm(options: argparse.Namespace, engine: Any = None, **more: Any) -> Any:
    """The model of the options; under a launcher the log says which rank sits where."""
    from minillm.llm import LLM

    llm = LLM(options.model, options.layout, options.device, options=engine, ranks=options.launch, **more)
    if options.launch is not None:
        from minillm.parallel.hybrid import seating
        from minillm.parallel.layout import Layout

        assert isinstance(llm.layout, Layout)
        print(seating(llm.layout, options.launch.cards), file=sys.stderr, flush=True)
    return llm
