"""Several axes at once: replicas (dp) of pipelines (pp) of stages whose layers are shared (tp), as one mesh of ranks.

rank = (dp · PP + pp) · TP + tp: tp counts fastest, so that ranks which share layers, and talk most, are neighbours, on the
fastest link that there is; then come stages, which send one vector a token; replicas, which never talk, are farthest apart.
(Narayanan et al. 2021, section 3: tensor parallelism within a server, pipelines between servers.)
"""

from __future__ import annotations

from collections.abc import Sequence

from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.parallel.layout import Layout
from minillm.ranks.keeper import Card
from minillm.ranks.launch import Launch
from minillm.ranks.pool import Ranks
from minillm.trace.collectives import ring_share

NOUNS = {"dp": "replica", "pp": "stage", "cp": "context share", "tp": "slice"}


def factorisations(world_size: int) -> list[Layout]:
    """Every layout of so many ranks along dp, pp and tp: one for each way to write the number as a product of three."""
    divisors = [each for each in range(1, world_size + 1) if world_size % each == 0]
    return [
        Layout(dp=world_size // (pp * tp), pp=pp, tp=tp)
        for pp in divisors
        for tp in divisors
        if world_size % (pp * tp) == 0
    ]


def fitting(config: ModelConfig, world_size: int) -> list[Layout]:
    """Those of them that a model can be cut by."""
    found = []
    for layout in factorisations(world_size):
        try:
            layout.check(config)
        except ValueError:
            continue
        found.append(layout)
    return found


def place_text(layout: Layout, rank: int) -> str:
    """What a rank is in a layout: "replica 1, stage 0, slice 1"; axes of size 1 are left out."""
    here = layout.coordinates(rank)
    parts = [f"{noun} {here[axis]}" for axis, noun in NOUNS.items() if getattr(layout, axis) > 1]
    return ", ".join(parts) or "everything"


def lines(layout: Layout, axis: str) -> list[tuple[int, ...]]:
    """The groups of ranks that talk along an axis."""
    return sorted({layout.along(axis, rank) for rank in range(layout.world_size)})


def sent_bytes(config: ModelConfig, layout: Layout, dtype: str, tokens: int) -> dict[str, float]:
    """Bytes that the busiest rank sends along each axis while `tokens` go through the model together.

    Along tp 2 sums a layer of its stage, and the embedding's, by the ring; along pp one hidden state for each token; along dp
    nothing.
    """
    hidden = tokens * config.hidden_size * DTYPE_BYTES[dtype]
    sums = max(2 * len(layout.layers(config.layers, stage)) + (stage == 0) for stage in range(layout.pp))
    along_tp = sums * hidden * ring_share("all_reduce", layout.tp)
    return {"dp": 0.0, "pp": float(hidden) if layout.pp > 1 else 0.0, "tp": along_tp}


def fill(launch: Launch, layout: Layout, device: str | None = None) -> list[Ranks]:
    """The launched processes as ranks of each replica. Raises `ValueError` for a layout that does not take all of them."""
    size, count = layout.world_size, len(launch.cards)
    if size != count:
        raise ValueError(
            f"layout {str(layout)!r} takes {size} rank{'s' * (size > 1)}, but the launcher has started {count}: give a layout "
            f"of {count}, such as 'tp={count}' or 'dp={count}', or start {size}"
        )
    return launch.split(layout.instances, device)


def seating(layout: Layout, cards: Sequence[Card]) -> str:
    """Which rank sits where, and what it is in the layout; a line for each."""
    return "\n".join(
        f"rank {card.rank}: node {card.node} ({card.host}), local rank {card.local_rank}: {place_text(layout, card.rank)}"
        for card in cards
    )
