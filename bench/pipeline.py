"""Two stages on two cores beside one rank, and beside torch's own pipeline; the replay clock beside formula and wall clock.

Writes bench/results/pipeline.json. One thread a rank, SmolLM2 in float32; engines take turns.

    python bench/pipeline.py [prefill] [decode] [gpipe] [bubble] [clocks] [weights]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import ratio, run_parts, side_by_side

from minillm import LLM, EngineOptions, Ranks, SamplingParams
from minillm.parallel.balance import balance, measure_costs
from minillm.parallel.shards import Shard
from minillm.ranks.speed import measure_link
from minillm.trace.replay import bubble_share, is_compute, replay
from minillm.trace.trace import Trace

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from tiny import make_checkpoint  # noqa: E402

ROUNDS = 5
PROMPTS, LENGTH = 16, 128
SHORT, NEW = 8, 32
SMALL = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
ONE = SamplingParams(max_tokens=1, ignore_eos=True)
ANSWER = SamplingParams(max_tokens=NEW, ignore_eos=True)


def prompts(count: int, length: int) -> list[list[int]]:
    """Random token ids, the same every time."""
    return torch.randint(5, 40_000, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def cut_by_cost(llm: LLM, stages: int, sequences: int, tokens: int, context: int = 0) -> str:
    """The layout whose slowest stage is fastest for such a batch, by measured costs."""
    costs = measure_costs(llm.model, sequences, tokens, context)
    sizes = balance([costs.layer_s] * llm.config.layers, stages, costs.embedding_s, costs.head_s)
    return "pp=" + "+".join(map(str, sizes))


def prefill(one: LLM) -> dict[str, Any]:
    """Sixteen prompts of 128 tokens, a prompt a micro-batch."""
    layout, options = cut_by_cost(one, 2, 1, LENGTH), EngineOptions(max_step_tokens=LENGTH)
    single, work = one.with_options(options), prompts(PROMPTS, LENGTH)
    with LLM(layout=layout, device="cpu", options=options) as pipe:
        seconds = side_by_side(
            {"one": lambda: single.generate(work, ONE), "two": lambda: pipe.generate(work, ONE)}, ROUNDS
        )
        bubble = bubble_share(pipe.trace)
    speed = {name: PROMPTS * LENGTH / statistics.median(each) for name, each in seconds.items()}
    gain = ratio(seconds["one"], seconds["two"])
    print(
        f"prefill, {layout}: {gain['median']:.2f}x ({gain['min']:.2f}-{gain['max']:.2f}), {speed} tokens/s, bubble {bubble:.1%}"
    )
    return {"layout": layout, "gain": gain, "tokens_per_s": speed, "bubble": bubble, "raw_s": seconds}


def decode(one: LLM) -> dict[str, Any]:
    """Decoding of 16 requests on one rank; on two stages of the same number, and of twice as many."""
    figures: dict[str, Any] = {}
    options = EngineOptions(max_running=64)
    single = one.with_options(options)
    layout = cut_by_cost(one, 2, 16, 1, SHORT + NEW // 2)
    with LLM(layout=layout, device="cpu", options=options) as pipe:
        jobs: dict[str, Callable[[], object]] = {
            "one rank, 16": lambda: single.generate(prompts(16, SHORT), ANSWER),
            "two stages, 16": lambda: pipe.generate(prompts(16, SHORT), ANSWER),
            "two stages, 32": lambda: pipe.generate(prompts(32, SHORT), ANSWER),
            "one rank, 32": lambda: single.generate(prompts(32, SHORT), ANSWER),
        }
        rates: dict[str, list[float]] = {name: [] for name in jobs}
        for turn in range(ROUNDS + 1):
            for name, job in jobs.items():
                job()
                run = single.trace if name.startswith("one") else pipe.trace
                if turn:
                    rates[name].append(_decode_rate(run))
    for name, each in rates.items():
        gain = ratio(each, rates["one rank, 16"])
        figures[name] = {"tokens_per_s": statistics.median(each), "over one rank, 16": gain, "raw": each}
        print(
            f"decode, {layout}, {name}: {statistics.median(each):.1f} tokens/s, {gain['median']:.2f}x ({gain['min']:.2f}-{gain['max']:.2f})"
        )
    return {"layout": layout, **figures}


def _decode_rate(run: Trace) -> float:
    """Tokens per second from the moment when every request has its first one to the first that has its last."""
    begin = max(life.token_s[0] for life in run.lives)
    end = min(life.token_s[-1] for life in run.lives)
    return sum(begin < when <= end for life in run.lives for when in life.token_s) / (end - begin)


def gpipe(one: LLM) -> dict[str, Any]:
    """The forward pass of the layers alone: ours beside torch.distributed.pipelining, micro-batches of some tokens each.

    The longer a stage computes, the less its messages weigh: SmolLM2, and 8 layers of 256.
    """
    from gpipe import forward_ours, forward_torch, set_up

    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        small = make_checkpoint(Path(scratch) / "small", **SMALL)
        for name, folder, count, tokens in (
            ("SmolLM2", one.folder, PROMPTS, LENGTH), ("SmolLM2", one.folder, PROMPTS, 16),
            ("8 layers of 256", small, 32, LENGTH), ("8 layers of 256", small, 32, 16),
        ):  # fmt: skip
            with Ranks(2, device="cpu") as ranks:
                ranks.run(set_up, folder, "pp=2", count, tokens)
                jobs = {"torch": lambda: ranks.run(forward_torch), "ours": lambda: ranks.run(forward_ours)}  # noqa: B023
                seconds = side_by_side(jobs, 31)
                theirs, ours = ranks.run(forward_torch)[1], ranks.run(forward_ours)[1]
            difference = (theirs - ours).abs().max().item()
            gain, case = ratio(seconds["torch"], seconds["ours"]), f"{name}, {count} x {tokens} tokens"
            won = sum(mine < other for mine, other in zip(seconds["ours"], seconds["torch"])) / len(seconds["ours"])
            print(
                f"over torch's GPipe, {case}: {gain['median']:.2f}x ({gain['min']:.2f}-{gain['max']:.2f}), "
                f"faster in {won:.0%} of the rounds; outputs differ by {difference:.1e}"
            )
            figures[case] = {"gain": gain, "won": won, "largest difference": difference, "raw_s": seconds}
    return figures


def bubble(_: LLM) -> dict[str, Any]:
    """Four equal stages on the replay clock, 1 to 16 micro-batches of 256 tokens: the formula is (p - 1) / (m + p - 1)."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
        folder = make_checkpoint(Path(scratch) / "equal", **shape, num_key_value_heads=8, max_position_embeddings=512)
        with LLM(folder, layout="pp=4", device="cpu", options=EngineOptions(max_step_tokens=256)) as pipe:
            pipe.generate(_bytes(4), ONE)
            for count in (1, 2, 4, 8, 16):
                shares = [bubble_share(replay(pipe.record_for_replay(_bytes(count), ONE))) for _ in range(3)]
                formula = 3 / (count + 3)
                figures[str(count)] = {"replayed": shares, "formula": formula}
                print(
                    f"bubble, 4 stages, {count} micro-batches: replayed {statistics.median(shares):.1%}, formula {formula:.1%}"
                )
    return figures


