"""Shared fixtures: ranks stay warm over a whole run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from minillm import Ranks  # noqa: E402

settings.register_profile("minillm", deadline=None)  # machines are busy; figures of speed are in bench/
settings.load_profile("minillm")


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
