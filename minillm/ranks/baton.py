"""A baton: of the processes on this machine that share it, one computes at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class Baton:
    """`with baton:` holds it. It is a lock on a file, which the system takes back from a process that dies."""

    def __init__(self, path: Path | str) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def __enter__(self) -> Baton:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return self

    def __exit__(self, *error: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)
