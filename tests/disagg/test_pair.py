"""Process groups of two: one that waits keeps no other one waiting, and where nobody can meet that is known at once."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from minillm.disagg.pair import RECEIVER, SENDER, Pair
from minillm.ranks.backend import choose_backend

CPU = torch.device("cpu")


def pair(path: Path, place: int) -> Pair:
    return Pair(path, place, choose_backend(2, "cpu"), CPU)


def test_one_that_waits_keeps_no_other_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.disagg.pair.LIMIT", timedelta(seconds=2))
    lonely = threading.Thread(
        target=lambda: pytest.raises(RuntimeError, pair(tmp_path / "nobody", RECEIVER).recv, 3, torch.float32)
    )
    lonely.start()
    time.sleep(0.3)
    sender = threading.Thread(target=lambda: pair(tmp_path / "two", SENDER).send(torch.arange(3.0)))
    sender.start()
    assert pair(tmp_path / "two", RECEIVER).recv(3, torch.float32).tolist() == [0, 1, 2]
    assert lonely.is_alive()
    sender.join()
    lonely.join()


def test_a_folder_that_is_gone_is_no_place_to_meet(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(OSError, match="No such file"):
        pair(tmp_path / "gone" / "two", RECEIVER).recv(3, torch.float32)
    assert time.monotonic() < began + 5
