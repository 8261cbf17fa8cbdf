"""Pipeline parallelism: every rank holds some of the layers, and batches follow one another through the ranks.

Rank 0 has the scheduler and the first stage. It hands each batch down the pipe, and without waiting begins the next one,
with other requests or the next part of a prompt, until as many are under way as there are stages; then it waits for the
tokens of the oldest. Every stage receives its next input and sends its last output while it computes. One batch at a time
(`depth` 1) is naive model parallelism. (GPipe, Huang et al. 2019, section 2.2, forward only; Orca, Yu et al. 2022,
section 4.1.) Nothing here decides what runs when, or knows requests.
"""

from __future__ import annotations

import pickle
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from minillm.engine.runner import Work, step_span, weight_bytes, with_peak
from minillm.kv.paged import PagedCache
from minillm.model.config import ModelConfig
from minillm.model.decoder import Decoder
from minillm.model.linear import pack
from minillm.model.sampling import draw
from minillm.model.weights import load_weights
from minillm.parallel.shards import Shard
from minillm.ranks.comm import Comm
from minillm.ranks.transfers import Transfer
from minillm.trace.recorder import Recorder
from minillm.trace.trace import Category, Kind, Span

NOTE_BYTES = 2048


class Elsewhere(nn.Module):
    """Stands where another rank holds a part of the model: what comes in goes out."""

    def forward(self, x: torch.Tensor, *args: object) -> torch.Tensor:
        return x


def cut_to_stage(model: Decoder, shard: Shard) -> None:
    """Leave a model, built and not loaded, only what the rank's stage holds; its config then tells of these layers alone."""
    model.layers = nn.ModuleList(
        layer if number in shard.layers else Elsewhere() for number, layer in enumerate(model.layers)
    )
    for place, number in enumerate(shard.layers):
        model.layers[number].self_attn.layer = place  # type: ignore[union-attr]  # in the rank's own cache
    if not shard.first_stage and not (shard.last_stage and model.config.tied_embeddings):
        model.embed_tokens = Elsewhere()  # type: ignore[assignment]
    if not shard.last_stage:
        model.norm, model.lm_head = Elsewhere(), Elsewhere()  # type: ignore[assignment]
    model.config = replace(model.config, layers=len(shard.layers))


def load_stage(
    folder: Path, config: ModelConfig, shard: Shard, device: torch.device, dtype: torch.dtype
) -> tuple[Decoder, int]:
    """The rank's part of a checkpoint, ready to compute; and the bytes read, which are its shard's."""
    model = Decoder(config)
    cut_to_stage(model, shard)
    bytes_read = load_weights(model, folder, device, dtype, shard.cut, complete=False)
    if not shard.first_stage:
        model.embed_tokens = Elsewhere()  # type: ignore[assignment]  # of tied weights, the LM head has them now
    pack(model)
    return model, bytes_read


@dataclass
class Pipe:
    """The line of ranks that a batch goes through. `hidden` carries hidden states from device to device, `notes` what the
    hosts tell each other. Ranks within it are stages.
    """

    hidden: Comm
    notes: Comm

    @property
    def stage(self) -> int:
        """Which one this rank is."""
        return self.hidden.rank

    @property
    def last(self) -> int:
        """The number of the last one."""
        return self.hidden.size - 1


