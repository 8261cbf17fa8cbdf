"""What every interactive picture is made of: a script that runs in the browser, and a still PNG for readers without a kernel."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import anywidget

from minillm.viz.style import ACTIVATIONS, CULPRIT, FAINT, GUESS, INK, KV_CACHE, WEIGHTS
from minillm.viz.words import CATEGORY_COLOURS, KIND_COLOURS

_SCRIPTS = Path(__file__).parent / "js"
_LOOK = {
    "ink": INK, "faint": FAINT, "guess": GUESS, "culprit": CULPRIT, "weights": WEIGHTS, "kv": KV_CACHE, "activations": ACTIVATIONS,
    "kinds": {kind.value: colour for kind, colour in KIND_COLOURS.items()},
    "categories": {category.value: colour for category, colour in CATEGORY_COLOURS.items()},
}  # fmt: skip


def script(*names: str) -> str:
    """The browser's program: the course's colours, what all pictures share, and the picture's own files."""
    parts = [
        f"const LOOK = {json.dumps(_LOOK)};",
        *((_SCRIPTS / f"{each}.js").read_text(encoding="utf-8") for each in ("common", *names)),
    ]
    return "\n".join(parts)


class InteractivePicture(anywidget.AnyWidget):
    """A widget that also stores a PNG and a constant text, so that notebooks show it without a kernel and compare equal."""

    def png(self) -> bytes:
        """The still form."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        data: Any = bundle[0] if isinstance(bundle, tuple) else bundle
        data["text/plain"] = repr(self)
        data["image/png"] = b64encode(self.png()).decode()
        return bundle
