"""What one forward pass works on: the new tokens of some sequences, side by side without padding. Host-side only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate


@dataclass(frozen=True)
class Away:
    """Blocks of a sequence that lie at another instance, its `creditor`, in order."""

    creditor: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """Full blocks of a sequence that change places before a pass: `blocks` here go to `away` or, with `home`, come back."""

    blocks: tuple[int, ...]
    away: Away
    home: bool = False


@dataclass(frozen=True)
class Chunk:
    """The new tokens of one sequence: `start` tokens of it are in the KV cache already, in the blocks of `block_table`.

    `samples` says whether the chunk reaches the sequence's end, so that its last token gives the next one. The sequence's first
    blocks may be `away`; the block table has -1 for them. Where other instances go on with a prompt, `reading` is the
    number of the time that it is read, else 0.
    """

    request_id: int
    start: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    samples: bool = True
    away: tuple[Away, ...] = ()
    reading: int = 0

    def __post_init__(self) -> None:
        assert self.token_ids, "a chunk has at least one token"

    @property
    def end(self) -> int:
        """The length of the sequence once this chunk is in the cache."""
        return self.start + len(self.token_ids)

    @property
    def is_prefill(self) -> bool:
        """Whether it reads a prompt, or a part of one; a single token that follows others is a decode."""
        return self.start == 0 or len(self.token_ids) > 1


@dataclass(frozen=True)
class Batch:
    """Chunks of different sequences, prefill and decode mixed as they come.

    `copies` are blocks (from, to) to copy before the pass, after `moves` to and from other instances; `preempted` are requests that
    lost their blocks for it, `arrivals` those whose K and V may come now from another instance, and `gone` the
    readings of prompts for other instances that are here no more. Before anything else it is `over` with these instances: what they had here has been taken back.
    """

    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...] = ()
    preempted: tuple[int, ...] = ()
    moves: tuple[Move, ...] = ()
    over: tuple[int, ...] = ()
    arrivals: tuple[int, ...] = ()
    gone: tuple[int, ...] = ()

    def split(self, tokens: int) -> tuple[Batch, Batch]:
        """The first so many tokens, and the rest; a chunk that is cut is two, of which the second follows the first."""
        first, rest = [], []
        for chunk in self.chunks:
            size = len(chunk.token_ids)
            if 0 < tokens < size:
                first.append(replace(chunk, token_ids=chunk.token_ids[:tokens], samples=False))
                rest.append(replace(chunk, start=chunk.start + tokens, token_ids=chunk.token_ids[tokens:]))
            else:
                (first if tokens > 0 else rest).append(chunk)
            tokens -= size
        return Batch(tuple(first)), Batch(tuple(rest))

    @property
    def token_ids(self) -> list[int]:
        """All new tokens, chunk after chunk."""
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def positions(self) -> list[int]:
        """Each token's position in its sequence."""
        return [position for chunk in self.chunks for position in range(chunk.start, chunk.end)]

    @property
    def ends(self) -> list[int]:
        """Where each chunk ends among the batch's tokens."""
        return list(accumulate(len(chunk.token_ids) for chunk in self.chunks))

    @property
    def sampling_rows(self) -> list[int]:
        """The rows whose logits give a next token: the last one of each chunk that samples."""
        return [end - 1 for chunk, end in zip(self.chunks, self.ends) if chunk.samples]
