"""`Layout`: how many ranks along each axis, what number a rank has, and whether a model fits.

rank = ((dp · PP + pp) · CP + cp) · TP + tp. The file knows no tensors and no processes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from minillm.model.config import ModelConfig

AXES = {
    "dp": "data parallel replicas",
    "pp": "pipeline stages",
    "cp": "context parallel ranks",
    "tp": "tensor parallel ranks",
    "ep": "expert parallel ranks",
}


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis: data (dp), pipeline (pp), context (cp), tensor (tp); experts (ep) lie over dp · tp.

    `stages` says how many layers each pipeline stage has; left out, they are as even as can be. Raises `ValueError` for a
    size below 1, a stage without layers, and an ep that is neither 1 nor dp · tp.
    """

    dp: int = 1
    pp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for axis, meaning in AXES.items():
            size = getattr(self, axis)
            if not _is_size(size):
                raise ValueError(f"layout: {axis}={size!r}; give a whole number of {meaning} from 1")
        if self.stages and len(self.stages) != self.pp:
            raise ValueError(f"layout: pp={self.pp} stages, but stages={self.stages!r} are {len(self.stages)}")
        for stage, layers in enumerate(self.stages):
            if not _is_size(layers):
                raise ValueError(f"layout: stage {stage} has {layers!r} layers; give every stage at least one")
        if self.cp > 1 and self.ep > 1:
            raise ValueError(f"layout: cp={self.cp} with ep={self.ep} is not built; leave one of them out")
        if self.ep not in (1, self.dp * self.tp):
            raise ValueError(
                f"layout: ep={self.ep} must be 1 or dp·tp = {self.dp * self.tp}; experts lie over the dp·tp ranks of a stage: "
                f"type dp={self.ep},ep={self.ep} or tp={self.ep},ep={self.ep}, or leave ep out"
            )

    @classmethod
    def parse(cls, text: str | Layout) -> Layout:
        """Read "tp=2,pp=2" or, with the layers of each stage, "pp=9+9+12"; the empty text is one device.

        Raises `ValueError` that says what is allowed.
        """
        if isinstance(text, Layout):
            return text
        if not isinstance(text, str):
            raise ValueError(f"layout={text!r}: give a text such as 'tp=2,pp=2', or '' for one device")
        sizes: dict[str, int] = {}
        stages: tuple[int, ...] = ()
        for part in filter(None, (part.strip() for part in text.split(","))):
            found = re.fullmatch(r"(\w+)\s*=\s*(\d+)|pp\s*=\s*(\d+(?:\s*\+\s*\d+)+)", part)
            axis = (found[1] or "pp") if found else ""
            if not found or axis not in AXES:
                raise ValueError(
                    f"layout {text!r}: {part!r} is not understood; write axes of {', '.join(AXES)} such as 'tp=2,pp=2', or "
                    f"the layers of each stage, 'pp=9+9+12'"
                )
            if axis in sizes:
                raise ValueError(f"layout {text!r}: {axis} stands twice")
            if found[3]:
                stages = tuple(int(layers) for layers in found[3].split("+"))
            sizes[axis] = len(stages) if found[3] else int(found[2])
        return cls(**sizes, stages=stages)

    def __str__(self) -> str:
        """The text form, without the axes of size 1."""
        sizes = {axis: str(getattr(self, axis)) for axis in AXES}
        if self.stages:
            sizes["pp"] = "+".join(map(str, self.stages))
        return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size != "1" and getattr(self, axis) > 1)

    @property
    def world_size(self) -> int:
        """How many ranks the layout takes."""
        return self.dp * self.pp * self.cp * self.tp

    @property
    def instances(self) -> int:
        """How many copies of the weights there are, each a fault domain of its own. Replicas that share experts are one."""
        return 1 if self.ep > 1 else self.dp

    @property
    def routed(self) -> int:
        """Among how many replicas a request's place is chosen."""
        return self.dp

    @property
    def leaders(self) -> tuple[int, ...]:
        """The first rank of every replica, which has its scheduler."""
        return tuple(range(0, self.world_size, self.world_size // self.dp))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands on the mesh, by axis. Raises `ValueError` for a rank outside it."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside this layout of {self.world_size} ranks")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        dp, pp = divmod(rest, self.pp)
        return {"dp": dp, "pp": pp, "cp": cp, "tp": tp}

    def expert_rank(self, rank: int) -> int:
        """Which one of the ranks that share a stage's experts it is: dp · TP + tp."""
        here = self.coordinates(rank)
        return here["dp"] * self.tp + here["tp"]

    def along(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` in their place on this axis alone, itself among them, in order. Along "ep" they are
        all that share a stage's experts: they differ in dp and tp; along "stage" all that share a stage of a replica: in cp and tp.
        """
        moving = {"ep": ("dp", "tp"), "stage": ("cp", "tp")}.get(axis, (axis,))
        fixed = {other: place for other, place in self.coordinates(rank).items() if other not in moving}
        return tuple(other for other in range(self.world_size) if fixed.items() <= self.coordinates(other).items())

    def layers(self, total: int, stage: int) -> range:
        """The decoder layers of a pipeline stage, of `total` layers."""
        if not self.stages:
            return share(total, self.pp, stage)
        begin = sum(self.stages[:stage])
        return range(begin, begin + self.stages[stage])

    def check(self, config: ModelConfig) -> None:
        """Raise `ValueError` when the model cannot be cut so, naming the number that does not fit and the nearest that do."""
        if self.pp > config.layers:
            self._refuse("pp", f"{config.layers} layers", config.layers)
        if self.stages and sum(self.stages) != config.layers:
            raise ValueError(
                f"layout {str(self)!r}: its stages have {sum(self.stages)} layers, but the model has {config.layers}; the "
                f"nearest that fits is {str(replace(self, stages=self._stretched(config.layers)))!r}"
            )
        if self.tp > config.heads:
            self._refuse("tp", f"{config.heads} query heads", config.heads)
        moe, columns = config.moe, config.intermediate_size
        if self.ep == 1 and moe is not None:
            columns = min(columns, moe.intermediate_size, moe.shared_size or columns)
        if self.tp > columns:
            self._refuse("tp", f"{columns} MLP columns", columns)
        if self.ep > 1 and moe is None:
            raise ValueError(
                f"layout {str(self)!r}: ep={self.ep} needs a mixture of experts; this {config.family} model is dense"
            )
        if moe is not None and self.ep > moe.experts:
            nearest = replace(self, dp=max(1, moe.experts // self.tp), ep=max(1, moe.experts // self.tp) * self.tp)
            if nearest.ep > moe.experts:
                nearest = replace(self, dp=1, tp=moe.experts, ep=moe.experts)
            raise ValueError(
                f"layout {str(self)!r}: ep={self.ep} ranks are more than the {moe.experts} experts of a layer; the nearest that "
                f"fits is {str(nearest)!r}"
            )

    def _stretched(self, layers: int) -> tuple[int, ...]:
        """The stages with `layers` layers in all: the last take what is missing or too much."""
        stages, rest = list(self.stages), layers - sum(self.stages)
        for stage in reversed(range(self.pp)):
            taken = max(rest, 1 - stages[stage])
            stages[stage], rest = stages[stage] + taken, rest - taken
        return tuple(stages)

    def _refuse(self, axis: str, what: str, most: int) -> None:
        nearest = str(replace(self, ep=1, stages=(), **{axis: most}))
        raise ValueError(
            f"layout {str(self)!r}: {axis}={getattr(self, axis)} does not fit {what}; the nearest that fits is {nearest!r}"
        )


def share(total: int, parts: int, index: int) -> range:
    """The `index`-th of `parts` consecutive shares of `total` things; the first shares take the remainder."""
    base, rest = divmod(total, parts)
    begin = index * base + min(index, rest)
    return range(begin, begin + base + (index < rest))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
