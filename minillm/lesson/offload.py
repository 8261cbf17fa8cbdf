"""A model whose weights lie on the disk, by accelerate: each layer is read when it is its turn, and forgotten again."""

from __future__ import annotations

import copy

from accelerate import disk_offload

from minillm.llm import LLM
from minillm.model.decoder import Decoder
from minillm.model.weights import load_weights


def offloaded(llm: LLM, folder: str) -> LLM:
    """The same checkpoint under an engine of its own, its weights in `folder`, which must stay as long as it runs."""
    twin = copy.copy(llm)
    twin.__dict__.pop("engine", None)
    twin.model = Decoder(llm.config)
    load_weights(twin.model, llm.folder, llm.device, llm.dtype)
    disk_offload(twin.model, folder, execution_device=llm.device)
    return twin
