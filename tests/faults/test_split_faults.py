"""Prefill and decode instances that are killed or stand still at random moments: no request is lost, and nothing leaks."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_checkpoint

from minillm import LLM, EngineOptions, Ranks, SamplingParams
from minillm.disagg.layout import SplitLayout
from minillm.policy.admission import GATES
from minillm.policy.options import DISPATCHES, TRANSFERS, WIRES

SEEDS = 60 if "MINILLM_FAULT_SEEDS" in os.environ else 8  # all of them in `make soak`
LAYOUTS = ["prefill=1xtp=1,decode=1xtp=1", "prefill=1xtp=2,decode=1xpp=2", "prefill=2xtp=1,decode=2xtp=1", "prefill=1xtp=1,decode=1xcp=2", "prefill=1xpp=2,decode=1xtp=1"]  # fmt: skip
PROMPTS = [[(7 * n + 13 * i) % 250 for i in range(5 + 17 * n)] for n in range(6)]
SMALL = EngineOptions(num_blocks=24, max_running=8, max_step_tokens=32)
WITHIN_S = 15.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("faults"), max_position_embeddings=1024)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whoever_is_lost_at_any_moment_costs_no_token(one: LLM, folder: Path, seed: int) -> None:
    dice = random.Random(seed)
    layout = SplitLayout.parse(dice.choice(LAYOUTS))
    params = SamplingParams(max_tokens=dice.randint(2, 40), ignore_eos=True)
    gbits = dice.choice([None, 0.01])  # slow: transfers are cut in the middle
    options = replace(SMALL, kv_transfer=dice.choice(TRANSFERS), kv_wire=dice.choice(WIRES), link_gbits=gbits)
    options = replace(options, dispatch=dice.choice(DISPATCHES), gate=dice.choice(list(GATES)))
    expected = [each.token_ids for each in one.generate(PROMPTS, params)]
    pools = [Ranks(each.world_size, device="cpu", timeout_s=2) for each in layout.each]
    try:
        with LLM(folder, layout, device="cpu", options=options, ranks=pools) as llm, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            requests = llm.prepare(PROMPTS, params)
            llm.submit(requests)
            for _ in range(dice.randint(0, 40)):
                llm.step()
            pid = dice.choice(dice.choice(llm.instances).ranks.pids)
            os.kill(pid, signal.SIGSTOP if dice.random() < 0.3 else signal.SIGKILL)
            began = time.monotonic()
            try:
                while llm.engine.requests:
                    llm.step()
                    assert time.monotonic() < began + WITHIN_S, "requests do not end"
            finally:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            assert [request.output().token_ids for request in requests] == expected
            while llm.engine.router.lost:
                llm.engine.step()
                assert time.monotonic() < began + 2 * WITHIN_S, "the instance does not come back"
            assert [each.token_ids for each in llm.generate(PROMPTS, params)] == expected
            assert llm.engine.load.used_blocks == llm.engine.load.running == llm.engine.load.waiting == 0
            assert not llm.engine.dispatcher.ways
    finally:
        for pool in pools:
            pool.close()
