"""Step times fitted to what an engine does."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_checkpoint

from minillm import LLM
from minillm.calibrate import Measure, _fitted, calibrate


def test_coefficients_are_found_again_and_none_is_below_0() -> None:
    exact = [Measure((1.0, n, n * n), 5e-3 + 2e-4 * n + 3e-7 * n * n) for n in (10, 50, 100, 400)]
    found, error = _fitted(exact)
    assert found == pytest.approx((5e-3, 2e-4, 3e-7)) and error < 1e-9
    falling = [Measure((1.0, n), 1.0 - 1e-3 * n) for n in (10, 50, 100)]
    found, error = _fitted(falling)
    assert found[1] == 0.0 and 0 < error < 0.1


@pytest.mark.parametrize("layout", ["", "prefill=1xtp=1,decode=1xtp=1"])
def test_an_engine_is_measured(tmp_path: Path, layout: str) -> None:
    with LLM(make_checkpoint(tmp_path, max_position_embeddings=512), layout, device="cpu") as llm:
        found = calibrate(llm)
        assert llm.engine.load.used_blocks == 0 and not llm.engine.has_work
    assert min(*found.fit.prompt, *found.fit.small) >= 0 and max(found.fit.prompt) > 0 and max(found.fit.small) > 0
    assert (found.transfer is not None) == bool(layout)
    assert ("a cache moves" in found.as_text()) == bool(layout) and found.as_dict()["decode_ms"] == found.fit.small
