"""The law: whatever runs beside it, and however it is cut, a request's greedy tokens are those it gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from helpers import EXAMPLES, SWITCHES
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_checkpoint

from minillm import LLM, EngineOptions, SamplingParams
from minillm.engine.request import RequestOutput
from minillm.kv.paged import PagedCache
from minillm.policy.batch import Batch, Chunk

OPTIONS = st.builds(
    EngineOptions,
    block_size=st.sampled_from([1, 2, 5, 16, 64]),
    num_blocks=st.sampled_from([None, 64]),
    max_running=st.integers(1, 6),
    max_step_tokens=st.integers(6, 40),
    **SWITCHES,
)
SYSTEM = [7, 3, 9, 1, 4, 4, 2, 8, 6, 5, 11, 12]
PROMPTS = st.builds(
    lambda shared, own: SYSTEM[:shared] + own,
    st.sampled_from([0, 0, 5, 12]),
    st.lists(st.integers(0, 255), min_size=1, max_size=12),
)
WORK = st.lists(st.tuples(PROMPTS, st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=7)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """One request at a time, by the formula: what all others are compared with."""
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny"))
    with LLM(folder, device="cpu", options=EngineOptions(max_running=1)) as llm:
        llm.model.reference_attention = True
        yield llm


@cache
def alone(llm: LLM, prompt: tuple[int, ...], new: int) -> list[int]:
    """Its tokens by itself."""
    return llm.generate([list(prompt)], SamplingParams(max_tokens=new, ignore_eos=True))[0].token_ids


def same(llm: LLM, output: RequestOutput, new: int) -> bool:
    """Whether the tokens are those of the request alone; False where they part at a near tie, which the law excuses."""
    expected = alone(llm, tuple(output.prompt_token_ids), new)
    for place, (got, wanted) in enumerate(zip(output.token_ids, expected, strict=True)):
        if got != wanted:
            logits = llm.score([*output.prompt_token_ids, *expected[:place]])[-1]
            first, second = logits.topk(2).values.tolist()
            assert first - second < 1e-4, f"token {place} is {got}, alone it is {wanted}"
            return False
    return True


@settings(deadline=None, max_examples=EXAMPLES)
@given(OPTIONS, WORK)
def test_tokens_do_not_depend_on_the_company(llm: LLM, options: EngineOptions, work: list) -> None:
    """Prompts in waves: each wave joins while the ones before it run."""
    tight = max(-(-(len(prompt) + new) // options.block_size) for prompt, new, _ in work)
    blocks = tight + 2 if options.num_blocks is not None else None  # preemption, if there is any to be had
    crowd = LLM(llm.folder, device="cpu", options=EngineOptions(**{**vars(options), "num_blocks": blocks}))
    streams, outputs = [], {}
    for wave in range(4):
        for number, (prompt, new, joins) in enumerate(work):
            if joins == wave:
                params = SamplingParams(max_tokens=new, ignore_eos=True)
                streams.append((number, crowd.stream([prompt], params)))
                outputs[number] = RequestOutput(number, prompt, [], "", None, None)  # type: ignore[arg-type]
        for number, stream in streams:
            for piece in [next(stream, None) for _ in range(2)]:
                outputs[number].token_ids.extend([piece.token_id] if piece else [])
    for number, stream in streams:
        outputs[number].token_ids.extend(piece.token_id for piece in stream)
    ties = sum(not same(llm, outputs[number], new) for number, (_, new, _) in enumerate(work))
    assert ties <= 1
    assert crowd.engine.scheduler.pool.num_used == 0


@settings(deadline=None, max_examples=EXAMPLES)
@given(st.data(), st.sampled_from([1, 3, 16]))
def test_the_fast_path_is_the_formula(llm: LLM, data: st.DataObject, block_size: int) -> None:
    """Logits of mixed batches over scattered and shared blocks: the fast path, the formula, each sequence by itself."""
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    counts = [data.draw(st.just(1) | st.integers(1, length)) for length in lengths]
    total = sum(-(-length // block_size) for length in lengths)
    order = data.draw(st.permutations(range(total + 5)))
    texts = [[(7 * number + 3 * at) % 256 for at in range(length)] for number, length in enumerate(lengths)]
    if len(texts) > 1 and data.draw(st.booleans()):  # two with the same full blocks at the front
        texts[1] = texts[0][: block_size * (counts[1] < len(texts[1]))] + texts[1]
        total = total + 1
    tables, taken = [], 0
    for text in texts:
        need = -(-len(text) // block_size)
        tables.append(tuple(order[taken : taken + need]))
        taken += need
    caches = [PagedCache(llm.config, total + 5, block_size, llm.model.device, llm.model.dtype) for _ in range(2)]
    share = len(texts) > 1 and texts[1][:block_size] == texts[0][:block_size] and len(texts[0]) >= block_size
    if share and len(texts[1]) - counts[1] >= block_size:
        tables[1] = (tables[0][0], *tables[1][1:])
    before = Batch(tuple(
        Chunk(n, 0, tuple(text[:-count]), table) for n, (text, count, table) in enumerate(zip(texts, counts, tables)) if len(text) > count
    ))  # fmt: skip
    now = Batch(tuple(
        Chunk(n, len(text) - count, tuple(text[-count:]), table) for n, (text, count, table) in enumerate(zip(texts, counts, tables))
    ))  # fmt: skip
    logits = []
    for reference, paged in zip((True, False), caches):
        llm.model.reference_attention = reference
        if before.chunks:
            llm.model(before, paged)
        logits.append(llm.model(now, paged))
    llm.model.reference_attention = True
    torch.testing.assert_close(logits[0], logits[1], atol=2e-5, rtol=0)
    by_itself = torch.stack([llm.score(text)[-1] for text in texts])
    torch.testing.assert_close(logits[0], by_itself, atol=2e-5, rtol=0)


def test_samples_fork_and_are_the_same_in_any_company(llm: LLM) -> None:
    """n continuations share the prompt's blocks; each draws what it would draw elsewhere, preempted or not."""
    params = SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=4, ignore_eos=True)
    roomy = LLM(llm.folder, device="cpu", options=EngineOptions(block_size=4))
    tight = LLM(llm.folder, device="cpu", options=EngineOptions(block_size=4, num_blocks=8, max_running=3))
    first = roomy.generate([SYSTEM], params)[0]
    assert [each.token_ids for each in first.samples] == [
        each.token_ids for each in tight.generate([SYSTEM], params)[0].samples
    ]
    assert len({tuple(each.token_ids) for each in first.samples}) == 3
    assert first.samples[0].token_ids == first.token_ids
    single = SamplingParams(max_tokens=12, temperature=1.0, seed=4, ignore_eos=True)
    assert roomy.generate([SYSTEM], single)[0].token_ids == first.token_ids
    peak = max(sample.bytes for sample in roomy.trace.memory if sample.category.value == "KV cache")
    assert peak == roomy.engine.runner.cache.block_bytes * 6  # 23 tokens in the cache


def test_samples_share_the_prompts_blocks(llm: LLM) -> None:
    llm_ = LLM(llm.folder, device="cpu", options=EngineOptions(block_size=4))
    list(llm_.stream([SYSTEM], SamplingParams(max_tokens=3, n=4, temperature=1.0, seed=4, ignore_eos=True)))
    used = [sample.bytes // llm_.engine.runner.cache.block_bytes for sample in llm_.trace.memory
            if sample.category.value == "KV cache"]  # fmt: skip
    assert max(used) == 3 + 4  # three full blocks for all, and one each


def test_a_prompt_that_ends_within_a_block_is_copied_on_write(llm: LLM) -> None:
    llm_ = LLM(llm.folder, device="cpu", options=EngineOptions(block_size=16))
    outputs = llm_.generate([SYSTEM], SamplingParams(max_tokens=3, n=2, temperature=1.0, seed=1, ignore_eos=True))
    used = [sample.bytes // llm_.engine.runner.cache.block_bytes for sample in llm_.trace.memory
            if sample.category.value == "KV cache"]  # fmt: skip
    assert max(used) == 2
    assert all(len(each.token_ids) == 3 for each in outputs[0].samples)
