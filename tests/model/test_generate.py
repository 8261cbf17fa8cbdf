"""`LLM` on one device: outputs, stops, streams, sampling, metrics, and what it refuses. A tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_checkpoint

from minillm import LLM, SamplingParams
from minillm.model.sampling import gumbel_noise, keep_likely, sample
from minillm.trace.trace import Kind


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(make_checkpoint(tmp_path_factory.mktemp("tiny")))


def test_a_prompt_gets_the_same_tokens_alone_and_in_company(llm: LLM) -> None:
    prompts = [[5 + n] * (1 + 3 * n % 11) + [n] for n in range(20)]  # more than one wave
    params = SamplingParams(max_tokens=9)
    together = llm.generate(prompts, params)
    for prompt, output in zip(prompts, together):
        assert output.token_ids == llm.generate([prompt], params)[0].token_ids
        assert output.prompt_token_ids == prompt


def test_sampled_text_depends_on_seed_request_and_position_alone(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    first = llm.generate([[1, 2], [1, 2]], params)
    again = llm.generate([[1, 2], [1, 2], [3]], params)
    assert [o.token_ids for o in first] == [o.token_ids for o in again[:2]]
    assert first[0].token_ids != first[1].token_ids
    assert (
        llm.generate([[1, 2]], SamplingParams(max_tokens=12, temperature=1.0, seed=4, ignore_eos=True))[0].token_ids
        != first[0].token_ids
    )


def test_stream_gives_what_generate_gives(llm: LLM) -> None:
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    whole = llm.generate(["hello", "abc"], params)
    pieces = list(llm.stream(["hello", "abc"], params))
    for output in whole:
        mine = [p for p in pieces if p.index == output.index]
        assert [p.token_id for p in mine] == output.token_ids
        assert "".join(p.text for p in mine) == output.text
        assert mine[-1].finish_reason == "length"
    assert [p.token_id for p in llm.stream("hello", params)] == whole[0].token_ids
    assert [p.token_id for p in llm.stream([5, 6], params)] == llm.generate([[5, 6]], params)[0].token_ids


def test_stop_tokens_strings_and_length(llm: LLM) -> None:
    plain = llm.generate(["hello"], SamplingParams(max_tokens=12, ignore_eos=True))[0]
    assert (plain.finish_reason, len(plain.token_ids)) == ("length", 12)
    token = plain.token_ids[4]
    first = plain.token_ids.index(token)
    stopped = llm.generate(["hello"], SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=[token]))[0]
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", plain.token_ids[: first + 1])
    text = plain.text[3:6]
    cut = llm.generate(["hello"], SamplingParams(max_tokens=12, ignore_eos=True, stop=[text]))[0]
    assert (cut.finish_reason, cut.text) == ("stop", plain.text[: plain.text.index(text)])
    shown = "".join(p.text for p in llm.stream("hello", SamplingParams(max_tokens=12, ignore_eos=True, stop=text)))
    assert shown == cut.text


def test_the_end_of_text_token_stops_unless_ignored(llm: LLM) -> None:
    eos = llm.config.eos_token_ids[0]
    outputs = [llm.generate([[n, n + 1]], SamplingParams(max_tokens=30, temperature=2.0, seed=n))[0] for n in range(12)]
    ended = [output for output in outputs if output.finish_reason == "stop"]
    assert ended, "no seed ended early: choose others"
    assert all(output.token_ids[-1] == eos and eos not in output.token_ids[:-1] for output in ended)


def test_the_context_ends_generation(llm: LLM) -> None:
    room = llm.config.max_positions
    output = llm.generate([[3] * (room - 2)], SamplingParams(max_tokens=50, ignore_eos=True))[0]
    assert (output.finish_reason, len(output.token_ids)) == ("length", 2)


def test_metrics_and_trace(llm: LLM) -> None:
    output = llm.generate(["hello"], SamplingParams(max_tokens=5, ignore_eos=True))[0]
    metrics = output.metrics
    assert 0 < metrics.ttft_s < metrics.e2e_s
    assert metrics.tpot_s == pytest.approx((metrics.e2e_s - metrics.ttft_s) / 4)
    assert [span.kind for span in llm.trace.spans] == [Kind.PREFILL] + [Kind.DECODE] * 4
    assert llm.trace.spans[0].tokens == len(output.prompt_token_ids)


def test_score_is_what_greedy_follows(llm: LLM) -> None:
    output = llm.generate(["hello"], SamplingParams(max_tokens=6, ignore_eos=True))[0]
    logits = llm.score(output.prompt_token_ids + output.token_ids)
    start = len(output.prompt_token_ids) - 1
    assert logits.argmax(-1)[start:-1].tolist() == output.token_ids
    assert logits.shape == (start + 7, llm.config.vocab_size)


def test_the_number_of_threads_is_left_as_it_was(llm: LLM) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    llm.generate([[1]], SamplingParams(max_tokens=2))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 40), st.floats(0.01, 1.0))
def test_top_k_and_top_p_keep_the_likely(seed: int, k: int, p: float) -> None:
    scores = torch.randn(40, generator=torch.Generator().manual_seed(seed))
    kept = keep_likely(scores, k, p)
    probabilities = torch.softmax(keep_likely(scores, k, 1.0), -1)
    chosen = kept > -torch.inf
    assert chosen[scores.argmax()]
    assert chosen.sum() <= k
    assert scores[chosen].min() >= scores[~chosen].max() if (~chosen).any() else True
    mass = probabilities[chosen]
    assert mass.sum() >= p - 1e-5  # enough …
    assert mass.sum() - mass.min() < p + 1e-5  # … and not more than needed


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    params = SamplingParams(temperature=0.7)
    drawn = torch.tensor([sample(logits, params, 9, 0, position) for position in range(20_000)])
    frequency = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(frequency, torch.softmax(logits / 0.7, -1), atol=0.015, rtol=0)
    assert torch.equal(gumbel_noise(5, 1, 2, 3), gumbel_noise(5, 1, 2, 3))


def test_ties_do_not_make_top_k_more() -> None:
    assert (keep_likely(torch.zeros(5), 1, 1.0) > -torch.inf).sum() == 1
    assert (keep_likely(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2, 1.0) > -torch.inf).tolist() == [False, True, True, False]


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([1.0, 50.0, 3.0, 60.0])
    assert sample(logits, SamplingParams(temperature=1e-38), 1, 2, 3) == 3


def test_the_text_is_that_of_all_tokens(llm: LLM) -> None:
    """Bytes that never become a character are shown at the end, as decoding all tokens at once shows them."""
    for seed in range(20):
        output = llm.generate([[7, seed]], SamplingParams(max_tokens=9, temperature=1.5, seed=seed, ignore_eos=True))[0]
        assert output.text == llm.tokenizer.decode(output.token_ids)


def test_trace_is_of_the_last_call(llm: LLM) -> None:
    first, second = llm.stream([1, 2], SamplingParams(max_tokens=3)), llm.stream([3], SamplingParams(max_tokens=3))
    next(second)
    next(first)
    assert llm.trace.spans[0].tokens == 1
    llm.score([4, 5, 6])
    assert [span.tokens for span in llm.trace.spans] == [3]


BAD_PARAMS = {
    "max_tokens": [0, -1, 1.5, True], "temperature": [-0.1, float("nan"), float("inf"), "hot"], "top_k": [-1, 2.5], "top_p": [0.0, 1.1, -1.0],
    "seed": [1.5, "x"], "stop": [[""], [3]], "stop_token_ids": [["a"]],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_PARAMS.items() for value in values])
def test_bad_sampling_parameters(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}=.*: give ") as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        ([], "there are no prompts"),
        ("hello", r"write generate\(\[prompt\]\)"),
        ([""], "prompt 0 is empty"),
        (["a", []], "prompt 1 is empty"),
        ([[1], [2, 10**6]], "prompt 1 holds a token id outside"),
        ([[-1]], "outside 0"),
        ([3], "prompt 0 is a int"),
        (["\udc80"], "bytes that are no characters"),
        ([[1] * 500], "has 500 tokens, but the model's context leaves room for 63"),
    ],
)
def test_bad_prompts(llm: LLM, prompts: object, text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        llm.generate(prompts)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layout": "tp=99"}, "tp=99 does not fit 4 query heads; the nearest that fits is 'tp=4'"),
        ({"layout": "pp=9"}, "pp=9 does not fit 2 layers; the nearest that fits is 'pp=2'"),
        ({"layout": "ep=2,dp=2"}, "needs a mixture of experts"),
        ({"layout": "tp=0"}, "tp=0"),
        ({"layout": "tq=2"}, "'tq=2' is not understood"),
        ({"layout": 4}, "layout=4: give a text"),
        ({"layout": "tp=8,ep=8"}, "tp=8 does not fit 4 query heads; the nearest that fits is 'tp=4'"),
        ({"device": "tpu"}, "device='tpu' is not known"),
        ({"dtype": "int8"}, "dtype='int8' is not known"),
    ],
)
def test_bad_options(llm: LLM, options: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LLM(llm.folder, **options)


def test_calls_of_the_wrong_kind(llm: LLM) -> None:
    for call, text in [
        (lambda: llm.score("text"), "score takes a list of token ids"),
        (lambda: llm.generate(["a"], 16), "16 are no sampling parameters"),
        (lambda: llm.chat({"role": "user"}), "give a text, or a list of messages"),
        (lambda: llm.chat([]), "give a text, or a list of messages"),
        (lambda: llm.chat("hello"), "this checkpoint has no chat template"),
        (lambda: LLM(5), "checkpoint=5: give a folder"),
        (lambda: LLM(""), "checkpoint='': give a folder"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()


def test_a_closed_llm_says_so(llm: LLM) -> None:
    with LLM(llm.folder) as other:
        pass
    with pytest.raises(ValueError, match="this LLM is closed"):
        other.generate(["a"])


def test_no_such_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        LLM(tmp_path / "nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="could not get owner/model from the hub") as caught:
        LLM("owner/model")
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_do_not_stop_a_stream() -> None:
    """A tokenizer with byte fallback, as Llama 2 has: any tokens at all give some text."""
    from tokenizers import Tokenizer, decoders, models

    from minillm.model.tokenizer import TextStream

    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581a": 256, "b": 257}
    fast = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        stream = TextStream(fast)
        text = "".join(stream.step(token) for token in torch.randint(0, 258, (12,), generator=draw).tolist())
        assert isinstance(text + stream.rest(text), str)
