"""The command line: `python -m minillm doctor | generate | compare | bench | serve | simulate | calibrate`. Errors are one line and exit status 2; --debug shows the traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

from minillm import commands as run


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
    _command(commands, "doctor", run.doctor, "what this machine can run, and what is missing")
    generate_options = _command(commands, "generate", run.generate, "answer a prompt with a model")
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
    compare_options = _command(commands, "compare", run.compare, "run every mode that fits on the same prompts")
    _add_model(compare_options, layout=False)
    compare_options.add_argument("--ranks", type=int, metavar="N", help="how many ranks (default: 4, or all launched)")
    _add_bench(_command(commands, "bench", run.bench, "measure the engine under a load of random requests"))
    _add_serve(_command(commands, "serve", run.serve, "answer HTTP requests as OpenAI's API does"))
    calibrate_options = _command(commands, "calibrate", run.calibrate, "fit step times here, for the simulator")
    _add_model(calibrate_options)
    _add_simulate(_command(commands, "simulate", run.simulate, "serve a load on a simulated cluster"))
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
    options.add_argument("--prompt-order", default="fcfs", help="fcfs (default), or sorted by length: sjf, ljf")
    options.add_argument("--prompt-window", type=int, default=16, metavar="N", help="so many at a time (default 16)")
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
    _add_split(options)


def _add_split(options: argparse.ArgumentParser) -> None:
    """Those of prefill and decode instances."""
    options.add_argument(
        "--kv-transfer", default="layer", help="from prefill to decode instances: whole, chunk or layer (default)"
    )
    options.add_argument(
        "--kv-wire", default="memory", help="it goes by memory that ranks share (default), or by a process group of two"
    )
    options.add_argument("--link-gbits", type=float, metavar="X", help="slow each rank's link to so many Gbit/s")
    options.add_argument(
        "--dispatch", default="roles", help="instances keep to roles (default), or are borrowed: pools"
    )
    options.add_argument("--decode-router", default="least-tokens", help="least-tokens (default) or power-of-two")
    options.add_argument(
        "--gate", default="greedy", help="of decode: greedy (default), reserve-static, reserve-dynamic"
    )
    options.add_argument(
        "--predictor",
        type=_predictor,
        metavar="W:A",
        help="lengths in buckets of W tokens, right in a share A (200:0.75)",
    )
    options.add_argument("--idle-s", type=float, metavar="S", help="an instance idle for so long changes its role")


def _predictor(text: str) -> object:
    """Raises `argparse.ArgumentTypeError` for what is no width and share."""
    from minillm.policy.admission import Predictor

    width, _, accuracy = text.partition(":")
    try:
        return Predictor(int(width), float(accuracy))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write 200:0.75 ({error})") from None


def _command(commands: argparse._SubParsersAction, name: str, does: Callable, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=does)
    return parser
