"""Mixtures of experts: grouped products beside transformers', one to eight ranks, load and placement, messages meanwhile.

Writes bench/results/experts.json. One thread a rank, float32; engines take turns. `upcycled` is SmolLM2 with copies of its MLPs
(`minillm/model/upcycle.py`), tiny-moe the trained one (`minillm/model/tiny_moe`).

    python bench/experts.py [law] [grouped] [prefill] [decode] [balance] [overlap]
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import ratio, run_parts, side_by_side, summary

from minillm import LLM, EngineOptions, SamplingParams
from minillm.hardware.devices import find_device, find_link
from minillm.model.config_json import parse_config, read_config
from minillm.model.linear import pack
from minillm.model.moe import SparseMLP, Tally
from minillm.model.tiny_moe import tiny_moe_folder
from minillm.model.upcycle import upcycled_folder
from minillm.parallel.shards import Shard
from minillm.policy.experts import place
from minillm.trace.replay import is_compute, replay

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from tiny import make_checkpoint  # noqa: E402

ROUNDS = 7
ONE = SamplingParams(max_tokens=1, ignore_eos=True)
EVERY = [
    "",
    *(f"dp={size},ep={size}" for size in range(2, 9)),
    "tp=2,ep=2",
    "tp=3,ep=3",
    "dp=2,tp=2,ep=4",
    "dp=2,pp=2,ep=2",
]
NAMES = ("ROMEO", "HAMLET", "FALSTAFF", "KING HENRY V", "LADY MACBETH", "BRUTUS", "ROSALIND", "PROSPERO")
OPENINGS = (
    "But soft, what light through", "To be, or not to be", "Give me a cup of sack", "Once more unto the breach", "Out, damned spot",
    "Romans, countrymen, and lovers", "All the world's a stage", "Our revels now are ended", "My lord, I have", "What news from France",
)  # fmt: skip
LINES = [f"{name}\n{words}" for name in NAMES for words in OPENINGS]
WORDS = ["The capital of France is", "Water boils at", "Once upon a time there was", "The largest planet is"]


def law(one: LLM) -> dict[str, Any]:
    """Greedy tokens of one to eight ranks, experts even and not, beside one device; weights to the byte."""
    with tempfile.TemporaryDirectory() as scratch:

        def tiny(name: str, **more: Any) -> Path:
            return make_checkpoint(Path(scratch) / name, num_hidden_layers=3, **more)

        moe = {"num_experts": 9, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
        models: dict[str, tuple[Path, list[str], int]] = {
            "tiny-moe": (tiny_moe_folder(), LINES[::8], 24),
            "Mixtral, random, 8 experts": (tiny("a", model_type="mixtral", num_local_experts=8), LINES[::8], 24),
            "Qwen3-MoE, random, 9 experts": (tiny("b", model_type="qwen3_moe", **moe), LINES[::8], 24),
            "Qwen2-MoE, random, 9 experts and a shared one": (
                tiny("c", model_type="qwen2_moe", shared_expert_intermediate_size=24, **moe), LINES[::8], 24
            ),
            "SmolLM2 upcycled, 8 experts": (upcycled_folder(8), WORDS, 8),
        }  # fmt: skip
        return {name: _law(*model, one) for name, model in models.items()}


def _law(folder: Path, prompts: list[str], count: int, dense: LLM) -> dict[str, Any]:
    """How many of the requests got the tokens of one device on each layout, and whether weights are what is predicted."""
    params, found = SamplingParams(max_tokens=count, ignore_eos=True), {}
    config, expected = read_config(folder), []
    if "experts" in folder.name:
        expected = [output.token_ids for output in dense.generate(prompts, params)]
    for layout in EVERY:
        if "tp=3" in layout and config.heads < 3:
            continue
        with LLM(folder, layout, "cpu") as llm:
            got = [output.token_ids for output in llm.generate(prompts, params)]
            expected = expected or got
            same = sum(a == b for a, b in zip(got, expected))
            found[layout or "one device"] = {"same tokens": same, "requests": len(prompts)}
            if layout:
                held = [loaded.weight_bytes for loaded in llm.instance.loaded]
                predicted = [Shard(config, llm.layout, rank).weight_bytes(4) for rank in range(llm.layout.world_size)]
                found[layout] |= {"weight bytes": held, "predicted": predicted}
                assert held == predicted
        print(f"law, {folder.name[:30]}, {layout or 'one device'}: {same} of {len(prompts)}", flush=True)
    return found


def grouped(_: LLM) -> dict[str, Any]:
    """One layer's mixture beside transformers' on the same weights, by each of its ways to multiply; rows from 1 to 1,024."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.manual_seed(0)
    shapes = {
        "SmolLM2's, 8 experts": (576, 1536, 8),
        "tiny-moe's": (128, 96, 16),
        "middle, 16 experts": (256, 256, 16),
        "wide, 8 experts": (1024, 2048, 8),
    }
    found: dict[str, Any] = {}
    for what, (hidden, wide, experts) in shapes.items():
        values = {
            "model_type": "mixtral", "hidden_size": hidden, "intermediate_size": wide, "num_local_experts": experts, "vocab_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_experts_per_tok": 2,
        }  # fmt: skip
        ours = SparseMLP(parse_config(values), 0)
        theirs: dict[str, Any] = {}
        for way in ("eager", "batched_mm", "grouped_mm"):
            config = MixtralConfig(**{key: each for key, each in values.items() if key != "model_type"})
            config._experts_implementation = way
            theirs[f"transformers, {way}"] = block = MixtralSparseMoeBlock(config).eval()
            block.gate.weight.data = ours.gate.weight.data.normal_(0, hidden**-0.5)
            mlps = [ours.experts[str(expert)] for expert in range(experts)]
            block.experts.gate_up_proj.data = torch.stack([mlp.gate_up_proj.weight.data for mlp in mlps])
            block.experts.down_proj.data = torch.stack([mlp.down_proj.weight.data for mlp in mlps])
        for block in theirs.values():
            block.gate.weight.data = ours.gate.weight.data
        looped = copy.deepcopy(ours)
        looped.experts.stacks = False
        theirs["ours, one by one"] = looped
        pack(ours), pack(looped)
        found[what] = {}
        for rows in (1, 4, 16, 64, 256, 1024):
            x = torch.randn(1, rows, hidden)
            with torch.inference_mode():
                expected = ours(x[0])
                ways = dict(theirs)
                if rows > 16:
                    del ways["transformers, batched_mm"]  # copies an expert for every token
                if ours.experts.stack:
                    ways["ours, one by one"] = lambda x, block=looped: block(x[0])[None]
                else:
                    del ways["ours, one by one"]
                for name, block in ways.items():
                    torch.testing.assert_close(
                        block(x)[0], expected, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
                    )
                times = max(1, 256 // rows)
                jobs: dict[str, Callable[[], object]] = {"ours": lambda: [ours(x[0]) for _ in range(times)]}  # noqa: B023
                jobs |= {name: lambda block=block: [block(x) for _ in range(times)] for name, block in ways.items()}  # noqa: B023
                seconds = {name: [each / times for each in raw] for name, raw in side_by_side(jobs, ROUNDS).items()}
            gains = {name: ratio(raw, seconds["ours"]) for name, raw in seconds.items() if name != "ours"}
            found[what][f"{rows} rows"] = {"ours": summary(seconds["ours"]), "faster than": gains, "raw_s": seconds}
            text = ", ".join(
                f"{name.split(', ')[1]} {gain['median']:.2f}x ({gain['min']:.2f}-{gain['max']:.2f})"
                for name, gain in gains.items()
            )
            print(f"grouped, {what}, {rows} rows: faster than {text}", flush=True)
    return found


def prefill(_: LLM) -> dict[str, Any]:
    """Eight prompts of 192 tokens through upcycled SmolLM2, 4 experts, one rank beside two, attention data parallel or tensor
    parallel: with even shares of experts, and placed by what was chosen, with copies.
    """
    work = torch.randint(5, 40_000, (8, 192), generator=torch.Generator().manual_seed(0)).tolist()
    options, folder, found = EngineOptions(max_step_tokens=512), upcycled_folder(4), {}
    with LLM(folder, device="cpu", options=options) as one:
        expected = [output.token_ids for output in one.generate(work, ONE)]
        for layout in ("dp=2,ep=2", "tp=2,ep=2"):
            with LLM(folder, layout, "cpu", options=options) as two:
                halves = two.with_options(EngineOptions(max_step_tokens=512, micro_batches=2))
                for redundant in (None, 2):
                    if redundant is not None:
                        two.place_experts(redundant=redundant)
                    ways = {"": two} | ({", half batches": halves} if layout == "dp=2,ep=2" else {})
                    for name, llm in ways.items():
                        two.expert_choices(clear=True)
                        same = sum(out.token_ids == ids for out, ids in zip(llm.generate(work, ONE), expected))
                        imbalance = two.expert_choices().imbalance
                        jobs = {"one": lambda: one.generate(work, ONE), "two": lambda llm=llm: llm.generate(work, ONE)}
                        seconds = side_by_side(jobs, 3)
                        gain = ratio(seconds["one"], seconds["two"])
                        what = (
                            f"{layout}{name}, {'even shares' if redundant is None else f'{redundant} copies, by load'}"
                        )
                        found[what] = {
                            "gain": gain,
                            "imbalance": imbalance,
                            "same tokens": same,
                            "of": len(work),
                            "raw_s": seconds,
                        }
                        print(
                            f"prefill, {what}: {gain['median']:.2f}x ({gain['min']:.2f}-{gain['max']:.2f}), fullest rank "
                            f"{imbalance:.2f} of the mean, {same} of {len(work)} the same",
                            flush=True,
                        )
                halves.close()
    return found


def decode(_: LLM) -> dict[str, Any]:
    """32 tokens for each of 2, 8 and 32 requests by upcycled SmolLM2, 4 experts, one rank beside two; prompts are not counted."""
    work = torch.randint(5, 40_000, (32, 24), generator=torch.Generator().manual_seed(0)).tolist()
    params, folder, found = SamplingParams(max_tokens=33, ignore_eos=True), upcycled_folder(4), {}
    with LLM(folder, device="cpu") as one, LLM(folder, "dp=2,ep=2", "cpu") as two:
        for batch in (2, 8, 32):
            given = [[output.token_ids for output in llm.generate(work[:batch], params)] for llm in (one, two)]
            same = sum(a == b for a, b in zip(*given))
            jobs = {
                f"{name}, {what}": lambda llm=llm, say=say, some=work[:batch]: llm.generate(some, say)
                for name, llm in {"one": one, "two": two}.items()
                for what, say in {"prompts": ONE, "all": params}.items()
            }
            seconds = side_by_side(jobs, 5)
            steps = {
                name: [whole - read for whole, read in zip(seconds[f"{name}, all"], seconds[f"{name}, prompts"])]
                for name in ("one", "two")
            }
            gain = ratio(steps["one"], steps["two"])
            found[f"{batch} requests"] = {"gain": gain, "same tokens": same, "of": batch, "raw_s": seconds}
            print(
                f"decode, {batch} requests: {gain['median']:.2f}x ({gain['min']:.2f}-{gain['max']:.2f}), {same} of {batch} "
                f"the same",
                flush=True,
            )
    return found


def balance(_: LLM) -> dict[str, Any]:
    """tiny-moe on four and eight ranks, 80 prompts and 60 tokens each: the load as it is, and after one placement by what the
    same number of other requests chose; by measured counts of pairs on ranks.
    """
    params = [SamplingParams(max_tokens=60, temperature=0.9, seed=seed, ignore_eos=True) for seed in range(160)]
    found: dict[str, Any] = {}
    for ranks in (4, 8):
        for redundant in (0, 8, 16):
            with LLM("tiny-moe", f"dp={ranks},ep={ranks}", "cpu") as llm:
                llm.generate(LINES, params[:80])
                before = llm.expert_choices(clear=True)
                llm.generate(LINES, params[80:])
                start = llm.expert_choices(clear=True)
            with LLM("tiny-moe", f"dp={ranks},ep={ranks}", "cpu") as llm:
                llm.generate(LINES, params[:80])
                llm.place_experts(redundant=redundant)
                expected = [output.token_ids for output in llm.generate(LINES, params[80:])]
                after = llm.expert_choices(clear=True)
            planned = [
                place(row, ranks, -(-(16 + redundant) // ranks) * ranks).imbalance(row) for row in before.pairs.tolist()
            ]
            with LLM("tiny-moe", device="cpu") as one:
                same = sum(a == b.token_ids for a, b in zip(expected, one.generate(LINES, params[80:])))
            figures = {
                "start": _shape(start),
                "after": _shape(after),
                "planned": planned,
                "same tokens": same,
                "of": 80,
            }
            found[f"{ranks} ranks, {redundant} redundant"] = figures
            print(
                f"balance, {ranks} ranks, {redundant} redundant: over the run {figures['start']['run']:.3f} -> "
                f"{figures['after']['run']:.3f}, step by step {figures['start']['steps']:.3f} -> {figures['after']['steps']:.3f}, "
                f"{same} of 80 the same",
                flush=True,
            )
    return found


def _shape(tally: Tally) -> dict[str, Any]:
    """The fullest rank over the mean: over the run, layer by layer added up; and step by step."""
    work = tally.work.double()
    return {
        "run": float(work.max(1).values.sum() / work.mean(1).sum()),
        "layers": (work.max(1).values / work.mean(1)).tolist(),
        "steps": tally.imbalance,
        "work": tally.work.tolist(),
        "pairs": tally.pairs.tolist(),
    }


def overlap(_: LLM) -> dict[str, Any]:
    """Upcycled SmolLM2 on two ranks, four prompts of 256 tokens: how much of the messages' time is hidden on the replay clock,
    whole batches and halves, on devices and links.
    """
    work = torch.randint(5, 40_000, (4, 256), generator=torch.Generator().manual_seed(0)).tolist()
    found: dict[str, Any] = {}
    with LLM(upcycled_folder(4), "dp=2,ep=2", "cpu", options=EngineOptions(max_step_tokens=512)) as two:
        halves = two.with_options(EngineOptions(max_step_tokens=512, micro_batches=2))
        traces = {"whole": two.record_for_replay(work, ONE), "halves": halves.record_for_replay(work, ONE)}
        halves.close()
    places = [
        (None, "1 Gbit/s"),
        (None, "10 Gbit/s"),
        ("A100 80GB", "NVLink 4"),
        ("A100 80GB", "PCIe 4 x16"),
        ("H100", "NVLink 4"),
    ]
    for device, link in places:
        ends = {}
        for name, trace in traces.items():
            at = replay(trace, find_link(link), device and find_device(device), "float32" if device else None)
            busy = max(
                sum(span.duration_s for span in at.spans if span.rank == rank and is_compute(span)) for rank in (0, 1)
            )
            ends[name] = {"end_ms": at.end_s * 1e3, "computing_ms": busy * 1e3}
        gain = ends["whole"]["end_ms"] / ends["halves"]["end_ms"]
        found[f"{device or 'this CPU'}, {link}"] = ends | {"halves are faster by": gain}
        print(
            f"overlap, {device or 'this CPU'}, {link}: {ends['whole']['end_ms']:.1f} -> {ends['halves']['end_ms']:.1f} ms, {gain:.2f}x",
            flush=True,
        )
    return found


if __name__ == "__main__":
    parts = {
        "law": law, "grouped": grouped, "prefill": prefill, "decode": decode, "balance": balance, "overlap": overlap
    }  # fmt: skip
    run_parts("experts", parts)
