"""The engine's source in lessons: by symbol, with lines and a link; wrong names are refused."""

from __future__ import annotations

import inspect

import pytest

from minillm.engine.engine import Engine
from minillm.lesson.source import find_symbol, show_source


def test_shown_as_it_is() -> None:
    source = show_source("engine.engine.Engine.step")
    lines, first = inspect.getsourcelines(Engine.step)
    assert repr(source).startswith(f"minillm/engine/engine.py, line {first}\n")
    assert [line[6:].strip() for line in repr(source).splitlines()[1:]] == [line.strip() for line in lines]
    assert 'href="../minillm/engine/engine.py"' in source._repr_html_()
    assert find_symbol("minillm.model.cost.pass_cost").__name__ == "pass_cost"


def test_a_property_has_source_and_a_constant_has_none() -> None:
    assert "def intensity" in show_source("model.cost.Cost.intensity").text
    for symbol in ("model.shapes.SHAPES", "trace.life.Event.TOKEN", "engine.engine.time"):
        with pytest.raises(ValueError, match="has no source of its own here") as caught:
            show_source(symbol)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("symbol", ["engine.engine.Engine.nothing", "nothing", "", "engine..x"])
def test_no_such_symbol(symbol: str) -> None:
    with pytest.raises(ValueError, match="there is no .* in minillm: write module.name"):
        show_source(symbol)
