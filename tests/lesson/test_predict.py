"""The guess: kept on disk when fixed, shown on the still form, refused input."""

from __future__ import annotations

from pathlib import Path

import pytest

from minillm.lesson.predict import FILE, Predict, collected_guesses, keep_guess
from minillm.viz.style import new_figure


def data(widget: Predict) -> dict[str, str]:
    bundle = widget._repr_mimebundle_()
    return bundle[0] if isinstance(bundle, tuple) else bundle


def test_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drawn: list[float | None] = []
    ask = Predict("01.ratio", "How many times?", "×", 1, 1000)
    before = data(ask)
    assert before["text/plain"] == "Predict()"
    assert ask.reveal(12.5, "because", lambda guess: drawn.append(guess) or new_figure(1.0)[0]) is ask
    assert data(ask)["image/png"] != before["image/png"]
    assert not (tmp_path / FILE).exists()  # nothing is kept until a guess is fixed
    ask.guess = 40.0
    assert ask.value is None
    ask.locked = True
    assert ask.value == 40.0
    assert drawn[-1] == 40.0  # the picture is drawn again, with the guess
    assert collected_guesses()["01.ratio"] == {
        "question": "How many times?",
        "unit": "×",
        "choices": [],
        "guess": 40.0,
        "truth": 12.5,
    }


def test_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ask = Predict("01.bound", "What limits it?", choices=("computing", "memory"))
    ask.guess, ask.locked = 0, True
    assert collected_guesses()["01.bound"]["truth"] is None
    ask.reveal(1)
    assert collected_guesses()["01.bound"]["truth"] == 1
    assert "image/png" in data(ask)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Predict("n", "?", low=0, high=1), "two numbers above 0"),
        (lambda: Predict("n", "?", low=9, high=1), "the lower first"),
        (lambda: Predict("n", "?", choices=("one",)), "two to six"),
        (lambda: Predict("n", "?").reveal(0), "number above 0"),
        (lambda: Predict("n", "?").reveal(float("nan")), "number above 0"),
        (lambda: Predict("n", "?", choices=("a", "b")).reveal(2), "not one of 0 … 1"),
    ],
)
def test_what_cannot_be(make, text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_damaged_or_closed_file_loses_nothing_else(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{half")
    assert collected_guesses(tmp_path) == {}
    keep_guess("a", {"guess": 1}, tmp_path)
    keep_guess("b", {"guess": 2}, tmp_path)
    assert list(collected_guesses(tmp_path)) == ["a", "b"]
    keep_guess("c", {"guess": 3}, tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
