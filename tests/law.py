"""The law that every layout is held to: whatever the company and the memory, a request's tokens are those of one device."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import SWITCHES, gone
from hypothesis import strategies as st

from minillm import LLM, EngineOptions, Layout, RankError, Ranks, SamplingParams
from minillm.model.config_json import read_config
from minillm.parallel.shards import Shard
from minillm.trace.life import Event

OPTIONS = st.builds(
    EngineOptions,
    block_size=st.sampled_from([1, 3, 16]),
    num_blocks=st.sampled_from([None, 64]),
    max_running=st.integers(1, 6),
    max_step_tokens=st.integers(6, 20),
    in_flight=st.none() | st.integers(1, 7),
    **SWITCHES,
)
PROMPTS = st.lists(st.integers(0, 255), min_size=1, max_size=30)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    seed=st.just(3),
    n=st.sampled_from([1, 1, 2]),
    ignore_eos=st.just(True),
)
WORK = st.lists(
    st.tuples(PROMPTS, PARAMS, st.integers(0, 3), st.sampled_from([False, False, False, True])), min_size=1, max_size=6
)  # and how many pieces are taken of each before the next one comes, and whether it is dropped then


@contextmanager
def started(folder: Path) -> Iterator[dict[str, LLM]]:
    """An `LLM` of each layout, started when it is first asked for."""

    class Started(dict[str, LLM]):
        def __missing__(self, layout: str) -> LLM:
            self[layout] = LLM(folder, layout=layout, device="cpu")
            return self[layout]

    llms = Started()
    try:
        yield llms
    finally:
        for llm in llms.values():
            llm.close()


class Made:
    """One device, and layouts on ranks that all models of the same number of ranks share; each made when asked for."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders, self.ranks = folders, {}
        self.ones, self.several = {}, {}

    def one(self, family: str) -> LLM:
        if family not in self.ones:
            self.ones[family] = LLM(self.folders[family], device="cpu")
        return self.ones[family]

    def on(self, family: str, layout: str) -> LLM:
        if (family, layout) not in self.several:
            size = Layout.parse(layout).world_size
            ranks = self.ranks.setdefault(size, Ranks(size, device="cpu", timeout_s=5))
            self.several[family, layout] = LLM(self.folders[family], layout=layout, device="cpu", ranks=ranks)
        return self.several[family, layout]

    def close(self) -> None:
        for ranks in self.ranks.values():
            ranks.close()


def check_weights(llm: LLM, folder: Path) -> list[int]:
    """That every rank has read and holds what the layout predicts, to the byte; which is returned."""
    config = read_config(folder)
    predicted = [Shard(config, llm.layout, rank).weight_bytes(4) for rank in range(llm.layout.world_size)]
    assert [loaded.weight_bytes for loaded in llm.instance.loaded] == predicted
    assert [loaded.bytes_read for loaded in llm.instance.loaded] == predicted
    return predicted


@cache
def alone(llm: LLM, prompt: tuple[int, ...], params: SamplingParams) -> list[list[int]]:
    """Its samples by itself, on one device."""
    return [sample.token_ids for sample in llm.generate([list(prompt)], params)[0].samples]


def is_tie(llm: LLM, prompt: list[int], expected: list[int], got: list[int]) -> bool:
    """Whether they part where the first two are within 1e-4, which the law excuses."""
    place = next(n for n, (a, b) in enumerate(zip(expected, got)) if a != b)
    first, second = llm.score([*prompt, *expected[:place]])[-1].topk(2).values.tolist()
    return first - second < 1e-4


def check_law(one: LLM, several: LLM, options: EngineOptions, work: list[Any]) -> None:
    """Streams that join while others run, some of them dropped; tight memory, so that there are preemptions."""
    if options.num_blocks is not None:
        need = max(-(-(len(prompt) + params.max_tokens) // options.block_size) for prompt, params, _, _ in work)
        options = EngineOptions(**{**vars(options), "num_blocks": 2 * need + 2})
    crowd = several.with_options(options)
    streams, got = [], {}
    try:
        for number, (prompt, params, pulls, _) in enumerate(work):
            if params.n > min(options.max_running, 2):
                continue
            streams.append((number, crowd.stream([prompt], params)))
            got[number] = [[] for _ in range(params.n)]
            for _ in range(pulls):
                for known, stream in streams:
                    piece = next(stream, None)
                    if piece is not None:
                        got[known][piece.sample].append(piece.token_id)
        for number, stream in streams:
            if work[number][3]:
                stream.close()
            for piece in stream:
                got[number][piece.sample].append(piece.token_id)
        for number, samples in got.items():
            prompt, params, _, dropped = work[number]
            expected = alone(one, tuple(prompt), params)
            if dropped:
                expected = [tokens[: len(mine)] for tokens, mine in zip(expected, samples)]
            for mine, wanted in zip(samples, expected, strict=True):
                assert mine == wanted or is_tie(one, prompt, wanted, mine)
        assert crowd.engine.load.used_blocks == 0
    finally:
        crowd.close()


def check_fault(one: LLM, folder: Path, layout: str, how: signal.Signals) -> None:
    """A rank of three is killed or stopped under load: the stream that steps says which, the others that it was lost; no process
    is left, and the next request runs on new ones.
    """
    long = SamplingParams(max_tokens=60, ignore_eos=True)
    with Ranks(3, device="cpu", timeout_s=1) as ranks, LLM(folder, layout=layout, device="cpu", ranks=ranks) as llm:
        streams = [llm.stream([[number, 2]], SamplingParams(max_tokens=400, ignore_eos=True)) for number in range(3)]
        for stream in streams:
            next(stream)
        pids = ranks.pids
        os.kill(pids[1], how)
        with pytest.raises(RankError, match="rank 1"):
            list(streams[0])
        for stream in streams[1:]:
            with pytest.raises(RuntimeError, match="the ranks that served this request were lost"):
                list(stream)
        assert [life.moments[-1][0] for life in llm.trace.lives] == [Event.FAILED] * 3
        assert gone(pids)
        assert llm.generate([[5, 6]], long)[0].token_ids == one.generate([[5, 6]], long)[0].token_ids
        assert llm.engine.load.used_blocks == 0
        assert "dp" not in layout or not llm.engine.router.under_way
