"""Every target rank gets all of its part of a KV cache, exactly once, from ranks that hold it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.disagg.routes import routes_between
from minillm.model.config import ModelConfig
from minillm.parallel.layout import Layout
from minillm.parallel.shards import Shard

CONFIG = ModelConfig("llama", 100, 24, 48, 6, 6, 3, 4, 512)  # 6 layers, 6 query heads on 3 KV heads
layouts = st.builds(Layout, pp=st.integers(1, 6), cp=st.integers(1, 3), tp=st.integers(1, 6))


@settings(max_examples=int(os.environ.get("MINILLM_EXAMPLES", 200)), deadline=None)
@given(st.data(), layouts, layouts, st.sampled_from([1, 2, 3, 6]), st.integers(1, 9))
def test_all_arrives_exactly_once(
    data: st.DataObject, source: Layout, target: Layout, kv_heads: int, blocks: int
) -> None:
    config = replace(CONFIG, kv_heads=kv_heads)
    tables = [data.draw(st.permutations(range(blocks * 2)))[:blocks] for _ in range(2)]
    came: Counter[tuple[int, int, int, int]] = Counter()  # target rank, layer, head, its own block
    for route in routes_between(config, source, target):
        sender = Shard(config, source, route.source)
        assert set(route.layers) <= set(sender.layers) and set(route.heads) <= set(sender.kv_heads)
        for mine, theirs in route.pairs(*tables):
            old = mine * source.cp + source.coordinates(route.source)["cp"]
            new = theirs * target.cp + target.coordinates(route.target)["cp"]
            assert tables[0].index(old) == tables[1].index(new)  # the same place of the sequence
            came.update((route.target, layer, head, new) for layer in route.layers for head in route.heads)
    wanted = Counter(
        (rank, layer, head, block)
        for rank in range(target.world_size)
        for layer in Shard(config, target, rank).layers
        for head in Shard(config, target, rank).kv_heads
        for block in tables[1]
        if block % target.cp == target.coordinates(rank)["cp"]
    )
    assert came == wanted


def test_slices_to_stages() -> None:
    routes = routes_between(CONFIG, Layout(tp=2), Layout(pp=2))
    assert [(r.source, r.target, list(r.layers), list(r.heads)) for r in routes] == [
        (0, 0, [0, 1, 2], [0, 1]), (1, 0, [0, 1, 2], [2]), (0, 1, [3, 4, 5], [0, 1]), (1, 1, [3, 4, 5], [2]),
    ]  # fmt: skip
    assert sum(route.bytes_of(5, 16, 4, 4) for route in routes) == 2 * 6 * 3 * 5 * 16 * 4 * 4


def test_ranks_that_hold_the_same_share_the_work() -> None:
    config = replace(CONFIG, kv_heads=1)
    assert [route.source for route in routes_between(config, Layout(tp=3), Layout(pp=6))] == [0, 1, 2, 0, 1, 2]
