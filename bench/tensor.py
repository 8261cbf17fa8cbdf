"""Two ranks that share every layer beside one; the all-reduce over shared memory beside gloo's; torch's DTensor; four ranks on
the replay clock.

Writes bench/results/tensor.json. One thread a rank, SmolLM2 in float32; engines take turns.

    python bench/tensor.py [reduce] [prefill] [even] [decode] [dtensor] [replay]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import ratio, run_parts, side_by_side

from minillm import LLM, EngineOptions, Ranks, SamplingParams
from minillm.model.linear import Linear
from minillm.ranks.membership import context
from minillm.trace.replay import replay
from minillm.trace.trace import Kind, Trace

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from tiny import make_checkpoint  # noqa: E402

ROUNDS = 7
SIZES = [1024, 2304, 9216, 36_864, 147_456, 589_824, 2**20, 2**22, 2**24]
ONE = SamplingParams(max_tokens=1, ignore_eos=True)
BATCHES = (1, 16)


def prompts(count: int, length: int) -> list[list[int]]:
    """Random token ids, the same every time; small enough for every vocabulary."""
    return torch.randint(5, 250, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def _reduce(count_bytes: int, rounds: int) -> list[float]:
    """On each rank: seconds of all-reduces of so many bytes, one after the other."""
    comm, x, seconds = context().comm(), torch.ones(count_bytes // 4), []
    for _ in range(rounds + 5):
        x.fill_(1.0)
        began = time.perf_counter()
        comm.all_reduce(x)
        seconds.append(time.perf_counter() - began)
    assert x[0] == context().world_size
    return seconds[5:]


def reduce(_: LLM) -> dict[str, Any]:
    """All-reduces from 1 KB to 16 MB, by shared memory and by gloo, 2 and 4 ranks; microseconds."""
    figures: dict[str, Any] = {}
    for size in (2, 4):
        with (
            Ranks(size, device="cpu") as ranks,
            Ranks(size, device="cpu", shared_memory=False) as gloo,
        ):
            for count in SIZES:
                taken: dict[str, list[float]] = {"shared memory": [], "gloo": []}
                for _ in range(5):
                    rounds = 100 if count < 2**20 else 12
                    taken["shared memory"] += ranks.run(_reduce, count, rounds)[0]
                    taken["gloo"] += gloo.run(_reduce, count, max(10, rounds // 3))[0]
                row = {
                    name: {
                        "median_us": statistics.median(each) * 1e6,
                        "p90_us": statistics.quantiles(each, n=10)[-1] * 1e6,
                    }
                    for name, each in taken.items()
                }
                figures[f"{size} ranks, {count} bytes"] = row
                said = ", ".join(f"{name} {each['median_us']:.0f} ({each['p90_us']:.0f})" for name, each in row.items())
                print(f"{size} ranks, {count:,} bytes: {said} us median (p90)", flush=True)
    return figures


def _gemm_s(threads: int) -> float:
    """Seconds of the products of 512 rows with one layer's weights, packed as the engine's are."""
    torch.set_num_threads(threads)
    layers = [Linear(576, 960, bias=False), Linear(576, 576, bias=False), Linear(576, 3072, bias=False)]
    layers.append(Linear(1536, 576, bias=False))
    inputs = [torch.randn(512, layer.in_features) for layer in layers]
    with torch.inference_mode():
        for layer in layers:
            layer.pack()
        seconds = []
        for _ in range(30):
            began = time.perf_counter()
            for layer, x in zip(layers, inputs):
                layer(x)
            seconds.append(time.perf_counter() - began)
    torch.set_num_threads(1)
    return statistics.median(seconds)


def _prefill_gain(name: str, single: LLM, pair: LLM) -> dict[str, Any]:
    """Prompts of 512 tokens, one a step; and what two threads gain on the products alone, measured in between."""
    work, gemm = prompts(2, 512), []
    jobs = {"one": lambda: single.generate(work, ONE), "two": lambda: pair.generate(work, ONE)}
    seconds: dict[str, list[float]] = {"one": [], "two": []}
    for _ in range(ROUNDS):
        for who, each in side_by_side(jobs, 1).items():
            seconds[who] += each
        gemm.append(_gemm_s(1) / _gemm_s(2))
    gain, bound = ratio(seconds["one"], seconds["two"]), statistics.median(gemm)
    print(
        f"prefill, {name}: {gain['median']:.2f}x ({gain['min']:.2f}-{gain['max']:.2f}); two threads gain {bound:.2f}x on the "
        f"products ({min(gemm):.2f}-{max(gemm):.2f}): {gain['median'] / bound:.0%} of it",
        flush=True,
    )
    return {"gain": gain, "two threads on products": {"median": bound, "raw": gemm}, "raw_s": seconds}


def prefill(one: LLM) -> dict[str, Any]:
    """SmolLM2, whose 3 KV heads two ranks cannot share evenly; sums whole and in parts."""
    options, work = EngineOptions(max_step_tokens=512), prompts(2, 512)
    with LLM(layout="tp=2", device="cpu", options=options) as pair:
        figures = _prefill_gain("SmolLM2", one.with_options(options), pair)
        figures["in parts"] = {}
        for chunks in (2, 4):
            cut = pair.with_options(EngineOptions(max_step_tokens=512, sum_chunks=chunks))
            jobs = {"whole": lambda: pair.generate(work, ONE), "parts": lambda: cut.generate(work, ONE)}  # noqa: B023
            taken = side_by_side(jobs, 3)
            gain = ratio(taken["whole"], taken["parts"])
            figures["in parts"][f"sum_chunks={chunks}"] = {"gain": gain, "raw_s": taken}
            print(f"  sum_chunks={chunks}: {gain['median']:.2f}x the speed of whole sums", flush=True)
            cut.close()
    return figures


def _random_model(scratch: str, hidden: int, layers: int, heads: int) -> Path:
    """A checkpoint of random weights with 4 KV heads."""
    shape = {
        "hidden_size": hidden, "intermediate_size": 1536, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 4, "max_position_embeddings": 1024, "vocab_size": 258,
    }  # fmt: skip
    return make_checkpoint(Path(scratch) / "model", **shape)


def even(_: LLM) -> dict[str, Any]:
    """The same products with 12 query and 4 KV heads of 48, so that both ranks have as much; random weights, 12 layers."""
    options = EngineOptions(max_step_tokens=512)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _random_model(scratch, hidden=576, layers=12, heads=12)
        with (
            LLM(folder, device="cpu", dtype="float32", options=options) as single,
            LLM(folder, layout="tp=2", device="cpu", dtype="float32", options=options) as pair,
        ):
            figures = {"prefill": _prefill_gain("even heads", single, pair)}
            return figures | _decode_gain({"one": single, "two": pair}, "even heads, ")


def _decode_rate(run: Trace) -> float:
    """Tokens per second from the moment when every request has its first one to the first that has its last."""
    begin = max(life.token_s[0] for life in run.lives)
    end = min(life.token_s[-1] for life in run.lives)
    return sum(begin < when <= end for life in run.lives for when in life.token_s) / (end - begin)


def decode(one: LLM) -> dict[str, Any]:
    """Decoding of 1 and of 16 requests: tokens per second on one rank, two, and two with gloo's all-reduce."""
    with (
        Ranks(2, device="cpu", shared_memory=False) as slow,
        LLM(layout="tp=2", device="cpu") as pair,
        LLM(layout="tp=2", device="cpu", ranks=slow) as gloo,
    ):
        return _decode_gain({"one": one, "two": pair, "two, gloo": gloo})


