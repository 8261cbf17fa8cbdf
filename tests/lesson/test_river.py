"""The token river and the map of choices: what they draw is what was chosen, and what cannot be drawn is refused."""

from __future__ import annotations

import pytest
import torch

from minillm.policy.experts import Placement, even
from minillm.viz.choices import draw_choices
from minillm.viz.river import MOST, draw_river
from minillm.viz.style import png

CHOSEN = [[0, 1], [0, 2], [0, 3], [0, 1], [1, 0]]
WORDS = ["But", " soft", "\n", ",", "what"]


def texts(placement: Placement, most: int = 0) -> list[str]:
    figure = draw_river(WORDS, CHOSEN, placement, "finding", "caption", most)
    assert png(figure)[:4] == b"\x89PNG"
    return [text.get_text() for text in figure.axes[0].texts]


def test_bars_say_how_many_products_each_rank_has() -> None:
    drawn = texts(even(4, 2))
    assert {
        "8",
        "2",
        "rank 0: 0, 1",
        "rank 1: 2, 3",
        "But",
        "soft",
        "\\n",
        "the layer ends",
        "if all had as much",
    } <= set(drawn)


def test_a_balanced_layer_needs_no_line_for_the_mean() -> None:
    drawn = texts(Placement(((0, 2, 3), (0, 1)), 4), most=8)
    assert drawn.count("5") == 2 and "if all had as much" not in drawn


def test_ribbons_are_as_many_as_messages() -> None:
    """Two experts of one rank are one ribbon."""
    figure = draw_river(WORDS, CHOSEN, even(4, 2), "finding", "caption")
    ribbons = [patch for patch in figure.axes[0].patches if type(patch).__name__ == "PathPatch"]
    assert len(ribbons) == 5 + 2


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 32"):
        draw_river(["a"] * (MOST + 1), [[0]] * (MOST + 1), even(4, 2), "finding", "caption")
    with pytest.raises(ValueError, match="1 words and the choices of 2 tokens"):
        draw_river(["a"], [[0], [1]], even(4, 2), "finding", "caption")


def test_the_map_says_how_many_times_an_even_share_each_expert_has() -> None:
    figure = draw_choices(torch.tensor([[30, 10, 0, 0], [0, 0, 0, 0]]), "finding", "caption")
    assert [text.get_text() for text in figure.axes[0].texts] == ["3.0", "1.0", "0.0", "0.0", *["0.0"] * 4]
    assert png(draw_choices(torch.ones(30, 64), "finding", "caption"))[:4] == b"\x89PNG"
