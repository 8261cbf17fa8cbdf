"""An all-to-all over shared memory: each rank writes all of its rows, and takes out of everybody's those that are for it."""

from __future__ import annotations

from itertools import accumulate
from math import prod

import torch

from minillm.ranks.shared import SLOT_BYTES, SharedMemory


def all_to_all(
    memory: SharedMemory, result: torch.Tensor, tensor: torch.Tensor, send_rows: list[int], recv_rows: list[int]
) -> None:
    """Contiguous [sum(send_rows), …] of each rank, in the order of those that get them, into [sum(recv_rows), …] of each.

    Raises `ValueError` where a rank sends another number of rows than this one takes.
    """
    rank, row_bytes = memory.rank, tensor.element_size() * prod(tensor.shape[1:])
    call = memory.call(f"all_to_all of rows of {row_bytes} bytes", tensor[:0])
    sent = memory.exchange(torch.tensor(send_rows), call).tolist()  # [from, to]
    for source, rows in enumerate(sent):
        if rows[rank] != recv_rows[source]:
            raise ValueError(
                f"all_to_all: rank {source} of the group sends {rows[rank]} rows to rank {rank}, "
                f"which waits for {recv_rows[source]}"
            )
    data, into = tensor.view(-1).view(torch.uint8), result.view(-1).view(torch.uint8)
    firsts = [sum(rows[:rank]) * row_bytes for rows in sent]  # where mine begin in everybody's
    lasts = [sum(rows[: rank + 1]) * row_bytes for rows in sent]
    places = list(accumulate((rows[rank] * row_bytes for rows in sent), initial=0))
    for begin in range(0, max(map(sum, sent)) * row_bytes, SLOT_BYTES):
        memory.exchange(data[begin : begin + SLOT_BYTES], call)
        for source, slot in enumerate(memory.slots[memory.number % 2]):
            low, high = max(firsts[source], begin), min(lasts[source], begin + SLOT_BYTES)
            if low < high:
                place = places[source] - firsts[source]
                into[place + low : place + high] = slot[low - begin : high - begin]
