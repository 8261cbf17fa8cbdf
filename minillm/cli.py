"""The command line: `python -m minillm doctor | generate`. Errors are one line and exit status 2; --debug shows the traceback."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command; ends the process with 0, 1 (doctor found something missing), 2 (an error) or 130 (interrupted)."""
    options = _parser().parse_args(arguments)
    try:
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="minillm", description="Distributed LLM inference, step by step.")
    commands = parser.add_subparsers(dest="name", required=True, parser_class=_Parser, metavar="doctor | generate")
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
    generate_options.add_argument(
        "--model", metavar="CHECKPOINT", help="a folder or hub name (default: the embedded SmolLM2-135M)"
    )
    generate_options.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    return parser


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
    from minillm import LLM, SamplingParams

    params = SamplingParams(options.max_tokens, options.temperature, options.top_k, options.top_p, options.seed)
    llm = LLM(options.model, device=options.device)
    chat = not options.raw and llm.tokenizer.chat_template is not None
    if not options.prompt:
        raise ValueError("the prompt is empty: give --prompt a text")
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
