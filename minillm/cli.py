"""The command line: `python -m minillm doctor | generate | compare | bench | serve | simulate | calibrate`. Errors are one line and exit status 2; --debug shows the traceback."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any, NoReturn


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command; ends the process with 0, 1 (doctor found something missing), 2 (an error) or 130 (interrupted)."""
    options = _parser().parse_args(arguments)
    try:
        with _lead() as options.launch:
            status = options.command(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of our output has gone, as with | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:
        if options.debug:
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        print(f"minillm: {reason}", file=sys.stderr)
        status = 2
    sys.exit(status)


def _lead() -> AbstractContextManager[Any]:
    """Under `torchrun` or `accelerate launch`, all its processes; only rank 0 comes back from it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # the usual case does not load torch
        return nullcontext()
    from minillm.ranks.launch import lead

    return lead()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="minillm", description="Distributed LLM inference, step by step.")
    commands = parser.add_subparsers(
        dest="name",
        required=True,
        parser_class=_Parser,
        metavar="doctor | generate | compare | bench | serve | simulate | calibrate",
    )
    _command(commands, "doctor", doctor, "what this machine can run, and what is missing")
    generate_options = _command(commands, "generate", generate, "answer a prompt with a model")
    generate_options.add_argument("--prompt", required=True, help="the question, or with --raw the text to continue")
    generate_options.add_argument(
        "--raw", action="store_true", help="continue the text as it stands, without the chat template"
    )
    generate_options.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="at most N new tokens (default 128)"
    )
    generate_options.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    generate_options.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens")
    generate_options.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens with probability P"
    )
    generate_options.add_argument("--seed", type=int, metavar="S", help="makes sampled text repeatable")
    _add_model(generate_options)
    compare_options = _command(commands, "compare", compare, "run every mode that fits on the same prompts")
    _add_model(compare_options, layout=False)
    compare_options.add_argument("--ranks", type=int, metavar="N", help="how many ranks (default: 4, or all launched)")
    _add_bench(_command(commands, "bench", bench, "measure the engine under a load of random requests"))
    _add_serve(_command(commands, "serve", serve, "answer HTTP requests as OpenAI's API does"))
    calibrate_options = _command(commands, "calibrate", calibrate, "fit step times here, for the simulator")
    _add_model(calibrate_options)
    _add_simulate(_command(commands, "simulate", simulate, "serve a load on a simulated cluster"))
    return parser


def _add_model(options: argparse.ArgumentParser, layout: bool = True) -> None:
    options.add_argument(
        "--model", metavar="CHECKPOINT", help="a folder or hub name (default: the embedded SmolLM2-135M)"
    )
    options.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    if layout:
        options.add_argument(
            "--layout",
            default="",
            metavar="TEXT",
            help="such as pp=2, pp=9+9+12, tp=2 or dp=2,tp=2 (default: one device)",
        )


def _add_simulate(options: argparse.ArgumentParser) -> None:
    from minillm.sim.command import add_options

    add_options(options)


def _add_bench(options: argparse.ArgumentParser) -> None:
    _add_model(options)
    options.add_argument("--requests", type=int, default=32, metavar="N", help="how many (default 32)")
    options.add_argument(
        "--rate", type=float, default=float("inf"), metavar="R", help="requests per second (default: all at once)"
    )
    options.add_argument(
        "--lengths", default="azure-conversation", metavar="NAME", help="azure-conversation (default) or azure-code"
    )
    options.add_argument(
        "--trace", metavar="FILE", help="replay an Azure trace: a CSV file, azure-conversation or azure-code"
    )
    options.add_argument("--scale", type=float, default=0.125, metavar="F", help="times all lengths (default 0.125)")
    options.add_argument("--slo-ttft", type=float, metavar="S", help="seconds to the first token (with --slo-tpot)")
    options.add_argument("--slo-tpot", type=float, metavar="S", help="seconds per token after it")
    options.add_argument("--seed", type=int, default=0, metavar="S", help="of arrivals and lengths (default 0)")
    _add_engine(options, prefix_reuse=False)


def _add_serve(options: argparse.ArgumentParser) -> None:
    _add_model(options)
    options.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    options.add_argument("--port", type=int, default=8000, help="port; 0 for any free one (default 8000)")
    options.add_argument("--api-key", metavar="KEY", help="what clients must send; or set MINILLM_API_KEY")
    options.add_argument("--max-queue", type=int, default=256, metavar="N", help="requests under way (default 256)")
    _add_engine(options, prefix_reuse=True)


def _add_engine(options: argparse.ArgumentParser, prefix_reuse: bool) -> None:
    """The engine's limits and switches."""
    switch = argparse.BooleanOptionalAction
    options.add_argument("--block-size", type=int, default=16, metavar="N", help="tokens per block (default 16)")
    options.add_argument("--num-blocks", type=int, metavar="N", help="blocks of the KV cache (default: by memory)")
    options.add_argument("--max-running", type=int, default=64, metavar="N", help="requests at a time (default 64)")
    options.add_argument("--max-step-tokens", type=int, default=512, metavar="N", help="per step (default 512)")
    options.add_argument("--in-flight", type=int, metavar="N", help="batches under way (default: as many as stages)")
    options.add_argument(
        "--sum-chunks", type=int, default=1, metavar="N", help="parts of a long prompt's sums (default 1)"
    )
    options.add_argument(
        "--micro-batches", type=int, default=1, metavar="N", help="2: half a step's tokens travel to experts meanwhile"
    )
    options.add_argument("--rebalance-steps", type=int, metavar="N", help="steps between placements of experts by load")
    options.add_argument(
        "--redundant-experts", type=int, default=0, metavar="N", help="copies of the hottest in each layer (default 0)"
    )
    options.add_argument(
        "--router",
        default="least-tokens",
        metavar="NAME",
        help="of replicas: round-robin, least-tokens (default) or prefix-aware",
    )
    options.add_argument("--continuous", action=switch, default=True, help="requests join while others run")
    options.add_argument("--chunked-prefill", action=switch, default=True, help="prompts are cut to the step's budget")
    options.add_argument("--preemption", action=switch, default=True, help="blocks may be taken back")
    options.add_argument("--prefix-reuse", action=switch, default=prefix_reuse, help="equal beginnings share blocks")
    options.add_argument(
        "--ring-prefill", action=switch, default=False, help="with cp: keys of prompts travel, not queries"
    )
    options.add_argument(
        "--borrowing", action=switch, default=False, help="replicas borrow blocks of each other's KV caches"
    )
    options.add_argument("--on-demand", action=switch, default=True, help="they do when they run out, not by plan")
    options.add_argument(
        "--most-lent", type=int, metavar="N", help="blocks that each lends (default: all that are free)"
    )
    options.add_argument("--move-blocks", type=int, default=1, metavar="N", help="of a request in a step (default 1)")
    options.add_argument(
        "--kv-transfer", default="layer", help="from prefill to decode instances: whole, chunk or layer (default)"
    )
    options.add_argument(
        "--kv-wire", default="memory", help="it goes by memory that ranks share (default), or by a process group of two"
    )
    options.add_argument("--link-gbits", type=float, metavar="X", help="slow each rank's link to so many Gbit/s")


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


def _command(commands: argparse._SubParsersAction, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=run)
    return parser


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
    if options.json:
        print(json.dumps({**about, **machine(), **found.as_dict()}, indent=1))
    else:
        print(f"{about['model']} on {about['device']}, layout {about['layout'] or 'one device'}")
        print(found.as_text())
    return 0