def _bytes(count: int) -> list[list[int]]:
    return torch.randint(0, 256, (count, 256), generator=torch.Generator().manual_seed(1)).tolist()


def clocks(one: LLM) -> dict[str, Any]:
    """The replay clock, from a recording with a baton, beside the wall clock: every rank has a core of its own."""
    layout, work = cut_by_cost(one, 2, 1, LENGTH), prompts(PROMPTS, LENGTH)
    with LLM(layout=layout, device="cpu", options=EngineOptions(max_step_tokens=LENGTH)) as pipe:
        link = measure_link(pipe.instance.ranks)
        pipe.generate(work, ONE)
        rows: dict[str, list[float]] = {"wall": [], "replayed": []}
        for _ in range(ROUNDS):
            pipe.generate(work, ONE)
            computing = [span for span in pipe.trace.spans if is_compute(span)]
            rows["wall"].append(max(s.end_s for s in computing) - min(s.start_s for s in computing))
            rows["replayed"].append(replay(pipe.record_for_replay(work, ONE), link).end_s)
    over = ratio(rows["replayed"], rows["wall"])
    print(f"replayed over wall: {over['median']:.2f} ({over['min']:.2f}-{over['max']:.2f}); {link}")
    return {
        "layout": layout,
        "link": {"bytes_per_s": link.bytes_per_s, "latency_s": link.latency_s},
        "replayed over wall": over,
        "raw_s": rows,
    }


def weights(one: LLM) -> dict[str, Any]:
    """Bytes that the ranks hold and have read, beside what the layout predicts."""
    figures = {}
    for layout in ("pp=2", "pp=4", "pp=9+9+10+2"):
        with LLM(layout=layout, device="cpu") as pipe:
            predicted = [Shard(one.config, pipe.layout, rank).weight_bytes(4) for rank in range(pipe.layout.pp)]
            held = [loaded.weight_bytes for loaded in pipe.instance.loaded]
            read = [loaded.bytes_read for loaded in pipe.instance.loaded]
        figures[layout] = {"predicted": predicted, "held": held, "read": read}
        print(
            f"weights, {layout}: predicted {predicted}, held as predicted: {held == predicted}, read (bfloat16 or float32) {read}"
        )
    return figures


def main() -> None:
    """Run the parts asked for, all by default; the others' figures stay."""
    run_parts(
        "pipeline",
        {
            "prefill": prefill,
            "decode": decode,
            "gpipe": gpipe,
            "bubble": bubble,
            "clocks": clocks,
            "weights": weights,
        },
    )


if __name__ == "__main__":
    main()
