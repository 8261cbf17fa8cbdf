"""`SplitLayout`: how many instances read prompts and how many decode, and the layout of each kind."""

from __future__ import annotations

import re
from dataclasses import dataclass

from minillm.model.config import ModelConfig
from minillm.parallel.layout import Layout
from minillm.policy.handing import Role

FORM = "write 'prefill=1xtp=2,decode=2xpp=2': how many instances of each, and the layout of one"


@dataclass(frozen=True)
class SplitLayout:
    """`prefills` instances with one layout, `decodes` with another. Raises `ValueError` for replicas within an instance."""

    prefills: int
    prefill: Layout
    decodes: int
    decode: Layout

    def __post_init__(self) -> None:
        for role, count, layout in (("prefill", self.prefills, self.prefill), ("decode", self.decodes, self.decode)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"layout: there must be at least one {role} instance; {FORM}")
            if layout.dp > 1:
                raise ValueError(
                    f"layout: dp={layout.dp} inside a {role} instance; type {role}={count * layout.dp}x… for more of them"
                )

    @classmethod
    def parse(cls, text: str) -> SplitLayout:
        """Read "prefill=1xtp=2,decode=2xpp=2"; an instance of one rank is "1xtp=1". Raises `ValueError` that says what is allowed."""
        found = re.fullmatch(r"\s*prefill\s*=\s*(\d+)\s*x(.*?),\s*decode\s*=\s*(\d+)\s*x(.*)", text)
        if not found:
            missing = [role for role in ("prefill", "decode") if role not in text]
            what = f"there is no {missing[0]} instance" if missing else "it is not understood"
            raise ValueError(f"layout {text!r}: {what}; {FORM}")
        return cls(int(found[1]), Layout.parse(found[2]), int(found[3]), Layout.parse(found[4]))

    def __str__(self) -> str:
        return (
            f"prefill={self.prefills}x{str(self.prefill) or 'tp=1'},decode={self.decodes}x{str(self.decode) or 'tp=1'}"
        )

    @property
    def roles(self) -> list[Role]:
        """Of the instances, in order."""
        return [Role.PREFILL] * self.prefills + [Role.DECODE] * self.decodes

    @property
    def each(self) -> list[Layout]:
        """The layouts of the instances, in order."""
        return [self.prefill] * self.prefills + [self.decode] * self.decodes

    @property
    def world_size(self) -> int:
        """How many ranks it takes."""
        return sum(layout.world_size for layout in self.each)

    @property
    def instances(self) -> int:
        """How many copies of the weights there are."""
        return len(self.each)

    @property
    def routed(self) -> int:
        """Among how many a request's first place is chosen."""
        return self.instances

    def check(self, config: ModelConfig) -> None:
        """Raise `ValueError` when the model cannot be cut so."""
        self.prefill.check(config)
        self.decode.check(config)


def parse_layout(text: str | Layout | SplitLayout) -> Layout | SplitLayout:
    """Read a layout of either form."""
    if isinstance(text, SplitLayout) or not isinstance(text, str):
        return text if isinstance(text, SplitLayout) else Layout.parse(text)
    return SplitLayout.parse(text) if "prefill" in text or "decode" in text else Layout.parse(text)
