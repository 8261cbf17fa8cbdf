"""Tensor parallelism: every rank of a line holds a slice of every layer, and computes its slice of every token.

A block of a layer is two products. The first is cut by columns: a rank has some of the heads, or some of the MLP's numbers,
whole, and needs nobody for them. The second is cut by rows: it takes the numbers that the rank has, and gives a summand of
each number of the result. So one all-reduce a block is all that is sent (Megatron-LM, Shoeybi et al. 2019, section 3).
Embedding and LM head are cut by words of the vocabulary. Whose slice is which: `shards.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from minillm.model.decoder import Decoder, Layer
from minillm.model.linear import Linear
from minillm.model.mlp import MLP
from minillm.model.moe import SparseMLP
from minillm.model.sampling import Draw, sample
from minillm.parallel.layout import share
from minillm.parallel.mesh import DeviceMesh
from minillm.parallel.shards import Shard
from minillm.parallel.wire import Wire
from minillm.ranks.comm import Comm
from minillm.ranks.transfers import Transfer

LEAST_ROWS = 16  # of a chunk


class TensorGroup:
    """The ranks that share each layer. They add up what each has computed of it, and find the likeliest of all words.

    `vocabulary` is how many words the model has, of which each rank has its share.
    """

    def __init__(self, comm: Comm, vocabulary: int, wire: Wire | None = None) -> None:
        self.comm, self.wire = comm, wire or Wire()
        self.words = [share(vocabulary, comm.size, rank) for rank in range(comm.size)]
        self.chunks = 1

    def sum(self, product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """The sum of everybody's product(x), for x [rows, …].

        With `chunks`, the rows of a long x are taken in so many parts, and one part's sum is under way while the next is
        computed. That gains where something else than the computing core carries the messages, and costs smaller products.
        """
        parts = x.chunk(self.parts(x.shape[0]))
        if len(parts) == 1:
            return self.all_reduce(product(x))
        under_way = [self._start(product(part)) for part in parts]
        return torch.cat([self._finish(*each) for each in under_way])

    def parts(self, rows: int) -> int:
        """In how many parts the sum of so many rows leaves."""
        return self.chunks if rows >= LEAST_ROWS * self.chunks else 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of everybody's `x`, in place."""
        with self.wire.message("all_reduce", x.nbytes, self.comm):
            return self.comm.all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[n, …] -> [ranks, n, …]."""
        with self.wire.message("all_gather", x.nbytes, self.comm):
            return self.comm.all_gather(x).view(self.comm.size, *x.shape)

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """The likeliest word of each row of logits [rows, the rank's words]: each rank tells its own best, and how good."""
        best, place = logits.max(-1)
        mine = torch.stack((best.double(), place.double() + self.words[self.comm.rank].start), dim=-1)
        everyone = self.all_gather(mine)  # [ranks, rows, 2]
        winner = everyone[:, :, 0].argmax(0, keepdim=True)  # of equals the first, as on one device
        return everyone[:, :, 1].gather(0, winner)[0].long()

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows, the rank's words] -> [rows, all words]. Shares of unequal size travel padded."""
        most = len(self.words[0])
        everyone = self.all_gather(F.pad(logits, (0, most - logits.shape[-1])))
        return torch.cat([rows[:, : len(words)] for rows, words in zip(everyone, self.words)], dim=-1)

    def draw(self, logits: torch.Tensor, draws: Sequence[tuple[Draw, ...]]) -> list[list[int]]:
        """As `sampling.draw`, from the rank's words of each row. Rows that are sampled travel whole, greedy ones never.

        Only the first rank of the line draws; the others return nothing.
        """
        likeliest = self.argmax(logits).tolist()
        random = [row for row, wanted in enumerate(draws) if not all(each.params.greedy for each in wanted)]
        rows = dict(zip(random, self.whole(logits[random]))) if random else {}
        if self.comm.rank > 0:
            return []

        def one(row: int, each: Draw) -> int:
            if each.params.greedy:
                return likeliest[row]
            return sample(rows[row], each.params, each.seed, each.request, each.position)

        return [[one(row, each) for each in wanted] or [likeliest[row]] for row, wanted in enumerate(draws)]

    def _start(self, x: torch.Tensor) -> tuple[Transfer, int]:
        """A sum begins; which one of the group's collectives it is."""
        transfer = self.comm.iall_reduce(x)
        self.wire.begun(x.nbytes)
        return transfer, self.comm.collectives - 1

    def _finish(self, transfer: Transfer, sequence: int) -> torch.Tensor:
        return self.wire.finish("all_reduce", transfer, self.comm, sequence, transfer.buffer.nbytes)


class RowParallelLinear(Linear):
    """y = Σ over ranks of x_r W_rᵀ, + b, for x_r [rows, the rank's inputs] and W_r [outputs, the rank's inputs]."""

    def __init__(self, inputs: int, outputs: int, bias: bool, group: TensorGroup) -> None:
        super().__init__(inputs, outputs, bias=bias, device="meta")
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.group.sum(self.multiply, x)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """Looks up the words that the rank has, takes zeros for the others, and adds up: [tokens] -> [tokens, hidden]."""

    def __init__(self, words: range, hidden: int, group: TensorGroup) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(words), hidden, device="meta"), requires_grad=False)
        self.words, self.group = words, group

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        place = token_ids - self.words.start
        absent = (place < 0) | (place >= len(self.words))
        x = F.embedding(place.masked_fill(absent, 0), self.weight)
        return self.group.all_reduce(x.masked_fill_(absent[:, None], 0))


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh, wire: Wire | None = None) -> TensorGroup:
    """Make a model, built and not loaded, this rank's slice of it; its config then tells of the slice.

    What other stages hold is left as it is. Attention needs no other change: it works on the heads that are here, over a
    cache that holds the KV heads that are here.
    """
    config = model.config
    shard = Shard(config, mesh.layout, mesh.rank)
    group = TensorGroup(mesh.comm("tp"), config.vocab_size, wire)
    heads, kv_heads, columns = len(shard.heads), len(shard.kv_heads), len(shard.columns)
    hidden, width = config.hidden_size, config.head_dim
    for layer in model.layers:
        if isinstance(layer, Layer):
            attention = layer.self_attn
            attention.heads, attention.kv_heads = heads, kv_heads
            attention.qkv_proj = _column_parallel(hidden, (heads + 2 * kv_heads) * width, config.qkv_bias)
            attention.o_proj = RowParallelLinear(heads * width, hidden, config.out_bias, group)
            if isinstance(layer.mlp, SparseMLP):
                _slice_experts(layer.mlp, shard, group)
            else:
                layer.mlp.gate_up_proj = _column_parallel(hidden, 2 * columns, False)
                layer.mlp.down_proj = RowParallelLinear(columns, hidden, False, group)
    if isinstance(model.embed_tokens, nn.Embedding):
        model.embed_tokens = VocabParallelEmbedding(shard.vocabulary, hidden, group)  # type: ignore[assignment]
    if isinstance(model.lm_head, Linear):
        model.lm_head = _column_parallel(hidden, len(shard.vocabulary), False)
        if config.tied_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
    model.config = replace(
        config, heads=heads, kv_heads=kv_heads, intermediate_size=columns, vocab_size=len(shard.vocabulary), moe=shard.moe
    )  # fmt: skip
    return group


def _slice_experts(mlp: SparseMLP, shard: Shard, group: TensorGroup) -> None:
    """Leave every expert its slice, whose results are added up once for all of them; unless experts are whole, on some ranks
    each (`expert.py`).
    """
    moe, hidden = shard.config.moe, shard.config.hidden_size
    if shard.layout.ep > 1 or moe is None:
        return
    for part in mlp.experts:
        mlp.experts[part] = MLP(hidden, len(shard.share(moe.intermediate_size)))
    if mlp.shared_expert is not None:
        mlp.shared_expert = MLP(hidden, len(shard.share(moe.shared_size)))
    mlp.to("meta")
    mlp.combine = group.all_reduce


def _column_parallel(inputs: int, outputs: int, bias: bool) -> Linear:
    """A plain linear layer: cut by columns, a product needs nobody else."""
    return Linear(inputs, outputs, bias=bias, device="meta")
