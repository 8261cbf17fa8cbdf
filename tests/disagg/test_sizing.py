"""What moves and what is seen of it, by formula; how many instances should do which."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.disagg.sizing import Demand, Rates, cache_bytes, decode_s, prefill_s, rates_of, seen_s
from minillm.hardware.devices import Link, find_device
from minillm.model.shapes import SHAPES

H100, LLAMA = find_device("H100"), SHAPES["Llama-3.1-8B"]


def wire(gbits: float) -> Link:
    return Link("", gbits * 1e9 / 8, 0.0, "")


def test_papers_arithmetic() -> None:
    """DistServe, section 3.3: 512 tokens of OPT-66B are 1.13 GB (GiB) in float16."""
    opt = SHAPES["Llama-2-7B"].__class__("llama", 50272, 9216, 36864, 64, 72, 72, 128, 2048)
    assert cache_bytes(opt, "float16", 512) / 2**30 == pytest.approx(1.125)


@given(st.floats(0.1, 1000), st.integers(1, 9000))
def test_what_leaves_early_is_seen_less(gbits: float, tokens: int) -> None:
    whole, chunk, layer = (
        seen_s(LLAMA, H100, wire(gbits), "bfloat16", tokens, way) for way in ("whole", "chunk", "layer")
    )
    total = cache_bytes(LLAMA, "bfloat16", tokens) / wire(gbits).bytes_per_s
    read = prefill_s(LLAMA, H100, "bfloat16", tokens)
    assert whole == pytest.approx(total)
    assert max(total / LLAMA.layers, total - read) * (1 - 1e-9) <= layer <= whole * (1 + 1e-9)
    assert layer == pytest.approx(max(total / LLAMA.layers, total - read * (1 - 1 / LLAMA.layers)))
    assert chunk <= whole * (1 + 1e-9)


@given(st.floats(0.1, 100), st.floats(0.1, 100), st.integers(2, 12))
def test_the_best_ratio_is_the_best(prefill: float, decode: float, instances: int) -> None:
    rates = Rates(prefill, decode, 1 / (1 / prefill + 1 / decode), 1)
    best = rates.split(rates.best(instances), instances - rates.best(instances))
    assert all(rates.split(n, instances - n) <= best for n in range(1, instances))
    assert best <= instances * rates.both * (1 + 1e-9), "splitting adds no throughput"


def test_the_batch_keeps_to_the_goal() -> None:
    rates = rates_of(LLAMA, H100, "bfloat16", Demand(2048, 256, 0.03))
    assert decode_s(LLAMA, H100, "bfloat16", rates.batch, 2304) <= 0.03
    mixed = (
        decode_s(LLAMA, H100, "bfloat16", rates.both_batch, 2304)
        + prefill_s(LLAMA, H100, "bfloat16", 2048) * rates.both_batch / 256
    )
    assert mixed <= 0.03 and rates.both == pytest.approx(rates.both_batch / (256 * mixed))
    with pytest.raises(ValueError, match="more than the goal"):
        rates_of(LLAMA, H100, "bfloat16", Demand(2048, 256, 0.001))
    with pytest.raises(ValueError, match="do not fit"):
        rates_of(LLAMA, H100, "bfloat16", Demand(2_000_000, 256, 1.0))
    with pytest.raises(ValueError, match="give one of whole, chunk, layer"):
        seen_s(LLAMA, H100, wire(1), "bfloat16", 10, "fast")
