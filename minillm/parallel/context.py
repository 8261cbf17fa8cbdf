"""Context parallelism: every rank of a line holds some of the blocks of every sequence, so that N ranks have room for N times the
context.

A token is computed on the rank that its own block lies on, through all layers; there its K and V stay. Its query goes to the others
that hold keys before it, and each sends back what its keys say, three small tensors to merge (DistAttention; Infinite-LLM, Lin et al.
2024, section 4.1). With `options.ring_prefill` the keys of prompts travel instead, from rank to rank round the line (Ring
Attention, Liu et al. 2023, section 3). Who asks whom: `distkv/spread.py`; the arithmetic: `distkv/attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minillm.distkv.spread import questions_of
from minillm.kv.paged import PagedCache
from minillm.model.cost import Cost
from minillm.model.decoder import Decoder, Layer
from minillm.parallel.context_step import ContextStep
from minillm.parallel.tensor import TensorGroup
from minillm.parallel.wire import Wire
from minillm.policy.batch import Batch
from minillm.policy.options import EngineOptions
from minillm.ranks.comm import Comm


class ContextGroup:
    """The ranks that share the KV cache of a stage's layers, or of slices of them."""

    def __init__(self, comm: Comm, tensor: TensorGroup | None, wire: Wire) -> None:
        self.comm, self.tensor, self.wire = comm, tensor, wire
        self.options = EngineOptions()
        self.price([])

    def price(self, last: list[Cost]) -> Sequence[Cost]:
        """What the parts of the next step cost, between messages, found as it goes; with parts that come `last`, in what is left after
        the last message.
        """
        self.costs: list[Cost] = []
        self._spent, self._last = Cost(), last
        return self.costs

    def spend(self, cost: Cost, messages: int = 0) -> None:
        """Count what is computed before the next message, or before so many of them."""
        self._spent += cost
        if messages:
            self.costs += self._spent.split(messages)
            self._spent = Cost()

    def forward(
        self, model: Decoder, x: torch.Tensor | None, batch: Batch, cache: PagedCache, wanted: Sequence[int]
    ) -> torch.Tensor:
        """A stage's layers: from what came of this rank's rows or, in the first stage, None, to what goes on or, with rows
        `wanted`, to their logits, on the first rank of the line.
        """
        if x is None:
            own = [batch.token_ids[row] for row in self.own(batch, cache.block_size)]
            self.spend(Cost(), self.tensor is not None)
            x = model.embed_tokens(torch.tensor(own, dtype=torch.int64, device=model.device))
        x = self.through(model, x, batch, cache)
        rows = self.to_first(x, batch, cache.block_size, wanted) if wanted else x
        self.spend(sum(self._last, Cost()) if self.comm.rank == 0 else Cost(), 1)
        if not wanted:
            return x
        return model.logits(rows, batch, every_row=True) if self.comm.rank == 0 else rows

    def through(self, model: Decoder, x: torch.Tensor, batch: Batch, cache: PagedCache) -> torch.Tensor:
        """This rank's rows of a batch through all layers, as `Decoder.through`: [its rows, hidden] -> the same."""
        step = ContextStep(self, model, batch, cache)
        for layer in model.layers:
            if isinstance(layer, Layer):
                if len(x):
                    x = layer(x, step, cache)
                else:  # it has no token, but keys that others ask for
                    step.answer(layer.self_attn.layer, cache)
                self.comm.board.tick()  # a long prompt is no fault
        return x

    def own(self, batch: Batch, block_size: int) -> list[int]:
        """The rows of a batch that this rank computes."""
        return [row.number for row in questions_of(batch, self.comm.size, self.comm.rank, block_size).own]

    def copy(self, cache: PagedCache, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to) of the whole pool, in all layers; some go from rank to rank."""
        size, rank = self.comm.size, self.comm.rank
        cache.copy([(old // size, new // size) for old, new in pairs if old % size == new % size == rank])
        moves = [(old, new) for old, new in pairs if old % size != new % size]
        if not moves:
            return
        leaving = sorted((pair for pair in moves if pair[0] % size == rank), key=lambda pair: pair[1] % size)
        coming = sorted((pair for pair in moves if pair[1] % size == rank), key=lambda pair: pair[0] % size)
        send = [sum(new % size == other for _, new in leaving) for other in range(size)]
        recv = [sum(old % size == other for old, _ in coming) for other in range(size)]
        blocks = [old // size for old, _ in leaving]
        both = torch.stack((cache.keys[:, blocks], cache.values[:, blocks])).movedim(2, 0)  # [blocks, 2, layers, …]
        keys, values = self.move("blocks", both, send, recv).movedim(0, 2)
        places = [new // size for _, new in coming]
        cache.keys[:, places], cache.values[:, places] = keys, values

    def to_first(self, x: torch.Tensor, batch: Batch, block_size: int, wanted: Sequence[int]) -> torch.Tensor:
        """Of everybody's rows [its own, hidden], those `wanted`, in their order, on the first rank of the line; none on the others."""
        rows = questions_of(batch, self.comm.size, self.comm.rank, block_size).rows
        sources = [[number for number in wanted if rows[number].owner == rank] for rank in range(self.comm.size)]
        place = {number: at for at, number in enumerate(self.own(batch, block_size))}
        mine = [place[number] for number in sources[self.comm.rank]]
        nobody = [0] * (self.comm.size - 1)
        recv = [len(each) for each in sources] if self.comm.rank == 0 else [0, *nobody]
        came = self.move("last hidden states", x[mine], [len(mine), *nobody], recv)
        if self.comm.rank > 0:
            return came
        order = {number: at for at, number in enumerate(number for each in sources for number in each)}
        return came[[order[number] for number in wanted]]

    def move(self, name: str, x: torch.Tensor, send_rows: list[int], recv_rows: list[int]) -> torch.Tensor:
        """Rows to every rank and from every rank."""
        leaving = x.nbytes - x[:1].nbytes * send_rows[self.comm.rank]
        self.spend(Cost(), 1)
        with self.wire.message(name, leaving, self.comm):
            return self.comm.all_to_all(x, send_rows, recv_rows)
