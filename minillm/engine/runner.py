"""What runs the engine's batches: the decoder in this process here, a pipeline of ranks in `parallel/pipeline.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from minillm.kv.paged import PagedCache
from minillm.model.config import ModelConfig
from minillm.model.cost import Cost, pass_cost
from minillm.model.decoder import Decoder
from minillm.model.sampling import Draw, draw
from minillm.policy.batch import Batch
from minillm.policy.options import EngineOptions
from minillm.trace.allocations import peak_of
from minillm.trace.recorder import OpenSpan, Recorder
from minillm.trace.trace import Category, Kind

CPU_CACHE_BYTES = 2**30
GPU_CACHE_SHARE = 0.8


@dataclass(frozen=True)
class Work:
    """One step for a runner: the batch, how the next token of each row that samples is drawn (`sampling.draw`), and how
    many blocks of the KV cache are in use on each of the ranks that share them. Where replicas share experts, `tokens` says how many each has in this step.
    """

    step: int
    batch: Batch
    draws: tuple[tuple[Draw, ...], ...]
    used_blocks: tuple[int, ...]
    tokens: tuple[int, ...] = ()

    def by_chunk(self, drawn: Sequence[list[int]]) -> list[list[int]]:
        """The drawn tokens of every chunk: none for those within their prompts."""
        each = iter(drawn)
        return [next(each) if chunk.samples else [] for chunk in self.batch.chunks]


class Runner(Protocol):
    """Runs works in order: `start` takes one, `finish` returns the tokens of the oldest, as `sampling.draw` does.

    `depth` is how many may be started before one must be finished; `num_blocks` is what the KV cache has room for, of which
    block b lies on the b mod `spread`-th of the ranks that share them.
    """

    depth: int
    num_blocks: int
    spread: int

    @property
    def recorder(self) -> Recorder: ...

    def agree(self, work: Work) -> Work | None:
        """What is to be started: the work, or None when there is nothing to do."""

    def start(self, work: Work) -> None: ...

    def finish(self) -> list[list[int]]: ...

    def note_cache(self, used_blocks: tuple[int, ...]) -> None:
        """So many blocks of the cache are in use from now on."""

    def record(self, recorder: Recorder) -> None:
        """Let `recorder` have what happens from now on."""


class LocalRunner:
    """One decoder and its KV cache, in this process: one batch at a time."""

    depth, spread = 1, 1

    def __init__(self, model: Decoder, options: EngineOptions) -> None:
        self.model = model
        self.num_blocks = options.num_blocks or default_num_blocks(model, options)
        self.cache = PagedCache(model.config, self.num_blocks, options.block_size, model.device, model.dtype)
        self._recorder = Recorder()

    @property
    def recorder(self) -> Recorder:
        """Has what happens here."""
        return self._recorder

    def record(self, recorder: Recorder) -> None:
        """Let `recorder` have the spans, and the memory held."""
        self._recorder = recorder
        recorder.memory(Category.WEIGHTS, weight_bytes(self.model))

    def agree(self, work: Work) -> Work | None:
        """The work, unless it is empty."""
        return work if work.batch.chunks else None

    def start(self, work: Work) -> None:
        """Take a work; it is computed when its tokens are asked for."""
        self.work = work

    def finish(self) -> list[list[int]]:
        """One forward pass, and the tokens it gives."""
        batch = self.work.batch
        with step_span(self.recorder, self.model.config, self.work, self.model.dtype):
            self.cache.copy(batch.copies)
            return draw(self.compute(batch), self.work.draws)

    def note_cache(self, used_blocks: tuple[int, ...]) -> None:
        """The blocks in use, in bytes. The pool behind them is `cache.bytes`, in use or not."""
        self.recorder.memory(Category.KV_CACHE, used_blocks[0] * self.cache.block_bytes)

    def compute(self, batch: Batch) -> torch.Tensor:
        """Logits of the rows that sample; with the peak of its activations, where the recorder wants it."""
        return with_peak(self.recorder, lambda: self.model(batch, self.cache), self.model.device)


def with_peak(recorder: Recorder, compute: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """Compute, and record the peak of the activations where the recorder wants it."""
    if not recorder.activations:
        return compute()
    began_s = recorder.now_s()
    result, peak = peak_of(compute, device)
    recorder.memory(Category.ACTIVATIONS, peak, began_s)
    recorder.memory(Category.ACTIVATIONS, 0)
    return result


def step_span(
    recorder: Recorder,
    config: ModelConfig,
    work: Work,
    dtype: torch.dtype,
    head: bool = True,
    costs: Sequence[Cost] = (),
) -> OpenSpan:
    """The span of a step on this rank, with what it costs by formula: the layers of `config`, and the LM head or not; or the
    `costs` given, of each part between two messages.
    """
    chunks = work.batch.chunks
    prompts = sum(chunk.is_prefill for chunk in chunks)
    name = "decode" if not prompts else "prefill" if prompts == len(chunks) else "prefill + decode"
    name = name if chunks else "others' tokens"
    return recorder.step(
        Kind.PREFILL if prompts else Kind.DECODE,
        name,
        costs or (pass_cost(config, work.batch, dtype.itemsize, head=head).total,),
        step=work.step,
        tokens=sum(len(chunk.token_ids) for chunk in chunks),
        request_ids=tuple(chunk.request_id for chunk in chunks),
    )


def weight_bytes(model: Decoder) -> int:
    """What the model's weights take."""
    return sum(parameter.nbytes for parameter in model.parameters())


def default_num_blocks(model: Decoder, options: EngineOptions, sharers: int = 1) -> int:
    """As many blocks as the longest sequences can use together, within the memory that is kept for the cache.

    `sharers` is how many ranks will take theirs from the same GPU.
    """
    config = model.config
    block_bytes = options.block_size * config.kv_numbers_per_token * model.dtype.itemsize
    longest = -(-config.max_positions // options.block_size)
    room = CPU_CACHE_BYTES
    if model.device.type == "cuda":
        room = int(torch.cuda.mem_get_info(model.device)[0] * GPU_CACHE_SHARE / sharers)
    return max(1, min(longest * options.max_running, room // block_bytes))
