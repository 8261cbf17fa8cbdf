"""The sending end of a transfer: what it sends and when, through memory that is shared or through the link."""

from __future__ import annotations

import json
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch

from minillm.disagg.room import SLOT_BYTES, SLOTS, Room
from minillm.disagg.sender import Sender, Wanted
from minillm.kv.paged import PagedCache
from minillm.model.config import ModelConfig
from minillm.policy.batch import Batch, Chunk

CONFIG = ModelConfig("llama", 10, 16, 16, 3, 2, 2, 8, 64)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("layerwise", [True, False])
def test_parts_leave_when_they_are_computed(tmp_path: Path, shared: bool, layerwise: bool) -> None:
    cache = PagedCache(CONFIG, 8, 4, torch.device("cpu"), torch.float32)
    cache.keys.normal_()
    cache.values.normal_()
    sender, (here, there) = Sender(cache, layerwise, None), Pipe()
    room = Room(tmp_path / "room", make=True) if shared else None
    if room is not None:
        sender.share(here, tmp_path / "room")
        assert not (tmp_path / "room").exists(), "nothing is left of it"
    sender.begin(Batch((Chunk(0, 0, (1, 2, 3, 4, 5, 6), (5, 2), reading=1),)))
    sender.want(here, Wanted(1, 0, 1, (0, 3), (1, 2), [0, 1], (0, 1)))
    sender.layer_done(0)
    assert there.poll(2.0 if layerwise else 0.1) is layerwise
    for layer in (1, 2):
        sender.layer_done(layer)
    sender.settle()
    got = 0
    while got < 3:
        head = json.loads(there.recv_bytes())
        begin, end = head["layers"]
        assert head["places"] == [0, 1]
        if room is not None:
            came = room.view(head["slot"], (2, end - begin, 2, 1, 4, 8), torch.float32).clone()
            sender.rooms[here].give(head["slot"])
        else:
            came = torch.frombuffer(bytearray(there.recv_bytes()), dtype=torch.float32).view(2, end - begin, 2, 1, 4, 8)
        assert torch.equal(came[0], cache.keys[begin:end][:, [5, 2], 1:2])
        assert torch.equal(came[1], cache.values[begin:end][:, [5, 2], 1:2])
        got += end - begin
    sender.forget(here)
    assert not there.poll(0.1) and not sender.rooms


def test_a_room_has_so_many_slots_of_such_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(tmp_path / "room", make=True)
    with pytest.raises(ValueError, match="has no room for"):
        room.view(0, (SLOT_BYTES // 4 + 1,), torch.float32)
    with pytest.raises(ValueError, match="slot 2 has no room"):
        room.view(SLOTS, (1,), torch.float32)
    assert {room.take() for _ in range(SLOTS)} == set(range(SLOTS))
    room.give(1)
    assert room.take() == 1
    room.close()
    with pytest.raises(OSError, match="nobody reads"):
        room.take()
    monkeypatch.setattr("minillm.disagg.room.SLOT_BYTES", 1 << 60)
    with pytest.raises(OSError):
        Room(tmp_path / "large", make=True)
    assert not (tmp_path / "large").exists(), "no room, and nothing left of the attempt"
    with pytest.raises(FileExistsError):
        Room(tmp_path / "room", make=True)
    with pytest.raises(FileNotFoundError):
        Room(tmp_path / "other", make=False)
