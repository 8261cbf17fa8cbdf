"""Exercises of lesson 04: even stages, the fullest stage, and the cuts that make it as small as can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minillm.lesson.exercise import Case, Exercise, Outcome, RuleError
from minillm.parallel.balance import balance


def even_stages_spec(case: Case) -> list[int]:
    """Dealt one by one, in turns."""
    layers, stages = case.inputs
    sizes = [0] * stages
    for layer in range(layers):
        sizes[layer % stages] += 1
    return sizes


def drive_even_stages(function: Callable[..., Any], case: Case) -> Outcome:
    """The stages one by one. Raises `RuleError` for a list of another length."""
    sizes = function(*case.inputs)
    if not isinstance(sizes, (list, tuple)) or len(sizes) != case.inputs[1]:
        raise RuleError(f"return a list with a number for each of the {case.inputs[1]} stages")
    return Outcome(list(sizes))


def fullest_spec(case: Case) -> list[int]:
    """Stage by stage."""
    sizes, layer, embedding, head = case.inputs
    held = [size * layer for size in sizes]
    held[0] += embedding
    held[-1] += head
    return [max(held)]


def heaviest(sizes: Sequence[int], layers: Sequence[int], first: int, last: int) -> int:
    """What the heaviest stage weighs."""
    held, begin = [], 0
    for size in sizes:
        held.append(sum(layers[begin : begin + size]))
        begin += size
    held[0] += first
    held[-1] += last
    return max(held)


def drive_cut(function: Callable[..., Any], case: Case) -> Outcome:
    """What the heaviest stage of the learner's cut weighs. Raises `RuleError` for what is no cut."""
    layers, stages, first, last = case.inputs
    sizes = function(list(layers), stages, first, last)
    if not isinstance(sizes, (list, tuple)) or not all(type(size) is int for size in sizes):
        raise RuleError("return a list of whole numbers: how many layers each stage takes")
    if len(sizes) != stages:
        raise RuleError(f"{stages} stages were asked for, but the list has {len(sizes)}")
    if min(sizes) < 1:
        raise RuleError(f"{list(sizes)} leaves stage {min(range(stages), key=sizes.__getitem__)} without a layer")
    if sum(sizes) != len(layers):
        raise RuleError(f"{list(sizes)} are {sum(sizes)} layers, but there are {len(layers)}")
    return Outcome([heaviest(sizes, layers, first, last)])


def cut_spec(case: Case) -> list[int]:
    """What the heaviest stage weighs at best."""
    layers, stages, first, last = case.inputs
    return [heaviest(balance(layers, stages, first, last), layers, first, last)]


EVEN_STAGES = Exercise(
    name="04.even_stages",
    function="even_stages",
    minutes=5,
    spec=even_stages_spec,
    drive=drive_even_stages,
    names=tuple(f"stage {number}" for number in range(9)),
    cases=(
        Case("6 layers, 3 stages", (6, 3)),
        Case("5 layers, 2 stages", (5, 2)),
        Case("30 layers, 4 stages", (30, 4)),
        Case("7 layers, 7 stages", (7, 7)),
    ),
    starter='''\
def even_stages(layers, stages):
    """How many layers each stage takes: as even as can be, the first stages take one more."""
    return [layers // stages] * stages  # MEND (about 2 lines)
''',
    solution='''\
def even_stages(layers, stages):
    """The remainder goes to the first stages, one each."""
    base, rest = divmod(layers, stages)
    return [base + (stage < rest) for stage in range(stages)]
''',
    hints=(
        "How many layers are left when each stage has layers // stages? Who takes them?",
        "base, rest = divmod(layers, stages); the first `rest` stages have base + 1.",
    ),
)

FULLEST = Exercise(
    name="04.fullest",
    function="fullest",
    minutes=10,
    spec=fullest_spec,
    cases=(
        Case("two stages of 1 layer, nothing else", ([1, 1], 10, 0, 0)),
        Case("two stages, an embedding of 7", ([1, 1], 10, 7, 0)),
        Case("stages of 1 and 3 layers, a head of 5", ([1, 3], 10, 4, 5)),
        Case("SmolLM2 in four", ([8, 8, 7, 7], 14_160_384, 113_246_208, 113_248_512)),
    ),
    starter='''\
def fullest(sizes, layer, embedding, head):
    """Bytes of weights that the fullest stage holds.

    Stage n has sizes[n] layers of `layer` bytes each; the first stage has the embedding too, the
    last one the LM head.
    """
    return max(sizes) * layer  # MEND (about 4 lines)
''',
    solution='''\
def fullest(sizes, layer, embedding, head):
    """Add up each stage, then look for the largest."""
    held = [size * layer for size in sizes]
    held[0] += embedding
    held[-1] += head
    return max(held)
''',
    hints=(
        "The stage with the most layers need not be the fullest. What else do the first one and the last one hold?",
        "Make a list with what each stage's layers take, add `embedding` to the first and `head` to the last, then take the max.",
    ),
)

CUT = Exercise(
    name="04.cut",
    function="cut",
    minutes=25,
    spec=cut_spec,
    drive=drive_cut,
    cases=(
        Case("4 equal layers, 2 stages", ([10] * 4, 2, 0, 0)),
        Case("4 equal layers, 2 stages, a head as heavy as 2 layers", ([10] * 4, 2, 0, 20)),
        Case("layers of 1, 1, 1, 9, 1, 1, 3 stages", ([1, 1, 1, 9, 1, 1], 3, 0, 0)),
        Case("layers of 5, 1, 5, 1, 5, 1, 3 stages, an embedding of 6", ([5, 1, 5, 1, 5, 1], 3, 6, 0)),
        Case("SmolLM2 in four, an embedding and a head of 8 layers each", ([10] * 30, 4, 80, 80)),
    ),
    names=("weight of the heaviest stage",),
    starter='''\
def cut(layers, stages, first, last):
    """How many layers each stage takes, so that the heaviest stage weighs as little as can be.

    `layers` are the weights of the layers, in order; the first stage weighs `first` more, the last
    one `last` more. Every stage needs a layer at least.
    """
    base, rest = divmod(len(layers), stages)
    return [base + (stage < rest) for stage in range(stages)]  # MEND (about 15 lines)
''',
    solution='''\
def cut(layers, stages, first, last):
    """Try limits from small to large: fill each stage up to the limit, and see whether all layers find a place."""
    def filled(limit):
        sizes, begin = [], 0
        for stage in range(stages):
            room = limit - (first if stage == 0 else 0) - (last if stage == stages - 1 else 0)
            size, most = 0, len(layers) - begin - (stages - stage - 1)  # the others need a layer each
            while size < most and layers[begin + size] <= room:
                room -= layers[begin + size]
                size += 1
            if size == 0:
                return None
            sizes.append(size)
            begin += size
        return sizes if begin == len(layers) else None

    sums = {sum(layers[a:b]) + extra for a in range(len(layers)) for b in range(a + 1, len(layers) + 1)
            for extra in (0, first, last, first + last)}
    return next(sizes for limit in sorted(sums) if (sizes := filled(limit)) is not None)
''',
    hints=(
        "Even numbers of layers are not even weights. Move a layer from the heaviest stage to a neighbour: is it better?",
        "If you knew the heaviest stage's weight, you could fill stage after stage up to it from the front. Try weights from small to large until all layers find a place.",
    ),
)

EXERCISES = (EVEN_STAGES, FULLEST, CUT)