def _decode_gain(engines: dict[str, LLM], what: str = "") -> dict[str, Any]:
    """Tokens per second of each engine, in turns, beside that of "one"."""
    figures: dict[str, Any] = {}
    answer = SamplingParams(max_tokens=40, ignore_eos=True)
    for batch in BATCHES:
        work = prompts(batch, 8)
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(ROUNDS + 1):
            for name, llm in engines.items():
                llm.generate(work, answer)
                if turn:
                    rates[name].append(_decode_rate(llm.trace))
        rows = {}
        for name, each in rates.items():
            gain = ratio(each, rates["one"])
            rows[name] = {"tokens_per_s": statistics.median(each), "over one": gain, "raw": each}
            print(
                f"decode, {what}batch {batch}, {name}: {statistics.median(each):.1f} tokens/s, {gain['median']:.2f}x "
                f"({gain['min']:.2f}-{gain['max']:.2f})",
                flush=True,
            )
        figures[f"batch {batch}"] = rows
    return figures


def dtensor(_: LLM) -> dict[str, Any]:
    """A random model of 8 layers of 512, a prompt of 128 tokens and 24 more, on two ranks: ours beside parallelize_module."""
    from dtensor import generate, set_up

    prompt = torch.randint(0, 256, (128,), generator=torch.Generator().manual_seed(2)).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        folder = _random_model(scratch, hidden=512, layers=8, heads=8)
        with (
            Ranks(2, device="cpu", timeout_s=60) as ranks,
            Ranks(2, device="cpu", timeout_s=60, shared_memory=False) as slow,
        ):
            engines = {
                "dtensor": (ranks, "dtensor"), "ours": (ranks, "ours"), "ours, plain": (ranks, "ours, plain"),
                "ours, plain, gloo": (slow, "ours, plain"), "ours, gloo": (slow, "ours"),
            }  # fmt: skip
            for where, name in engines.values():
                where.run(set_up, folder, name, prompt, 24)
            tokens = [where.run(generate, name)[0] for where, name in engines.values()]
            jobs: dict[str, Callable[[], object]] = {
                which: lambda where=where, name=name: where.run(generate, name)  # type: ignore[misc]
                for which, (where, name) in engines.items()
            }
            seconds = side_by_side(jobs, ROUNDS)
    same = all(each == tokens[0] for each in tokens)
    figures: dict[str, Any] = {"equal tokens": same, "raw_s": seconds}
    for name in list(engines)[1:]:
        figures[name] = gain = ratio(seconds["dtensor"], seconds[name])
        print(
            f"over DTensor, {name}: {gain['median']:.2f}x ({gain['min']:.2f}-{gain['max']:.2f}), equal tokens: {same}"
        )
    return figures


