"""`Layout`: how many ranks along each axis, what number a rank has, and whether a model fits.

rank = ((dp · PP + pp) · CP + cp) · TP + tp. The file knows no tensors and no processes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

from minillm.model.config import ModelConfig

_NAMES = {
    "dp": "data parallel replicas",
    "pp": "pipeline stages",
    "cp": "context parallel ranks",
    "tp": "tensor parallel ranks",
    "ep": "expert parallel ranks",
}


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis: data (dp), pipeline (pp), context (cp), tensor (tp); experts (ep) lie over dp · tp.

    Raises `ValueError` for a size below 1, and for an ep that is neither 1 nor dp · tp.
    """

    dp: int = 1
    pp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for axis in fields(self):
            size = getattr(self, axis.name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"layout: {axis.name}={size!r}; give a whole number of {_NAMES[axis.name]} from 1")
        if self.ep not in (1, self.dp * self.tp):
            raise ValueError(
                f"layout: ep={self.ep} must be 1 or dp·tp = {self.dp * self.tp}; type ep={self.dp * self.tp} or leave it out"
            )

    @classmethod
    def parse(cls, text: str | Layout) -> Layout:
        """Read "tp=2,pp=2"; the empty text is one device. Raises `ValueError` that says what is allowed."""
        if isinstance(text, Layout):
            return text
        if not isinstance(text, str):
            raise ValueError(f"layout={text!r}: give a text such as 'tp=2,pp=2', or '' for one device")
        sizes: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            found = re.fullmatch(r"(\w+)\s*=\s*(\d+)", part)
            if not found or found[1] not in _NAMES:
                raise ValueError(
                    f"layout {text!r}: {part!r} is not understood; write axes of {', '.join(_NAMES)} such as 'tp=2,pp=2'"
                )
            if found[1] in sizes:
                raise ValueError(f"layout {text!r}: {found[1]} stands twice")
            sizes[found[1]] = int(found[2])
        return cls(**sizes)

    def __str__(self) -> str:
        """The text form, without the axes of size 1."""
        return ",".join(
            f"{axis.name}={getattr(self, axis.name)}" for axis in fields(self) if getattr(self, axis.name) > 1
        )

    @property
    def world_size(self) -> int:
        """How many ranks the layout takes."""
        return self.dp * self.pp * self.cp * self.tp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands on the mesh, by axis. Raises `ValueError` for a rank outside it."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside this layout of {self.world_size} ranks")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        dp, pp = divmod(rest, self.pp)
        return {"dp": dp, "pp": pp, "cp": cp, "tp": tp}

    def check(self, config: ModelConfig) -> None:
        """Raise `ValueError` when the model cannot be cut so, naming the number that does not fit and the nearest that do."""
        if self.pp > config.layers:
            self._refuse("pp", f"{config.layers} layers", config.layers)
        if self.tp > config.heads:
            self._refuse("tp", f"{config.heads} query heads", config.heads)
        if self.tp > config.intermediate_size:
            self._refuse("tp", f"{config.intermediate_size} MLP columns", config.intermediate_size)
        if self.ep > 1:
            raise ValueError(
                f"layout {str(self)!r}: ep={self.ep} needs a mixture of experts; this {config.family} model is dense"
            )

    def _refuse(self, axis: str, what: str, most: int) -> None:
        nearest = str(replace(self, ep=1, **{axis: most}))
        raise ValueError(
            f"layout {str(self)!r}: {axis}={getattr(self, axis)} does not fit {what}; the nearest that fits is {nearest!r}"
        )
