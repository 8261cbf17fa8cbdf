"""Draws borrowing.png: what instances gain by borrowing, over how unevenly they are loaded, from bench/results/distkv.json."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from minillm.viz.style import INK, KV_CACHE, frame, new_figure, png

RESULTS = Path(__file__).parent.parent / "bench" / "results" / "distkv.json"


def draw(found: dict[str, dict[str, float]], caption: str) -> Figure:
    """The mean gain and its standard deviation at each setting."""
    figure, (axis,) = new_figure(3.3)
    spreads = [float(name.split()[-1]) for name in found]
    gains = [each["gain"] for each in found.values()]
    axis.errorbar(
        spreads, gains, [each["deviation"] for each in found.values()], color=KV_CACHE, marker="o", linewidth=2.2, capsize=4
    )  # fmt: skip
    for spread, gain in zip(spreads, gains):
        axis.annotate(f"{gain:.2f} ×", (spread, gain), xytext=(10, -14), textcoords="offset points", color=INK)
    axis.axhline(1.0, color=INK, linewidth=1.0, linestyle=":")
    axis.set(xlabel="coefficient of variation of the answers' lengths", ylabel="tokens/s, over those without")
    axis.set(xlim=(-0.05, max(spreads) + 0.12), ylim=(0.8, 1.1 * max(gains)))
    return frame(figure, "The more the two kinds of answers differ in length, the more borrowing is worth", caption)


def main() -> None:
    """Everything on the picture comes from the benchmark's file."""
    raw = json.loads(RESULTS.read_text())
    caption = (
        "measured · SmolLM2-135M float32, two instances of 7 blocks · 16 requests, long answers for one and short ones for the other · "
        f"mean and standard deviation of 4 loads · two cores of {raw['processor']}, torch {raw['torch'].split('+')[0]}"
    )
    Path(__file__).with_suffix(".png").write_bytes(png(draw(raw["kinds"], caption)))


if __name__ == "__main__":
    main()