def _product_s(tp: int, rows: int) -> float:
    """CPU seconds of a step's products with 30 layers' weights and the LM head, of which a rank has 1/tp."""
    shapes = [(576, 960 // tp), (576 // tp, 576), (576, 3072 // tp), (1536 // tp, 576)] * 30 + [(576, 49_152 // tp)]
    layers = [Linear(inputs, outputs, bias=False) for inputs, outputs in shapes]
    with torch.inference_mode():
        for layer in layers[:-1]:
            layer.pack()  # the tied LM head stays plain
        inputs = {size: torch.randn(rows, size) for size, _ in shapes}
        seconds = []
        for _ in range(8):
            began = time.thread_time()
            for layer in layers:
                layer(inputs[layer.in_features])
            seconds.append(time.thread_time() - began)
    return statistics.median(seconds[2:])


def replayed(one: LLM) -> dict[str, Any]:
    """Decode steps on four ranks with a free link, beside (P1 + o) / (P4 + o): P the products whole and quartered."""
    figures: dict[str, Any] = {}
    answer = SamplingParams(max_tokens=12, ignore_eos=True)
    with LLM(layout="tp=4", device="cpu") as four:
        for batch in BATCHES:
            work = prompts(batch, 8)
            one.generate(work, answer)
            four.generate(work, answer)
            whole, quartered = _product_s(1, batch), _product_s(4, batch)
            steps: dict[str, list[float]] = {"one": [], "four": []}
            for _ in range(ROUNDS):
                steps["one"].append(_step_s(replay(one.record_for_replay(work, answer))))
                steps["four"].append(_step_s(replay(four.record_for_replay(work, answer))))
            gain = ratio(steps["one"], steps["four"])
            other = statistics.median(steps["one"]) - whole
            bound = (whole + other) / (quartered + other)
            print(
                f"replayed decode, batch {batch}, 4 ranks, free link: {gain['median']:.2f}x ({gain['min']:.2f}-{gain['max']:.2f}); "
                f"P1 {whole * 1e3:.1f} ms, P4 {quartered * 1e3:.1f} ms, o {other * 1e3:.1f} ms: at most {bound:.2f}x, "
                f"{gain['median'] / bound:.0%} of it",
                flush=True,
            )
            figures[f"batch {batch}"] = {
                "gain": gain, "P1_s": whole, "P4_s": quartered, "o_s": other, "bound": bound, "raw_step_s": steps,
            }  # fmt: skip
    return figures


def _step_s(run: Trace) -> float:
    """The median time from one decode step's end to the next one's, on rank 0."""
    ends: dict[int, float] = {}
    for span in run.spans:
        if span.rank == 0 and span.kind is Kind.DECODE:
            ends[span.step] = max(span.end_s, ends.get(span.step, 0.0))
    order = [ends[step] for step in sorted(ends)]
    return statistics.median(b - a for a, b in zip(order, order[1:]))


def main() -> None:
    """Run the parts asked for, all by default; the others' figures stay."""
    run_parts(
        "tensor",
        {"reduce": reduce, "prefill": prefill, "even": even, "decode": decode, "dtensor": dtensor, "replay": replayed},
    )


if __name__ == "__main__":
    main()
