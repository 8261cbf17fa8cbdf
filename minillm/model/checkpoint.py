"""Finding a checkpoint's folder and the tensors in it: local, on the hub, or the embedded model.

Only safetensors are read. A pickle can run code when it is opened, so it is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minillm.model.config_json import read_json
from minillm.model.embedded import embedded_folder
from minillm.model.tiny_moe import tiny_moe_folder
from minillm.model.upcycle import upcycled_folder

WITH_THE_COURSE: dict[str, Callable[[], Path]] = {"tiny-moe": tiny_moe_folder, "smollm2-moe": upcycled_folder}
_ALIASES = "aliases.json"
_INDEX = "model.safetensors.index.json"
_WANTED = ["*.json", "*.safetensors", "*.jinja"]


def find_checkpoint(name: str | Path | None) -> Path:
    """The folder of a checkpoint: a path, a hub name "owner/model", or None for the embedded model. Two more come with the course:
    "tiny-moe" (`tiny_moe/`), and "smollm2-moe", the embedded model with 4 experts a layer (`upcycle.py`).

    Raises `ValueError` when there is no such folder, or the hub cannot be reached.
    """
    if name is None:
        return embedded_folder()
    if not isinstance(name, (str, Path)) or not str(name):
        raise ValueError(
            f"checkpoint={name!r}: give a folder, a hub name such as owner/model, or None for the embedded model"
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if str(name) in WITH_THE_COURSE:
        return WITH_THE_COURSE[str(name)]()
    if path.exists():
        raise ValueError(f"{path} is a file: give the folder that holds config.json and the safetensors")
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise ValueError(
            f"there is no folder {path}: give an existing folder, a hub name such as owner/model, or one of "
            f"{', '.join(WITH_THE_COURSE)}"
        )
    return _download(str(name))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except Exception as error:  # the hub's own errors, and those of every layer of the network below it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"could not get {name} from the hub: {reason}") from None


def fingerprint(folder: Path) -> str:
    """A short text that differs for different checkpoints: of config.json, and of every tensor's name, shape, dtype and first
    bytes.
    """
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
            digest.update(header)
            for name, entry in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    file.seek(8 + length + entry["data_offsets"][0])
                    digest.update(file.read(min(64, entry["data_offsets"][1] - entry["data_offsets"][0])))
    return digest.hexdigest()


class Tensors:
    """The tensors of a checkpoint's folder by name, in one file or in shards with an index; slices are read alone.

    A folder with `aliases.json` has tensors of another checkpoint's file too, under names of its own.
    `bytes_read` counts what was asked for. Raises `ValueError` for a folder without safetensors, a missing shard, and
    a truncated file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._files: dict[str, Any] = {}
        self._file_of = self._find()
        self._stored: dict[str, str] = {}  # names in the file, where they are others
        if (folder / _ALIASES).exists():
            aliases = read_json(folder / _ALIASES)
            self._stored = dict(aliases["names"])
            self._file_of |= dict.fromkeys(self._stored, aliases["file"])

    @property
    def names(self) -> set[str]:
        """All tensors of the checkpoint."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, part: tuple[slice, ...] = ()) -> Any:
        """A tensor, or the part of it that `part` cuts out; only that part's bytes are read."""
        values = self._slice(name)[part or slice(None)]
        self.bytes_read += values.nbytes
        return values

    def _find(self) -> dict[str, str]:
        if (self.folder / _INDEX).exists():
            file_of = dict(read_json(self.folder / _INDEX).get("weight_map") or {})
            missing = sorted({file for file in file_of.values() if not (self.folder / file).exists()})
            if missing:
                raise ValueError(
                    f"{self.folder} lacks {', '.join(missing)}, which its index names; download the checkpoint again"
                )
            return file_of
        single = self.folder / "model.safetensors"
        files = [single] if single.exists() else sorted(self.folder.glob("*.safetensors"))
        if files:
            return {name: file.name for file in files for name in self._open(file.name).keys()}  # noqa: SIM118
        pickles = sorted(
            file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for file in self.folder.glob(pattern)
        )
        if pickles:
            raise ValueError(
                f"{self.folder} holds pickled weights ({pickles[0]}), which can run code when read; convert it to safetensors"
            )
        raise ValueError(f"{self.folder} holds no *.safetensors file: give the folder of a Hugging Face checkpoint")

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{self.folder / file} is truncated or damaged ({error}); download the checkpoint again"
                ) from None
        return self._files[file]

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ValueError(f"{self.folder} has no tensor {name}, which its config.json calls for")
        try:
            return self._open(self._file_of[name]).get_slice(self._stored.get(name, name))
        except SafetensorError as error:
            raise ValueError(f"{self.folder / self._file_of[name]} does not hold {name} ({error})") from None
