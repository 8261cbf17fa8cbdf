"""Shared fixtures: ranks stay warm over a whole run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from minillm import Ranks  # noqa: E402


@pytest.fixture(scope="session")
def ranks4() -> Iterator[Ranks]:
    """Four warm ranks with a short patience; a failed call restarts them."""
    with Ranks(4, device="cpu", timeout_s=1) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def ranks2() -> Iterator[Ranks]:
    """Two warm ranks."""
    with Ranks(2, device="cpu", timeout_s=1) as ranks:
        yield ranks
