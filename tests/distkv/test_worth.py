"""What borrowing is worth, beside numbers worked out by hand."""

from __future__ import annotations

import pytest

from minillm.distkv.worth import worth_of
from minillm.hardware.devices import DEVICES, LINKS, Device, Link
from minillm.model.shapes import SHAPES

LLAMA, H100 = SHAPES["Llama-3.1-8B"], DEVICES["H100"]


def test_a_step_is_that_of_the_formula() -> None:
    """8 k tokens, 8 KV heads of 128 in 32 layers: 2 · 8 · 128 · 32 · 8,192 · 2 bytes a request, 56 GB of room."""
    each = 2 * 8 * 128 * 32 * 8192 * 2
    room = 0.9 * 80e9 - 2 * LLAMA.parameters
    found = worth_of(LLAMA, H100, LINKS["10 Gbit/s"], "bfloat16", 8192, 0.5)
    assert (found.alone, found.together) == (int(room // each), int(1.5 * room // each))
    far = found.together - found.alone
    wire = 32 * (2 * 30e-6 + far * (32 * 128 * 2 + 32 * 130 * 4) / 1.25e9)
    keys = far * each / 3.35e12
    products = 2 * LLAMA.parameters / 3.35e12
    assert found.together_s == pytest.approx(wire + keys + products, rel=0.1)
    assert found.alone_s == pytest.approx(found.alone * each / 3.35e12 + products, rel=0.1)


def test_slower_links_and_less_idle_memory_are_worth_less() -> None:
    names = sorted(LINKS, key=lambda name: (-LINKS[name].bytes_per_s, LINKS[name].latency_s))
    for first, second in zip(names, names[1:]):
        if LINKS[first].latency_s <= LINKS[second].latency_s:
            a, b = (worth_of(LLAMA, H100, LINKS[name], "bfloat16", 4096, 0.9).gain for name in (first, second))
            assert a >= b
    free = Link("no delay", 1e15, 0.0, "")
    gains = [worth_of(LLAMA, H100, free, "bfloat16", 8192, idle).gain for idle in (0.0, 0.2, 0.5, 0.9)]
    assert gains[0] == 1.0 and gains == sorted(gains)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="1,000,000 tokens do not fit H100 beside the weights"):
        worth_of(LLAMA, H100, LINKS["NVLink 4"], "bfloat16", 1_000_000, 0.9)
    with pytest.raises(ValueError, match="they do not fit"):
        worth_of(LLAMA, Device("small", {"bfloat16": 1e12}, 1e11, 8e9, ""), LINKS["NVLink 4"], "bfloat16", 10, 0.9)
