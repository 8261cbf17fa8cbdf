"""Draws four_ranks.png, the picture of README: four ranks answer four questions; the raw spans go to four_ranks.json."""

import json
from dataclasses import asdict
from pathlib import Path

from minillm import LLM, Ranks, SamplingParams, context
from minillm.hardware.machine import machine
from minillm.trace.trace import Trace
from minillm.viz.style import png
from minillm.viz.timeline import draw_timeline

QUESTIONS = [
    "What is the capital of France?",
    "What is the capital of Japan?",
    "Name the three primary colors.",
    "What is the chemical symbol for water?",
]


def answer(questions: list[str]) -> tuple[str, Trace]:
    """This rank's answer to its own question, and what it did meanwhile."""
    llm = LLM()
    output = llm.chat(questions[context().rank], SamplingParams(max_tokens=32))
    return output.text, llm.trace


def main() -> None:
    """Run and draw; everything on the picture comes from this run."""
    with Ranks(4, device="cpu") as ranks:
        answers = ranks.run(answer, QUESTIONS)
        where = ranks.describe()
    notes = [f"{question}   →   {' '.join(text.split())}" for question, (text, _) in zip(QUESTIONS, answers)]
    figure = draw_timeline(
        Trace.of_ranks([trace for _, trace in answers]),
        "Four processes, each with a language model of its own, answer at once",
        f"measured · {where} · SmolLM2-135M float32 · lesson 00",
        notes,
    )
    picture = Path(__file__).with_suffix(".png")
    picture.write_bytes(png(figure))
    spans = [
        {**asdict(span), "rank": rank, "kind": span.kind.value}
        for rank, (_, t) in enumerate(answers)
        for span in t.spans
    ]
    raw = {
        "command": "make images",
        **machine(),
        "answers": dict(zip(QUESTIONS, [a for a, _ in answers])),
        "spans": spans,
    }
    picture.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    main()
