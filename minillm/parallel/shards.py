"""Who holds which slice: the one map from (tensor, layout, rank) to a part of the checkpoint.

Loading, the prediction of memory and the transfer of KV all ask it. It reads no tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from minillm.model.config import ModelConfig, MoEConfig
from minillm.parallel.layout import Layout, share
from minillm.policy.experts import Placement, even


@dataclass(frozen=True)
class Shard:
    """One rank's part of a model: which layers, which heads, which columns, which experts. `placements` say who holds which
    experts of each layer that has some, in order; even shares by default.
    """

    config: ModelConfig
    layout: Layout
    rank: int
    placements: tuple[Placement, ...] = ()

    @cached_property
    def layers(self) -> range:
        """The decoder layers of this rank's pipeline stage."""
        return self.layout.layers(self.config.layers, self._at("pp"))

    @cached_property
    def first_stage(self) -> bool:
        """Whether it holds the embedding."""
        return self._at("pp") == 0

    @cached_property
    def last_stage(self) -> bool:
        """Whether it holds the final norm and the LM head."""
        return self._at("pp") == self.layout.pp - 1

    @cached_property
    def extent(self) -> tuple[int, int, int, int, int, bool, bool]:
        """How much it is, whatever part it is: layers, query heads, KV heads, columns, words, and whether it is at an end."""
        counts = (len(self.layers), len(self.heads), len(self.kv_heads), len(self.columns), len(self.vocabulary))
        return (*counts, self.first_stage, self.last_stage)

    def weight_bytes(self, element_bytes: int) -> int:
        """What its weights take, by formula. Tied embeddings are on the first stage and on the last."""
        total = 0
        for name, shape in replace(self.config, layers=0).tensors.items():
            total += self._numbers(shape, self.cut(name, shape))
        sparse = [layer for layer in self.layers if self.config.is_sparse(layer)]
        dense = [layer for layer in self.layers if layer not in sparse]
        for layers in (dense, sparse):  # alike, but for who holds which experts
            for name, shape in self.config.layer_tensors(layers is sparse).items() if layers else ():
                holding = [layer for layer in layers if self._has(f"layers.{layer}.{name}")]
                total += len(holding) * self._numbers(shape, self._cut_layer(name, shape))
        return element_bytes * total

    @staticmethod
    def _numbers(shape: tuple[int, ...], part: tuple[slice, ...] | None) -> int:
        return 0 if part is None else _size(shape, part)

    def experts(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer that this rank holds: all of them, at least a slice, unless they are shared out."""
        moe = self.config.moe
        assert moe is not None
        if self.layout.ep == 1:
            return tuple(range(moe.experts))
        return self.placement(layer).held(self.layout.expert_rank(self.rank))

    def placement(self, layer: int) -> Placement:
        """Who holds which experts of a layer, of those that share its stage."""
        moe = self.config.moe
        assert moe is not None
        return self.placements[moe.layers.index(layer)] if self.placements else even(moe.experts, self.layout.ep)

    @cached_property
    def kv_heads(self) -> range:
        """KV heads: whole groups go to ranks while tp ≤ kv_heads; above that each rank serves one group."""
        if self.layout.tp <= self.config.kv_heads:
            return share(self.config.kv_heads, self.layout.tp, self._at("tp"))
        group, _, _ = self._place_in_group()
        return range(group, group + 1)

    @cached_property
    def heads(self) -> range:
        """Query heads: those of the rank's KV heads, or its share of one group."""
        size = self.config.group_size
        if self.layout.tp <= self.config.kv_heads:
            return range(self.kv_heads.start * size, self.kv_heads.stop * size)
        group, place, ranks = self._place_in_group()
        part = share(size, ranks, place)
        return range(group * size + part.start, group * size + part.stop)

    @cached_property
    def columns(self) -> range:
        """Of the MLP's intermediate numbers."""
        return self.share(self.config.intermediate_size)

    @property
    def moe(self) -> MoEConfig | None:
        """The mixture of experts as it is in this stage: its own layers, and slices of the experts where they are cut."""
        moe = self.config.of_layers(self.layers).moe
        if moe is None or self.layout.ep > 1:
            return moe
        return replace(
            moe,
            intermediate_size=len(self.share(moe.intermediate_size)),
            shared_size=len(self.share(moe.shared_size)) if moe.shared_size else 0,
        )

    def share(self, total: int) -> range:
        """This rank's share of so many things that are cut by tp."""
        return share(total, self.layout.tp, self._at("tp"))

    @cached_property
    def vocabulary(self) -> range:
        """Of the words, in the embedding and in the LM head."""
        return self.share(self.config.vocab_size)

    def cut(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
        """The part of a tensor (its name without "model.") that this rank holds; None when it holds none of it."""
        if name.startswith("layers."):
            return self._cut_layer(name, shape) if self._has(name) else None
        if name == "norm.weight":
            return () if self.last_stage else None
        first = name == "embed_tokens.weight" and self.first_stage
        last = self.last_stage and (name == "lm_head.weight" or self.config.tied_embeddings)
        return (_slice(self.vocabulary),) if first or last else None

    def _has(self, name: str) -> bool:
        """Whether something of a layer's tensor is here."""
        _, layer, *path = name.split(".")
        if int(layer) not in self.layers:
            return False
        return "experts" not in path or int(path[path.index("experts") + 1]) in self.experts(int(layer))

    def _cut_layer(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        module, leaf = name.split(".")[-2:]
        if "expert" in name and self.layout.ep > 1:
            return ()  # an expert is whole; so is the shared one, which every rank has for its own tokens
        if module in ("q_proj", "k_proj", "v_proj"):
            return (_slice(self.heads if module == "q_proj" else self.kv_heads, self.config.head_dim),)
        if module == "o_proj" and leaf == "weight":
            return (slice(None), _slice(self.heads, self.config.head_dim))
        if module in ("gate_proj", "up_proj"):
            return (_slice(self.share(shape[0])),)
        if module == "down_proj":
            return (slice(None), _slice(self.share(shape[1])))
        return ()  # norms, routers, and the output bias, which every rank holds whole

    def _place_in_group(self) -> tuple[int, int, int]:
        """(KV group, place among the ranks that serve it, how many serve it), for tp > kv_heads."""
        for group in range(self.config.kv_heads):
            ranks = share(self.layout.tp, self.config.kv_heads, group)
            if self._at("tp") in ranks:
                return group, self._at("tp") - ranks.start, len(ranks)
        raise AssertionError("every rank serves a group")

    def _at(self, axis: str) -> int:
        return self.layout.coordinates(self.rank)[axis]


def _slice(part: range, width: int = 1) -> slice:
    return slice(part.start * width, part.stop * width)


def _size(shape: tuple[int, ...], part: tuple[slice, ...]) -> int:
    """How many numbers a part of a tensor has."""
    slices = [*part, *[slice(None)] * (len(shape) - len(part))]
    return math.prod(len(range(size)[each]) for size, each in zip(shape, slices))
