"""The pipe as an engine's runner, on the first rank of a replica: works go in, tokens come out in order.

Replicas that share experts go in step: before each step their first ranks tell each other how many tokens they have, and those
that have none go along with empty works, since the others' tokens need their experts.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import torch

from minillm.engine.runner import Work
from minillm.parallel.pipeline import Stage
from minillm.ranks.transfers import Transfer
from minillm.trace.recorder import Recorder
from minillm.trace.trace import Category

GLANCE_S = 0.002


class PipelineRunner:
    """The pipe as the engine sees it, from rank 0: `start` computes the first stage, `finish` waits for the tokens.

    `depth` batches may be under way.
    """

    def __init__(self, stage: Stage, num_blocks: int, depth: int) -> None:
        self.stage, self.num_blocks, self.depth = stage, num_blocks, depth
        self.spread = stage.pipe.spread
        self.steps = 0  # of all replicas that share experts
        self._under_way: deque[tuple[Work, Transfer | torch.Tensor]] = deque()

    @property
    def recorder(self) -> Recorder:
        """Has what happens on this rank."""
        return self.stage.recorder

    def agree(self, work: Work) -> Work | None:
        """The work, or None for one with nothing in it. Where replicas share experts they step together: as long as one of them has
        something, the others go along with empty works.
        """
        pipe, tokens = self.stage.pipe, sum(len(chunk.token_ids) for chunk in work.batch.chunks)
        if pipe.leaders is None:
            return work if tokens or work.batch.moves else None
        everyone = pipe.leaders.all_gather(torch.tensor([tokens])).tolist()
        if not any(everyone):
            return None
        self.steps += 1
        return replace(work, step=self.steps, tokens=tuple(everyone))

    def any(self, *each: bool) -> list[bool]:
        """Whether these hold here or, where replicas share experts, at any of them."""
        if self.stage.pipe.leaders is None:
            return list(each)
        everyone = self.stage.pipe.leaders.all_gather(torch.tensor([each]))  # [replicas, …]
        return everyone.any(0).tolist()

    @property
    def patience_s(self) -> float:
        """How long it may wait for something else: others that share its experts may be busy meanwhile."""
        alone = self.stage.pipe.leaders is None or self.stage.pipe.leaders.size == 1
        return math.inf if alone else GLANCE_S

    def start(self, work: Work) -> None:
        """Hand the work down the pipe, and compute the first stage of it."""
        stage = self.stage
        stage.pass_note(work)
        if stage.pipe.last == 0:
            self._under_way.append((work, stage.compute(work, None)))
            return
        self._under_way.append((work, stage.expect_tokens(work)))
        stage.pass_on(work, stage.compute(work, None))

    def finish(self) -> list[list[int]]:
        """The tokens of the oldest work under way."""
        work, out = self._under_way.popleft()
        if isinstance(out, Transfer):
            out = self.stage.receive(out, "tokens", work.step)
        step, *tokens = out.tolist()
        assert step == work.step
        each = iter(tokens)
        return [[next(each) for _ in draws or (None,)] for draws in work.draws]

    def end(self) -> None:
        """Send everyone home: there are no more batches."""
        self.stage.pass_note(None)
        self.stage.settle()

    def note_cache(self, used_blocks: tuple[int, ...]) -> None:
        """The blocks in use, in bytes on this rank."""
        self.recorder.memory(Category.KV_CACHE, used_blocks[0] * self.stage.cache.block_bytes)

    def record(self, recorder: Recorder) -> None:
        """Let `recorder` have what happens on this rank from now on."""
        self.stage.record(recorder)
