"""Expert parallelism: the experts of a layer lie on different ranks, and tokens travel to those that they chose.

Everybody first tells everybody which experts its tokens chose. Then one all-to-all takes each token to the ranks of its
experts, once to each, however many of them live there; and one brings back what they said, summed up there with its weights
(GShard, Lepikhin et al. 2020, section 3.2; without capacities, so that nothing is dropped). Attention beside it is data
parallel, tensor parallel, or both: ranks with the same tokens take a share of them each.

At the width of a real cluster nobody could hear everybody's choices; DeepEP sends only counts ahead. Who holds which experts:
`policy/experts.py`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from minillm.kv.paged import PagedCache
from minillm.model.attention import Step
from minillm.model.cost import Cost, block_costs, chosen_cost, product_cost
from minillm.model.decoder import Decoder, Layer
from minillm.model.moe import NOBODY, Experts, Routing, SparseMLP, Tally
from minillm.parallel.exchange import destinations, plan_exchange
from minillm.parallel.layout import share
from minillm.parallel.mesh import DeviceMesh
from minillm.parallel.shards import Shard
from minillm.parallel.tensor import TensorGroup
from minillm.parallel.wire import Wire
from minillm.policy.batch import Batch
from minillm.policy.experts import Placement
from minillm.policy.options import EngineOptions
from minillm.ranks.comm import Comm

Turns = Generator[None, None, torch.Tensor]  # work that pauses where its messages are under way


class ExpertGroup:
    """The ranks that share the experts of a stage's layers. `tensor` are those among them with the same tokens, if there are
    others; `placements` say who holds which experts of each layer that has some, of which the stage's `first` is so many-th.

    With `options.micro_batches` 2 a step's tokens are taken in two halves, and one half's messages are under way while the other is
    computed. That gains where something else than the computing core carries the messages, and reads every weight twice.
    """

    def __init__(
        self,
        comm: Comm,
        tensor: TensorGroup | None,
        placements: Sequence[Placement],
        first: int,
        experts: int,
        wire: Wire,
    ) -> None:
        self.comm, self.tensor, self.wire = comm, tensor, wire
        self.alike = tensor.comm.size if tensor else 1  # ranks with the same tokens
        self.placements, self.first = list(placements), first
        self.tally = Tally.zero(len(placements), experts, comm.size)
        self.options = EngineOptions()
        self.steps = 0
        self.price([], [])

    def price(self, first: list[Cost], last: list[Cost]) -> Sequence[Cost]:
        """What the parts of the next step cost, between messages, found as it goes; with parts that come `first` and, in what is
        left after the last message, `last`.
        """
        self.costs, self._spent, self._last = list(first), Cost(), last
        return self.costs

    def of_stage(self, placements: Sequence[Placement]) -> Sequence[Placement]:
        """Of placements of all layers that have experts, those of this stage."""
        return placements[self.first : self.first + len(self.placements)]

    def is_time(self) -> bool:
        """Whether the experts are to be placed anew before the next step, of which this one is told. All ranks count alike."""
        self.steps += 1
        every = self.options.rebalance_steps
        return every is not None and self.steps % every == 0

    def rows(self, tokens: Sequence[int]) -> list[int]:
        """How many rows each rank takes, when each replica has so many tokens."""
        return [len(share(count, self.alike, part)) for count in tokens for part in range(self.alike)]

    def through(
        self, model: Decoder, x: torch.Tensor, batch: Batch, cache: PagedCache, tokens: Sequence[int]
    ) -> torch.Tensor:
        """Through all layers, as `Decoder.through`; each replica has so many `tokens` in this step, and some may have none."""
        cut = self.options.micro_batches == 2 and max(tokens) > 1
        counts = [[count - count // 2, count // 2] if cut else [count] for count in tokens]
        mine = counts[self.comm.rank // self.alike]
        batches = batch.split(mine[0]) if cut else [batch]
        runs = [
            self._layers(model, part, each, cache, self.rows([count[half] for count in counts]))
            for half, (part, each) in enumerate(zip(x.split(mine), batches))
        ]
        x = torch.cat(take_turns(runs))
        self.spend(sum(self._last, Cost()), 1)
        return x

    def _layers(self, model: Decoder, x: torch.Tensor, batch: Batch, cache: PagedCache, rows: list[int]) -> Turns:
        """`x` through all layers, with `rows` of each rank in each."""
        step = model.step(batch, cache) if batch.chunks else None
        for layer in model.layers:
            if not isinstance(layer, Layer):
                continue
            if step is not None:
                x = x + self._attend(layer, model, x, step, cache, batch)
            if isinstance(layer.mlp, ExpertParallelMLP):
                x = x + (yield from layer.mlp.exchange(layer.post_attention_layernorm(x), rows))
            elif step is not None:
                self.spend(block_costs(model.config, batch, x.element_size())[2], self._sums(len(x)))
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            self.comm.board.tick()  # a long prompt is no fault
        return x

    def _attend(
        self, layer: Layer, model: Decoder, x: torch.Tensor, step: Step, cache: PagedCache, batch: Batch
    ) -> torch.Tensor:
        project, attention, _ = block_costs(model.config, batch, x.element_size())
        self.spend(project + attention, self._sums(len(x)))
        return layer.self_attn(layer.input_layernorm(x), step, cache)

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Of the rows that all ranks of a replica have, those that this one takes."""
        mine = share(len(x), self.alike, self.comm.rank % self.alike)
        return x[mine.start : mine.stop]

    def whole(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """Everybody's share of the rows [its own, hidden] -> [rows, hidden] on each rank of a replica."""
        if self.tensor is None or rows == 0:
            return x
        shares = [len(share(rows, self.alike, part)) for part in range(self.alike)]
        self._close()
        everyone = self.tensor.all_gather(F.pad(x, (0, 0, 0, shares[0] - len(x))))
        return torch.cat([each[:count] for each, count in zip(everyone, shares)])

    def gather(self, routing: Routing, rows: Sequence[int]) -> Routing:
        """Everybody's choices [ranks, most rows, top_k], when each rank has so many rows."""
        top_k, most = routing.experts.shape[1], max(rows)
        bits = routing.weights.float().contiguous().view(torch.int32)
        mine = F.pad(torch.cat((routing.experts.int(), bits), dim=1), (0, 0, 0, most - len(bits)))
        self._close()
        with self.wire.message("all_gather", mine.nbytes, self.comm):
            everyone = self.comm.all_gather(mine).view(self.comm.size, most, 2 * top_k)
        past = torch.arange(most) >= torch.tensor(rows)[:, None]
        experts = everyone[:, :, :top_k].long().masked_fill(past.to(mine.device)[:, :, None], NOBODY)
        weights = everyone[:, :, top_k:].contiguous().view(torch.float32)
        return Routing(experts, weights.to(routing.weights.dtype))

    def all_to_all(self, name: str, x: torch.Tensor, send_rows: list[int], recv_rows: list[int]) -> Turns:
        """Rows to every rank and from every rank. With micro-batches the other half is computed meanwhile."""
        self._close()
        leaving = x.nbytes - x[:1].nbytes * send_rows[self.comm.rank]  # what stays is no message
        if self.options.micro_batches == 1:
            with self.wire.message(name, leaving, self.comm):
                return self.comm.all_to_all(x, send_rows, recv_rows)
        transfer = self.comm.iall_to_all(x, send_rows, recv_rows)
        sequence = self.comm.collectives - 1
        self.wire.begun(leaving)
        yield
        return self.wire.finish(name, transfer, self.comm, sequence, leaving)

    def spend(self, cost: Cost, sums: int = 0) -> None:
        """Count what is computed before the next message, or before so many sums over the ranks that share the layers."""
        self._spent += cost
        if sums:
            self.costs += self._spent.split(sums)
            self._spent = Cost()

    def _sums(self, rows: int) -> int:
        return self.tensor.parts(rows) if self.tensor else 0

    def _close(self) -> None:
        """A message comes."""
        self.spend(Cost(), 1)


class ExpertParallelMLP(SparseMLP):
    """A mixture of experts of which only `held` are here; its router, and a shared expert, are on every rank."""

    def __init__(self, plain: SparseMLP, place: int, held: Iterable[int], group: ExpertGroup) -> None:
        nn.Module.__init__(self)
        self.gate, self.shared_expert, self.shared_expert_gate = (
            plain.gate,
            plain.shared_expert,
            plain.shared_expert_gate,
        )
        self.experts = Experts(plain.experts.count, {str(expert): plain.experts[str(expert)] for expert in held})
        self.place, self.group = place, group  # which one it is of the stage's layers with experts

    def exchange(self, x: torch.Tensor, rows: list[int]) -> Turns:
        """[tokens of the replica, hidden] -> the same; the ranks take `rows` of theirs each."""
        group, placement = self.group, self.group.placements[self.place]
        mine = group.share(x)
        group.spend(product_cost(len(mine), x.shape[1], placement.experts, x.element_size()))
        everyone = group.gather(self.gate(mine), rows)
        goes_to = destinations(everyone.experts, placement)
        group.tally.add(self.place, everyone.experts, goes_to)
        plan = plan_exchange(everyone, goes_to, group.comm.rank)
        came = yield from group.all_to_all("dispatch", mine[plan.rows], plan.send_rows, plan.recv_rows)
        said = self.experts(came, plan.routing)
        group.spend(self._cost(plan.routing.experts, came))
        back = yield from group.all_to_all("combine", said, plan.recv_rows, plan.send_rows)
        total = torch.zeros_like(mine).index_add_(0, plan.rows, back)
        return group.whole(self.add_shared(mine, total), len(x))

    def _cost(self, experts: torch.Tensor, x: torch.Tensor) -> Cost:
        """Of the experts that were asked here, with as many pairs as there were."""
        here = experts[experts != NOBODY]
        return chosen_cost(len(here), len(here.unique()), x.shape[1], self.gate.moe.intermediate_size, x.element_size())


def take_turns(runs: Sequence[Turns]) -> list[torch.Tensor]:
    """Let each run go on until its messages are under way, then the next one; what they give, in order."""
    given: dict[int, torch.Tensor] = {}
    while len(given) < len(runs):
        for number, run in enumerate(runs):
            if number not in given:
                try:
                    next(run)
                except StopIteration as end:
                    given[number] = end.value
    return [given[number] for number in range(len(runs))]


def apply_expert_parallel(
    model: Decoder, mesh: DeviceMesh, shard: Shard, tensor: TensorGroup | None, wire: Wire
) -> ExpertGroup:
    """Leave a model, built and not loaded, only the experts that this rank holds."""
    moe = shard.config.moe
    assert moe is not None
    numbers = [number for number in shard.layers if shard.config.is_sparse(number)]
    placements = [shard.placement(number) for number in numbers]
    first = sum(number < shard.layers.start for number in moe.layers)
    group = ExpertGroup(mesh.comm("ep"), tensor, placements, first, moe.experts, wire)
    for place, number in enumerate(numbers):
        layer = model.layers[number]
        assert isinstance(layer, Layer) and isinstance(layer.mlp, SparseMLP)
        layer.mlp = ExpertParallelMLP(layer.mlp, place, shard.experts(number), group)
    return group
