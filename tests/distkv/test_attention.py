"""Partial attention and its merge against softmax attention: any split, any order, any shape."""

from __future__ import annotations

import torch
from helpers import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.distkv.attention import Partial, merge_all, partial_attention

CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, list[int]]:
    """Queries, keys, values, the first query's position, and which of several places has each key."""
    kv_heads, group, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 4, 16]))
    tokens, start = draw(st.integers(1, 9)), draw(st.integers(0, 40))
    dtype, scale = draw(st.sampled_from(list(CLOSE))), draw(st.sampled_from([0.1, 1.0, 10.0]))
    dice = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    q, k, v = (
        scale * torch.randn(rows, many, head_dim, generator=dice, dtype=dtype)
        for rows, many in ((tokens, kv_heads * group), (kv_heads, start + tokens), (kv_heads, start + tokens))
    )
    return q, k, v, start, draw(st.lists(st.integers(0, 6), min_size=start + tokens, max_size=start + tokens))


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    """The formula, written out for every query and head."""
    group = q.shape[1] // k.shape[0]
    return torch.stack([
        torch.stack([
            torch.softmax(q[token, head] @ k[head // group, : start + token + 1].T / q.shape[2] ** 0.5, -1)
            @ v[head // group, : start + token + 1]
            for head in range(q.shape[1])
        ])
        for token in range(len(q))
    ])  # fmt: skip


def parts_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, places: list[int]) -> list[Partial]:
    """What each of seven places says, some of which have no keys."""
    found = []
    for place in range(7):
        here = torch.tensor([key for key, at in enumerate(places) if at == place], dtype=torch.long)
        seen = here <= torch.arange(start, start + len(q))[:, None]
        found.append(partial_attention(q, k[:, here], v[:, here], seen))
    return found


@settings(deadline=None, max_examples=EXAMPLES)
@given(problems(), st.permutations(range(7)))
def test_any_split_in_any_order_is_softmax_attention(problem: tuple, order: list[int]) -> None:
    q, k, v, start, places = problem
    parts = parts_of(q, k, v, start, places)
    got = merge_all(parts[place] for place in order).finish()
    expected = softmax_attention(q.double(), k.double(), v.double(), start).to(q.dtype)
    torch.testing.assert_close(got, expected, atol=CLOSE[q.dtype] * float(v.abs().max()), rtol=0)


@settings(deadline=None, max_examples=EXAMPLES)
@given(problems(), st.permutations(range(7)))
def test_merging_is_associative_and_commutative(problem: tuple, order: list[int]) -> None:
    q, *_ = problem
    parts = parts_of(*problem)
    a, b, c = (parts[place] for place in order[:3])
    for one, other in ((a.merge(b), b.merge(a)), (a.merge(b).merge(c), a.merge(b.merge(c)))):
        assert torch.equal(one.m, other.m)
        torch.testing.assert_close(one.l, other.l, atol=CLOSE[q.dtype], rtol=CLOSE[q.dtype])
        torch.testing.assert_close(one.o, other.o, atol=CLOSE[q.dtype] * 10, rtol=CLOSE[q.dtype])
    assert torch.equal(a.merge(b).o, b.merge(a).o) and torch.equal(a.merge(b).l, b.merge(a).l)


@settings(deadline=None, max_examples=EXAMPLES)
@given(problems())
def test_no_keys_change_nothing(problem: tuple) -> None:
    q, *_ = problem
    for part in parts_of(*problem):
        for same in (part.merge(Partial.nothing(q)), Partial.nothing(q).merge(part), Partial.unpack(part.pack())):
            for name in ("o", "m", "l"):
                assert torch.equal(getattr(same, name), getattr(part, name))


def test_bfloat16_sums_in_float32() -> None:
    q, k, v = (torch.randn(*shape).bfloat16() for shape in ((5, 4, 16), (2, 300, 16), (2, 300, 16)))
    halves = [partial_attention(q, k[:, piece], v[:, piece]) for piece in (slice(0, 150), slice(150, 300))]
    assert halves[0].o.dtype == halves[0].l.dtype == torch.float32
    whole = partial_attention(q, k, v).finish()
    torch.testing.assert_close(merge_all(halves).finish(), whole, atol=1e-2, rtol=0)
