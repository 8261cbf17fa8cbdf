"""SmolLM2 in float32, one thread a rank, prefill and decode together or on instances of their own: tails of inter-token latency under long
prompts, in turns; what of a transfer is seen on a slow link; tokens over pairs of layouts.

Writes bench/results/disagg.json.

    python bench/disagg.py [interference] [transfer] [wire] [law]
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from multiprocessing.connection import Client, Listener
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import ratio, run_parts, summary

from minillm import LLM, EngineOptions, Ranks, SamplingParams, context
from minillm.disagg.pair import RECEIVER, SENDER, Pair
from minillm.disagg.room import Room
from minillm.load import drive
from minillm.parallel.door import recv_tensor, send_tensor
from minillm.policy.options import TRANSFERS
from minillm.trace.life import Event, RequestLife
from minillm.trace.metrics import percentile
from minillm.trace.workload import Arrival

ROUNDS = 5
POOL = EngineOptions(num_blocks=256, max_running=16, max_step_tokens=512)
PART = (2, 5, 25, 3, 16, 64)  # K and V, layers, blocks, heads, tokens, numbers
PART_BYTES = 4 * 2 * 5 * 25 * 3 * 16 * 64
SHORT, LONG = (16, 40), (480, 2)  # tokens in and out
WAYS = {
    "colocated": ("dp=2", {"chunked_prefill": False}),
    "colocated, chunks of 128": ("dp=2", {"max_step_tokens": 128}),
    "colocated, chunks of 32": ("dp=2", {"max_step_tokens": 32}),
    "split": ("prefill=1xtp=1,decode=1xtp=1", {}),
}
PAIRS = [
    "prefill=1xtp=1,decode=1xtp=1", "prefill=1xtp=2,decode=1xtp=1", "prefill=1xtp=1,decode=1xtp=2", "prefill=1xtp=2,decode=1xpp=2",
    "prefill=1xpp=2,decode=1xtp=2", "prefill=1xtp=3,decode=1xtp=2", "prefill=1xtp=2,decode=1xtp=3", "prefill=1xpp=3,decode=1xpp=2",
    "prefill=1xtp=4,decode=1xtp=1", "prefill=1xtp=1,decode=1xtp=4", "prefill=1xcp=2,decode=1xtp=1", "prefill=1xtp=2,decode=1xcp=2",
    "prefill=1xtp=2,pp=2,decode=1xtp=1", "prefill=2xtp=1,decode=2xtp=1", "prefill=1xtp=1,decode=1xtp=2,cp=2",
]  # fmt: skip


def load(seed: int, seconds: float = 20.0) -> list[Arrival]:
    """Short requests, 1.2 a second, and long prompts, one in two seconds, at random times."""
    draw, arrivals = random.Random(seed), []
    for rate, lengths in ((1.2, SHORT), (0.5, LONG)):
        at = draw.expovariate(rate)
        while at < seconds:
            arrivals.append(Arrival(at, *lengths))
            at += draw.expovariate(rate)
    return arrivals


def told(lives: Sequence[RequestLife]) -> dict[str, float]:
    """What users of short requests feel, in ms, and those of long ones."""
    short = [life for life in lives if life.prompt_tokens == SHORT[0]]
    long = [life for life in lives if life.prompt_tokens == LONG[0]]
    gaps = [1e3 * gap for life in short for gap in life.itl_s]
    first = [1e3 * life.ttft_s for life in short]
    return {
        "P50 ITL": percentile(gaps, 50).value, "P99 ITL": percentile(gaps, 99).value, "longest gap": max(gaps),
        "mean TPOT": sum(gaps) / len(gaps), "P50 TTFT": percentile(first, 50).value, "P90 TTFT": percentile(first, 90).value,
        "P50 TTFT of long prompts": percentile([1e3 * life.ttft_s for life in long] or [0.0], 50).value,
    }  # fmt: skip


def interference(one: LLM) -> dict[str, Any]:
    """The same load on two ranks, in turns: replicas that do both, with chunked prefill and without, and one rank for each."""
    raw: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    expected: dict[int, list[list[int]]] = {}
    with (
        LLM(one.folder, "dp=2", device="cpu", options=POOL) as two,
        LLM(one.folder, WAYS["split"][0], device="cpu", options=POOL) as split,
    ):
        llms = {
            name: (two if layout == "dp=2" else split).with_options(EngineOptions(**(vars(POOL) | switches)))
            for name, (layout, switches) in WAYS.items()
        }
        for llm in llms.values():
            drive(llm, load(99, 4.0))
        for seed in range(ROUNDS):
            for name, llm in llms.items():
                lives = drive(llm, load(seed), seed).lives
                raw[name].append(told(lives))
                expected.setdefault(seed, []).append([len(life.token_s) for life in lives])
                print(seed, name, {key: round(value) for key, value in raw[name][-1].items()}, flush=True)
    return {
        "load": f"{SHORT[0]} tokens in, {SHORT[1]} out at 1.2/s; {LONG[0]} in, {LONG[1]} out at 0.5/s; 20 s, {ROUNDS} seeds",
        "ms, medians of the rounds": {
            name: {key: median(each[key] for each in rounds) for key in rounds[0]} for name, rounds in raw.items()
        },
        "P99 ITL over that of split": {
            name: _over([each["P99 ITL"] for each in rounds], [each["P99 ITL"] for each in raw["split"]])
            for name, rounds in raw.items()
        },
        "raw_ms": raw,
    }


def _over(these: list[float], those: list[float]) -> dict[str, float]:
    each = [a / b for a, b in zip(these, those)]
    return {"median": median(each), "min": min(each), "max": max(each)}


def transfer(one: LLM) -> dict[str, Any]:
    """A prompt of 512 tokens, 24 MB of K and V, over a link of 1 Gbit/s: how long after the first token the cache is there."""
    prompts = [[(7 * n + 13 * at) % 40_000 for at in range(512)] for n in range(ROUNDS + 1)]
    params, found = SamplingParams(max_tokens=4, ignore_eos=True), {}
    with LLM(one.folder, WAYS["split"][0], device="cpu", options=POOL) as llm:
        ways = {
            f"{way}, {steps} tokens a step": EngineOptions(
                **(vars(POOL) | {"kv_transfer": way, "link_gbits": 1.0, "max_step_tokens": steps})
            )
            for way in TRANSFERS
            for steps in (512, 128)
        }
        ways |= {
            f"{way}, link as fast as it is": EngineOptions(**(vars(POOL) | {"kv_transfer": way})) for way in TRANSFERS
        }
        modes = {name: llm.with_options(options) for name, options in ways.items()}
        raw: dict[str, list[dict[str, float]]] = {name: [] for name in modes}
        for number, prompt in enumerate(prompts):
            for name, mode in modes.items():
                mode.generate([prompt], params)
                if number:
                    raw[name].append(_seen(mode))
        for name, rounds in raw.items():
            found[name] = {key: median(each[key] for each in rounds) for key in rounds[0]}
            print(name, found[name], flush=True)
    whole = found["whole, 512 tokens a step"]["seen ms"]
    return {
        "medians": found,
        "seen, over that of the whole cache": {name: each["seen ms"] / whole for name, each in found.items()},
        "raw": raw,
    }


def _seen(llm: LLM) -> dict[str, float]:
    (life,) = llm.trace.lives
    parts = [span for span in llm.trace.spans if span.name == "KV cache"]
    first = life.first(Event.TOKEN)
    return {
        "seen ms": 1e3 * max(0.0, life.first(Event.CAME) - first),
        "second token after ms": 1e3 * life.itl_s[0],
        "bytes": sum(span.message_bytes for span in parts),
        "on the wire ms": 1e3 * sum(span.end_s - span.start_s for span in parts),
        "of it while the prompt was read ms": 1e3
        * sum(max(0.0, min(span.end_s, first) - span.start_s) for span in parts),
        "TTFT ms": 1e3 * life.ttft_s,
    }


def law(one: LLM) -> dict[str, Any]:
    """Tokens of pairs of layouts, all ways to move a cache, beside one device's; bytes beside the formula."""
    prompts = [[(7 * n + 13 * at) % 40_000 for at in range(9 + 37 * n)] for n in range(5)]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = [each.token_ids for each in one.generate(prompts, params)]
    one_copy = sum(-(-len(each) // 16) for each in prompts) * 16 * one.config.kv_numbers_per_token * 4
    found = {}
    for layout in PAIRS:
        with LLM(one.folder, layout, device="cpu", options=POOL) as llm:
            for way in TRANSFERS:
                mode = llm.with_options(EngineOptions(**(vars(POOL) | {"kv_transfer": way})))
                got = [each.token_ids for each in mode.generate(prompts, params)]
                moved = sum(span.message_bytes for span in mode.trace.spans if span.name == "KV cache")
                same = sum(a == b for a, b in zip(expected, got))
                found[f"{layout}, {way}"] = {"same": same, "bytes over one copy": moved / one_copy}
                mode.close()
        print(layout, found[f"{layout}, {way}"], flush=True)
    return {
        "requests with the same tokens": sum(each["same"] for each in found.values()),
        "of": 5 * len(found),
        "each": found,
    }


def wire(one: LLM) -> dict[str, Any]:
    """A part of a cache, 3 MB in 25 scattered blocks of 5 layers, from one process's cache to another's: by a socket, by a process
    group of the two (gloo), and by memory that both share, in turns.
    """
    with TemporaryDirectory(dir="/dev/shm") as folder, Ranks(2, device="cpu") as ranks:
        seconds = ranks.run(_both_ends, Path(folder))[0]
    return {
        "ms": {name: summary(times) for name, times in seconds.items()},
        "GB/s": {name: PART_BYTES / median(times) / 1e9 for name, times in seconds.items()},
        "memory over socket": ratio(seconds["socket"], seconds["memory"]),
        "memory over group": ratio(seconds["group"], seconds["memory"]),
    }


def _both_ends(folder: Path) -> dict[str, list[float]]:
    """Rank 0 sends, rank 1 writes into its cache and says so."""
    sends, blocks, seconds = context().rank == 0, list(range(20, 45)), {"socket": [], "group": [], "memory": []}
    pair = Pair(folder / "pair", SENDER if sends else RECEIVER, context().backend, torch.device("cpu"))
    keys, values = torch.randn(2, 30, 64, 3, 16, 64)
    context().comm().all_reduce(torch.zeros(1))
    if sends:
        room, listener = Room(folder / "room", make=True), Listener(str(folder / "wire"), "AF_UNIX")
        context().comm().all_reduce(torch.zeros(1))
        link = listener.accept()
    else:
        context().comm().all_reduce(torch.zeros(1))
        room, link = Room(folder / "room", make=False), Client(str(folder / "wire"), "AF_UNIX")
    for number in range(41):
        for way, times in seconds.items():
            began = time.perf_counter()
            if sends:
                both = [each[:5, blocks] for each in (keys, values)]
                if way == "socket":
                    send_tensor(link, torch.stack(both))
                elif way == "group":
                    pair.send(torch.stack(both))
                else:
                    for mine, there in zip(both, room.view(0, PART, torch.float32)):
                        there.copy_(mine)
                    link.send_bytes(b"0")
                link.recv_bytes()
            else:
                if way == "socket":
                    came = recv_tensor(link, PART, torch.float32, keys.device)
                elif way == "group":
                    came = pair.recv(PART_BYTES // 4, torch.float32).view(PART)
                else:
                    link.recv_bytes()
                    came = room.view(0, PART, torch.float32)
                keys[:5, blocks], values[:5, blocks] = came
                link.send_bytes(b"0")
            if number:
                times.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    run_parts("disagg", {"interference": interference, "transfer": transfer, "wire": wire, "law": law})
