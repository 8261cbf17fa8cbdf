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
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from minillm.engine.engine import LOST
from minillm.engine.runner import Work, step_span, weight_bytes, with_peak
from minillm.kv.paged import PagedCache
from minillm.model.cost import Cost, block_costs, head_cost
from minillm.model.decoder import Decoder
from minillm.model.sampling import Draw, draw
from minillm.parallel.lending import Lending
from minillm.parallel.pipe import Pipe
from minillm.parallel.rebalance import rebalance
from minillm.parallel.shards import Shard
from minillm.policy.batch import Batch
from minillm.ranks.comm import Comm
from minillm.ranks.transfers import Transfer
from minillm.trace.recorder import Recorder
from minillm.trace.trace import Category, Kind, Span

NOTE_BYTES = 2048


class HandsOver(Protocol):
    """What hears of each step where caches go to other instances (`disagg/handover.py`)."""

    def begin(self, batch: Batch) -> None: ...

    def settle(self, recorder: Recorder, step: int) -> None: ...

    def record(self, recorder: Recorder) -> None: ...


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
    model.config = model.config.of_layers(shard.layers)


class Stage:
    """One rank's layers, its part of the KV cache, and what goes to and from its neighbours.

    With a `baton` only its holder computes, so that ranks which share cores do not slow each other's clocks.
    """

    def __init__(self, model: Decoder, cache: PagedCache, pipe: Pipe) -> None:
        self.model, self.cache, self.pipe = model, cache, pipe
        self.recorder = Recorder(rank=pipe.stage)
        self.baton: AbstractContextManager[object] = nullcontext()
        self._above = (pipe.notes, pipe.stage - 1) if pipe.stage > 0 else (pipe.orders, 0)  # who says what to do
        self._below = [(pipe.notes, pipe.stage + 1)] if pipe.stage < pipe.last else []
        if pipe.stage == 0 and pipe.leads:
            self._below += [(pipe.orders, other) for other in range(1, pipe.orders.size)]
        self._leaving: deque[tuple[Transfer, Span]] = deque()
        self.lending: Lending | None = None
        self.handover: HandsOver | None = None

    def record(self, recorder: Recorder) -> None:
        """Let `recorder` have what happens on this rank from now on."""
        self.recorder = self.pipe.wire.recorder = recorder
        recorder.memory(Category.WEIGHTS, weight_bytes(self.model))

    def hold(self, baton: AbstractContextManager[object]) -> None:
        """Compute only with this baton from now on."""
        self.baton = self.pipe.wire.baton = baton

    def run(self) -> None:
        """Serve batches until rank 0 says that there are no more."""
        coming: deque[tuple[Work, Transfer | None]] = deque()
        note = self.expect_note()
        while True:
            while not coming or note.done:  # so that the next input moves while this one is computed
                work = self.read_note(note)
                self.pass_note(work)
                if work is None:
                    return self.settle()
                receives = self.pipe.stage > 0 and bool(work.batch.chunks)
                coming.append((work, self.expect_hidden(work) if receives else None))
                note = self.expect_note()
            work, transfer = coming.popleft()
            x = self.receive(transfer, "hidden states", work.step) if transfer is not None else None
            self.recorder.memory(Category.KV_CACHE, work.used_blocks[self.pipe.place] * self.cache.block_bytes)
            self.pass_on(work, self.compute(work, x))

    def compute(self, work: Work, x: torch.Tensor | None) -> torch.Tensor:
        """This stage's part of a batch: hidden states [tokens, hidden] for the next stage or, after the last, the tokens
        drawn, one after the other.
        """
        last, tensor = self.pipe.stage == self.pipe.last, self.pipe.tensor
        self._rebalance(work.step)
        span = step_span(
            self.recorder,
            self.model.config,
            work,
            self.model.dtype,
            head=last,
            costs=self._costs(work),
        )
        with self.baton, span, torch.inference_mode():
            if self.lending is not None:
                self.lending.begin(work.batch)
            if self.handover is not None:
                self.handover.begin(work.batch)
            self._copy(work.batch.copies)
            out = with_peak(self.recorder, lambda: self._forward(work, x), self.model.device)
            if last:
                draws = work.draws if self.pipe.draws else ()
                drawn = self._draw(out, draws) if draws else []
                out = torch.tensor([work.step, *(token for tokens in drawn for token in tokens)])
            elif self.model.device.type == "cuda" and self.recorder.timing:
                torch.cuda.current_stream().synchronize()  # so that the span is as long as the work
        if self.handover is not None:
            self.handover.settle(self.recorder, work.step)
        if self.lending is not None:
            self.lending.settle(self.recorder, work.step)
            if work.batch.moves and tensor is not None:
                tensor.comm.barrier()  # that this step is over says that all blocks have arrived
        return out

    def _draw(self, logits: torch.Tensor, draws: Sequence[tuple[Draw, ...]]) -> list[list[int]]:
        """The tokens after each chunk; none after one of which others did not answer."""
        sample = self.pipe.tensor.draw if self.pipe.tensor else draw
        if self.lending is None:
            return sample(logits, draws)
        lost = logits.isnan().any(-1)
        tokens = sample(torch.nan_to_num(logits), draws)
        return [[LOST] if gone else each for each, gone in zip(tokens, lost.tolist())]

    def _rebalance(self, step: int) -> None:
        """Place the experts anew, when it is time; all ranks that share them do it before the same step."""
        experts = self.pipe.experts
        if experts is None or not experts.is_time():
            return
        about = {"step": step, "group": experts.comm.name, "sequence": experts.comm.collectives}
        with self.recorder.span(Kind.COMMUNICATION, "rebalance", **about) as span:
            span.sent = rebalance(self.model, experts, experts.options.redundant_experts)
        self.recorder.memory(Category.WEIGHTS, weight_bytes(self.model))

    def _copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        if self.pipe.context is not None:
            self.pipe.context.copy(self.cache, pairs)
        else:
            self.cache.copy(pairs)

    def _forward(self, work: Work, x: torch.Tensor | None) -> torch.Tensor:
        if self.pipe.context is not None:
            last = self.pipe.stage == self.pipe.last and bool(work.draws)
            return self.pipe.context.forward(
                self.model, x, work.batch, self.cache, work.batch.sampling_rows if last else ()
            )
        if x is None:
            x = self.model.embed(work.batch) if work.batch.chunks else self._nothing(0)
        if self.pipe.experts is not None:
            x = self.pipe.experts.through(self.model, x, work.batch, self.cache, work.tokens)
        elif not work.batch.chunks:  # some blocks move, and that is all
            return x
        elif self.lending is not None:
            x = self.lending.through(self.model, x, work.batch, self.cache, self.recorder)
        else:
            x = self.model.through(x, work.batch, self.cache)
        if self.pipe.stage < self.pipe.last or not work.draws:
            return x
        return self.model.logits(x, work.batch)

    def pass_on(self, work: Work, x: torch.Tensor) -> None:
        """Send hidden states to the next stage, or tokens to rank 0; returns at once."""
        pipe = self.pipe
        if pipe.stage < pipe.last and work.batch.chunks:
            self._leave(pipe.hidden, pipe.hidden.isend(x, pipe.stage + 1), "hidden states", work.step)
        elif 0 < pipe.stage == pipe.last and pipe.leads:
            self._leave(pipe.notes, pipe.notes.isend(x, 0), "tokens", work.step)

    def _costs(self, work: Work) -> Sequence[Cost]:
        """What each part of the step costs from one message to the next: the embedding, each block, the LM head. Where experts are
        shared out nobody knows before the step; they are found as it goes.
        """
        config, size, tensor, last = self.model.config, self.model.dtype.itemsize, self.pipe.tensor, self.pipe.last
        head = [head_cost(config, work.batch, size)] * (self.pipe.stage == last)
        embedding = [Cost()] * (self.pipe.stage == 0 and tensor is not None and bool(work.batch.chunks))
        if self.pipe.context is not None:
            return self.pipe.context.price(head)
        if self.pipe.experts is not None:
            return self.pipe.experts.price(embedding, head)
        if tensor is None:
            return ()
        tokens, parts = sum(len(chunk.token_ids) for chunk in work.batch.chunks), embedding
        for layer in range(config.layers):
            project, attention, mlp = block_costs(config, work.batch, size, config.is_sparse(layer))
            summed_whole = 1 if config.is_sparse(layer) else tensor.parts(tokens)
            parts += [*(project + attention).split(tensor.parts(tokens)), *mlp.split(summed_whole)]
        return [*parts, *head]

    def expect_hidden(self, work: Work) -> Transfer:
        """Start to receive what the stage before has computed of a batch."""
        tokens = sum(len(chunk.token_ids) for chunk in work.batch.chunks)
        if self.pipe.context is not None:
            tokens = len(self.pipe.context.own(work.batch, self.cache.block_size))
        return self.pipe.hidden.irecv(self._nothing(tokens), self.pipe.stage - 1)

    def _nothing(self, tokens: int) -> torch.Tensor:
        """Room for the hidden states of so many tokens."""
        return torch.empty(tokens, self.model.config.hidden_size, dtype=self.model.dtype, device=self.model.device)

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
        """Start to receive the next note from who says what to do."""
        comm, who = self._above
        return comm.irecv(torch.empty(NOTE_BYTES, dtype=torch.uint8), who)

    def read_note(self, note: Transfer) -> Work | None:
        """The work of a note; a long one has a second part. None: no more."""
        with self.recorder.span(Kind.WAITING, "work"):
            data = bytes(note.wait().numpy())
        size = int.from_bytes(data[:8], "little")
        if size > NOTE_BYTES - 8:
            comm, who = self._above
            rest = comm.recv(torch.empty(size, dtype=torch.uint8), who)
            return pickle.loads(bytes(rest.numpy()))
        return pickle.loads(data[8 : 8 + size])

    def pass_note(self, work: Work | None) -> None:
        """Send a work, or that there are no more, to the next stage, and from rank 0 to those that share its layers; returns at
        once.
        """
        data = pickle.dumps(work)
        fits = len(data) <= NOTE_BYTES - 8
        first = (len(data).to_bytes(8, "little") + data * fits).ljust(NOTE_BYTES, b"\0")
        for comm, to in self._below:
            for part in (first,) if fits else (first, data):
                message = torch.frombuffer(bytearray(part), dtype=torch.uint8)
                self._leave(comm, comm.isend(message, to), "work", work.step if work else 0)

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
