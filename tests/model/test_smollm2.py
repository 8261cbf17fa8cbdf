"""The embedded model, against transformers reading the same package: logits, tokens, text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm import LLM, SamplingParams
from minillm.kv.paged import PagedCache
from minillm.model.decoder import Decoder
from minillm.model.embedded import embedded_folder, find_gguf
from minillm.model.linear import Linear
from minillm.model.weights import load_weights
from minillm.policy.batch import Batch, Chunk

TEXTS = [
    "The history of the Roman Empire begins",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "In 1984, 3.14159 was  still\tπ — naïve 漢字 🙂 <|im_end|> ok",
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


@pytest.fixture(scope="module")
def by_blas() -> Iterator[LLM]:
    """The same model with the BLAS that transformers uses, for every product."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linear, "packed", False)
        patch.setattr(Linear, "few_rows", False)
        yield LLM()


@pytest.fixture(scope="module")
def reference() -> object:
    path = find_gguf()
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reference_tokenizer() -> object:
    path = find_gguf()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("text", TEXTS)
def test_logits_and_token_ids(llm: LLM, by_blas: LLM, reference, reference_tokenizer, text: str) -> None:
    ids = llm.tokenizer.encode(text)
    assert ids == reference_tokenizer(text)["input_ids"]
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(by_blas.score(ids), expected, atol=1e-4, rtol=0)
    assert torch.equal(llm.score(ids).argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("text", TEXTS)
def test_packed_products_err_as_little_as_float32_does(llm: LLM, reference, text: str) -> None:
    """Against the same weights in float64: oneDNN adds up in another order than the BLAS, and no worse than twice as far off."""
    exact = Decoder(llm.config)
    load_weights(exact, llm.folder, torch.device("cpu"), torch.float64)
    ids = llm.tokenizer.encode(text)
    cache = PagedCache(llm.config, 1, len(ids), exact.device, exact.dtype)
    truth = exact(Batch((Chunk(0, 0, tuple(ids), (0,)),)), cache, every_row=True)
    with torch.no_grad():
        theirs = (reference(torch.tensor([ids])).logits[0] - truth).abs().max()
    assert theirs < 1e-4
    assert (llm.score(ids) - truth).abs().max() < 2e-4


def test_greedy_tokens(llm: LLM, reference) -> None:
    prompts = [llm.tokenizer.encode(text) for text in TEXTS[:2]]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=24, ignore_eos=True))
    for prompt, output in zip(prompts, outputs):
        with torch.no_grad():
            whole = reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=24,
                min_new_tokens=24,
                do_sample=False,
            )
        assert output.token_ids == whole[0, len(prompt) :].tolist()


def test_the_converted_folder_is_an_ordinary_checkpoint(reference) -> None:
    """transformers reads the folder too, and finds the same weights there."""
    converted = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
    for (name, mine), (other, theirs) in zip(converted.named_parameters(), reference.named_parameters()):
        assert name == other
        assert torch.equal(mine, theirs), name


def test_chat_template_and_answers(llm: LLM, reference_tokenizer) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    folder_tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    expected = folder_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert llm.tokenizer.chat(messages) == list(expected)
    answer = llm.chat("What is the capital of France?", SamplingParams(max_tokens=30))
    assert (answer.text, answer.finish_reason) == ("The capital of France is Paris.", "stop")
