"""What needs a GPU: the same tokens as on the CPU, memory by the allocator's own count, ranks on GPUs. Run by `make gpu`.

Uses nothing that a GPU server lacks: torch, transformers, pytest; no Jupyter, no embedded model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import make_checkpoint

from minillm import LLM, RankError, Ranks, SamplingParams, context
from minillm.hardware.ceilings import measure_ceilings
from minillm.trace.trace import Category, Kind

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: these tests run by make gpu")
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
PROMPTS = [[5, 9, 200, 31] * 8, [7] * 100, [1, 2, 3]]
MARGIN = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("gpu"), **SHAPE)


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def test_logits_equal_the_cpus(folder: Path) -> None:
    with LLM(folder, device="cpu") as on_cpu, LLM(folder, device="cuda", dtype="float32") as on_gpu:
        for prompt in PROMPTS:
            torch.testing.assert_close(on_gpu.score(prompt).cpu(), on_cpu.score(prompt), rtol=1e-3, atol=1e-3)


def test_greedy_tokens_equal_the_cpus(folder: Path) -> None:
    params = SamplingParams(max_tokens=48, ignore_eos=True)
    with LLM(folder, device="cpu") as on_cpu, LLM(folder, device="cuda", dtype="float32") as on_gpu:
        for one, other in zip(on_cpu.generate(PROMPTS, params), on_gpu.generate(PROMPTS, params)):
            if one.token_ids != other.token_ids:
                first = next(n for n, (a, b) in enumerate(zip(one.token_ids, other.token_ids)) if a != b)
                logits = on_cpu.score(one.prompt_token_ids + one.token_ids[:first])[-1].topk(2).values
                assert logits[0] - logits[1] < MARGIN  # the law excuses near ties only


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_is_close(folder: Path, dtype: str) -> None:
    with LLM(folder, device="cpu") as exact, LLM(folder, device="cuda", dtype=dtype) as half:
        wanted, got = exact.score(PROMPTS[0]), half.score(PROMPTS[0]).float().cpu()
        assert (wanted - got).abs().max() < 0.1 * wanted.abs().max()
        assert len(half.generate(PROMPTS, SamplingParams(max_tokens=8, ignore_eos=True))) == 3


def test_activation_peaks_come_from_the_allocator(folder: Path) -> None:
    with LLM(folder, device="cuda", dtype="float32") as llm:
        trace = llm.measure_memory(PROMPTS, SamplingParams(max_tokens=3, ignore_eos=True))
        peaks = [sample.bytes for sample in trace.memory if sample.category is Category.ACTIVATIONS and sample.bytes]
        assert len(peaks) == len(trace.spans)
        assert all(peak > 0 for peak in peaks)
        held = torch.cuda.memory_allocated()
        assert trace.peak_bytes(0)[Category.WEIGHTS] <= held


def test_spans_last_as_long_as_the_gpu_works(folder: Path) -> None:
    with LLM(folder, device="cuda", dtype="float32") as llm:
        llm.generate(PROMPTS, SamplingParams(max_tokens=8, ignore_eos=True))
        spans = llm.trace.spans
        assert {span.kind for span in spans} == {Kind.PREFILL, Kind.DECODE}
        assert all(span.duration_s > 0 for span in spans)


def test_ceilings_are_a_gpus() -> None:
    here = measure_ceilings("cuda", "bfloat16")
    assert here.flops["bfloat16"] > 5e12
    assert here.bytes_per_s > 1e11


def rank_job() -> tuple[str, float]:
    here = context()
    x = torch.full((1000,), float(here.rank), device=here.device)
    dist.all_reduce(x)
    return here.device.type, x[0].item() + here.comm().all_reduce(torch.ones(3, device=here.device)).sum().item()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_on_gpus(size: int) -> None:
    """One rank per GPU over NCCL where there are enough, else ranks that share GPUs over gloo."""
    with Ranks(size, timeout_s=20) as ranks:
        total = size * (size - 1) / 2 + 3 * size
        assert ranks.run(rank_job) == [("cuda", total)] * size


def absent_job() -> None:
    if dist.get_rank() != 1:
        dist.all_reduce(torch.ones(4, device=context().device))


def test_an_absent_rank_is_named_on_gpus_too() -> None:
    with Ranks(2, timeout_s=5) as ranks:
        with pytest.raises(RankError, match="rank 1 returned without calling all_reduce"):
            ranks.run(absent_job)
        assert ranks.run(rank_job)[0] == ("cuda", 7.0)