class Stage:
    """One rank's layers, its part of the KV cache, and what goes to and from its neighbours.

    With a `baton` only its holder computes, so that ranks which share cores do not slow each other's clocks.
    """

    def __init__(self, model: Decoder, cache: PagedCache, pipe: Pipe) -> None:
        self.model, self.cache, self.pipe = model, cache, pipe
        self.recorder = Recorder(rank=pipe.stage)
        self.baton: AbstractContextManager[object] = nullcontext()
        self._leaving: deque[tuple[Transfer, Span]] = deque()

    def record(self, recorder: Recorder) -> None:
        """Let `recorder` have what happens on this rank from now on."""
        self.recorder = recorder
        recorder.memory(Category.WEIGHTS, weight_bytes(self.model))

    def run(self) -> None:
        """Serve batches until rank 0 says that there are no more."""
        coming: deque[tuple[Work, Transfer]] = deque()
        note = self.expect_note()
        while True:
            while not coming or note.done:  # so that the next input moves while this one is computed
                work = self.read_note(note)
                self.pass_note(work)
                if work is None:
                    return self.settle()
                coming.append((work, self.expect_hidden(work)))
                note = self.expect_note()
            work, transfer = coming.popleft()
            x = self.receive(transfer, "hidden states", work.step)
            self.recorder.memory(Category.KV_CACHE, work.used_blocks * self.cache.block_bytes)
            self.pass_on(work, self.compute(work, x))

    def compute(self, work: Work, x: torch.Tensor | None) -> torch.Tensor:
        """This stage's part of a batch: hidden states [tokens, hidden] for the next stage or, after the last, the tokens
        drawn, one after the other.
        """
        last = self.pipe.stage == self.pipe.last
        span = step_span(self.recorder, self.model.config, work, self.model.dtype, head=last)
        with self.baton, span, torch.inference_mode():
            self.cache.copy(work.batch.copies)
            out = with_peak(self.recorder, lambda: self._forward(work, x), self.model.device)
            if last:
                drawn = draw(out, work.draws) if work.draws else []
                out = torch.tensor([work.step, *(token for tokens in drawn for token in tokens)])
            elif self.model.device.type == "cuda" and self.recorder.timing:
                torch.cuda.current_stream().synchronize()  # so that the span is as long as the work
            return out

    def _forward(self, work: Work, x: torch.Tensor | None) -> torch.Tensor:
        x = self.model.through(self.model.embed(work.batch) if x is None else x, work.batch, self.cache)
        if self.pipe.stage < self.pipe.last or not work.draws:
            return x
        return self.model.logits(x, work.batch)

    def pass_on(self, work: Work, x: torch.Tensor) -> None:
        """Send hidden states to the next stage, or tokens to rank 0; returns at once."""
        last = self.pipe.stage == self.pipe.last
        comm, to, name = (
            (self.pipe.notes, 0, "tokens") if last else (self.pipe.hidden, self.pipe.stage + 1, "hidden states")
        )
        self._leave(comm, comm.isend(x, to), name, work.step)

    def expect_hidden(self, work: Work) -> Transfer:
        """Start to receive what the stage before has computed of a batch."""
        tokens = sum(len(chunk.token_ids) for chunk in work.batch.chunks)
        room = torch.empty(tokens, self.model.config.hidden_size, dtype=self.model.dtype, device=self.model.device)
        return self.pipe.hidden.irecv(room, self.pipe.stage - 1)

    def expect_tokens(self, work: Work) -> Transfer:
        """Start to receive what the last stage draws."""
        count = sum(max(1, len(draws)) for draws in work.draws)
        return self.pipe.notes.irecv(torch.empty(1 + count, dtype=torch.int64), self.pipe.last)

    def receive(self, transfer: Transfer, name: str, step: int) -> torch.Tensor:
        """Wait for a message that is under way."""
        comm = self.pipe.notes if name == "tokens" else self.pipe.hidden
        peer = transfer.operation.members[0]
        with self.recorder.span(
            Kind.WAITING, name, step=step, group=comm.name, sequence=transfer.index, peer=peer
        ):  # fmt: skip
            return transfer.wait()

    def expect_note(self) -> Transfer:
        """Start to receive the next note from the stage before."""
        return self.pipe.notes.irecv(torch.empty(NOTE_BYTES, dtype=torch.uint8), self.pipe.stage - 1)

    def read_note(self, note: Transfer) -> Work | None:
        """The work of a note; a long one has a second part. None: no more."""
        with self.recorder.span(Kind.WAITING, "work"):
            data = bytes(note.wait().numpy())
        size = int.from_bytes(data[:8], "little")
        if size > NOTE_BYTES - 8:
            rest = self.pipe.notes.recv(torch.empty(size, dtype=torch.uint8), self.pipe.stage - 1)
            return pickle.loads(bytes(rest.numpy()))
        return pickle.loads(data[8 : 8 + size])

    def pass_note(self, work: Work | None) -> None:
        """Send a work, or that there are no more, to the next stage; returns at once."""
        if self.pipe.stage == self.pipe.last:
            return
        data = pickle.dumps(work)
        size, to = len(data).to_bytes(8, "little"), self.pipe.stage + 1
        fits = len(data) <= NOTE_BYTES - 8
        for part in ((size + data * fits).ljust(NOTE_BYTES, b"\0"), data):
            message = torch.frombuffer(bytearray(part), dtype=torch.uint8)
            self._leave(self.pipe.notes, self.pipe.notes.isend(message, to), "work", work.step if work else 0)
            if fits:
                return

    def settle(self) -> None:
        """Wait until all that was sent has left."""
        while self._leaving:
            self._leaving[0][0].wait()
            self._settle_done()

    def _leave(self, comm: Comm, transfer: Transfer, name: str, step: int) -> None:
        """A message has begun to leave. It is recorded once it is over."""
        size, peer = transfer.buffer.nbytes, transfer.operation.members[0]
        about = {"group": comm.name, "sequence": transfer.index, "peer": peer, "message_bytes": size}
        span = Span(self.recorder.rank, Kind.COMMUNICATION, name, transfer.began_s, 0.0, step, "wire", **about)  # type: ignore[arg-type]
        self._leaving.append((transfer, span))
        self._settle_done()

    def _settle_done(self) -> None:
        """Record the messages that are over, and let go of their memory."""
        while self._leaving and self._leaving[0][0].done:
            transfer, span = self._leaving.popleft()
            transfer.wait()
            times = {"end_s": transfer.ended_s} if self.recorder.timing else {"start_s": 0.0}
            self.recorder.add(replace(span, **times))  # type: ignore[arg-type]


class PipelineRunner:
    """The pipe as the engine sees it, from rank 0: `start` computes the first stage, `finish` waits for the tokens.

    `depth` batches may be under way.
    """

    def __init__(self, stage: Stage, num_blocks: int, depth: int) -> None:
        self.stage, self.num_blocks, self.depth = stage, num_blocks, depth
        self._under_way: deque[tuple[Work, Transfer]] = deque()

    @property
    def recorder(self) -> Recorder:
        """Has what happens on this rank."""
        return self.stage.recorder

    def start(self, work: Work) -> None:
        """Hand the work down the pipe, and compute the first stage of it."""
        stage = self.stage
        stage.pass_note(work)
        self._under_way.append((work, stage.expect_tokens(work)))
        stage.pass_on(work, stage.compute(work, None))

    def finish(self) -> list[list[int]]:
        """The tokens of the oldest work under way."""
        work, transfer = self._under_way.popleft()
        step, *tokens = self.stage.receive(transfer, "tokens", work.step).tolist()
        assert step == work.step
        each = iter(tokens)
        return [[next(each) for _ in draws or (None,)] for draws in work.draws]

    def end(self) -> None:
        """Send everyone home: there are no more batches."""
        self.stage.pass_note(None)
        self.stage.settle()

    def note_cache(self, used_blocks: int) -> None:
        """The blocks in use, in bytes on this rank."""
        self.recorder.memory(Category.KV_CACHE, used_blocks * self.stage.cache.block_bytes)

    def record(self, recorder: Recorder) -> None:
        """Let `recorder` have what happens on this rank from now on."""
        self.stage.record(recorder)
