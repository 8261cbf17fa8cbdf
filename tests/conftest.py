"""Shared fixtures: ranks stay warm over a whole run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from law import started  # noqa: E402

from minillm import LLM, Ranks  # noqa: E402

settings.register_profile("minillm", deadline=None)  # machines are busy; figures of speed are in bench/
settings.load_profile("minillm")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell keeps it from what runs in the background


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


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[LLM]:
    """The checkpoint of the module's `folder` on one device."""
    with LLM(folder, device="cpu") as llm:
        yield llm


@pytest.fixture(scope="module")
def several(folder: Path) -> Iterator[dict[str, LLM]]:
    """The same on every layout that is asked for, started then."""
    with started(folder) as llms:
        yield llms
