# ---
# jupyter:
#   jupytext:
#     formats: notebooks//ipynb,notebooks/src//py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11 · DistAttention
#
# **A document is too long for any device's KV cache. Its keys lie on four. Who travels: the keys, or the question?**
#
# 40 minutes, and about 40 for the exercises · comes after 03 and 07 · needs 5 GB of free memory
#
# Two questions from before: why is a KV cache cut into blocks? And what do two ranks with half of the heads each add up?
#
# | term | 中文 | in one line |
# |---|---|---|
# | context parallelism (CP) | 上下文并行 | one sequence's tokens lie on several ranks |
# | DistAttention | 分布式注意力 | the query goes to the keys, wherever they lie |
# | partial attention | 局部注意力 | what one rank can say of its own keys |
# | merge | 合并 | makes of partial attentions what all keys in one place give, exactly |
# | ring attention | 环形注意力 | the keys go round all ranks, queries stay |

# %% tags=["needed"]
# %load_ext minillm
from minillm import LLM, EngineOptions, Ranks, SamplingParams

ranks = Ranks(4)
small = EngineOptions(num_blocks=8, max_step_tokens=64)  # 8 blocks of 16 tokens on a device
one = LLM(dtype="float32")
four = LLM(layout="cp=4", dtype="float32", ranks=ranks, options=small)

# %% [markdown]
# A keeper's log, and a sentence to finish. A device with 8 blocks has room for 128 tokens.

# %% tags=["needed"]
log = """The keeper of the lighthouse at Gull Point is called Marta, and her cat is called Pepper.
Monday. Fog from the west since dawn. The horn was sounded every two minutes. The supply boat did
not come, and there are eleven tins of beans left. The stairs were swept and the brass of the lamp
was polished.
Tuesday. The fog went at noon. Two fishing boats passed, and one of them was towing the other. The
crew waved. In the afternoon the glass of the lantern was washed on the outside, which takes three
hours when there is no wind.
Wednesday. Strong wind from the south. A pane on the second floor is broken, and was closed with a
board. At night a large ship passed far out, with all of its lights on. The lamp burned well.
Thursday. The supply boat came at last, with flour, oil, letters and a new pane. The young man who
brought it stayed for tea, and talked about his sister's wedding. He had forgotten the sugar again.
Friday. Rain. The new pane is in its place. A letter from the harbour office says that the lamp is
to be replaced by an electric one next year. It was read twice, and put away.
Saturday. Calm sea. A seal slept on the rocks below the tower all day, and was not afraid of
anybody."""
prompt = one.tokenizer.encode(f"{log}\n\nThe keeper's cat is called")
answer = SamplingParams(max_tokens=2)
print(len(prompt), "tokens")
try:
    one.with_options(small).generate([prompt], answer)
except ValueError as error:
    print(error)

# %% [markdown]
# Four such devices have 32 blocks.

# %%
from minillm.trace.trace import Category
from minillm.viz.pools import draw_pools
from minillm.viz.style import show

print(f"The keeper's cat is called{four.generate([prompt], answer)[0].text}")
block_bytes = 16 * one.config.kv_numbers_per_token * 4
held = [four.trace.peak_bytes(rank)[Category.KV_CACHE] // block_bytes for rank in range(4)]
show(draw_pools(held, 8, f"{len(prompt)} tokens lie on four ranks; none has room for half of them",
                "measured · blocks of 16 tokens · SmolLM2-135M float32, cp=4"))

# %% [markdown]
# ## By hand
#
# One query, three keys, their values 1, 2 and 4. Rank 0 has the first two keys, rank 1 the third. Each says three numbers: its largest
# score m, l = Σ e^(s − m), and o = Σ e^(s − m) · v. They cannot just be added: each has subtracted its own m.

# %% tags=["needed"]
from math import exp

scores, values = [2.0, 1.0, 3.0], [1.0, 2.0, 4.0]
at_once = sum(exp(s) * v for s, v in zip(scores, values)) / sum(exp(s) for s in scores)
m0, l0, o0 = 2.0, 1 + exp(-1.0), 1 * 1.0 + exp(-1.0) * 2.0
m1, l1, o1 = 3.0, 1.0, 4.0
m = max(m0, m1)
o = o0 * exp(m0 - m) + o1 * exp(m1 - m)
total = l0 * exp(m0 - m) + l1 * exp(m1 - m)
print(f"merged {o / total:.4f}, all keys in one place {at_once:.4f}")
print(f"mean of both answers {(o0 / l0 + o1 / l1) / 2:.4f}")

# %% [markdown]
# ## What if: other cuts
#
# Twelve keys. Move the cuts: what each rank says changes, and the merged answer does not. Then change the score of a key. The mean of the
# ranks' own answers is right only by luck: as if the keys of all ranks weighed as much.

# %%
from minillm.viz.merge import draw_merge
from minillm.viz.whatif import WhatIf

TWELVE = [0.4, 1.1, -0.6, 0.2, 0.9, -1.2, 0.7, 0.1, -0.3, 1.3, 0.5, -0.8]
CUTS = {"even": [3, 3, 3, 3], "uneven": [6, 1, 4, 1], "one is empty": [5, 0, 4, 3],
        "two ranks": [6, 6], "one rank": [12]}


def merged(cut, key, its_score):
    scored = [its_score if n == key else score for n, score in enumerate(TWELVE)]
    held = [float(n % 5) for n in range(12)]  # the values
    return draw_merge(scored, held, CUTS[cut], "by formula · one query, one head, 12 keys")


WhatIf(merged, "What does each rank say?", cut=list(CUTS),
       key=[7, *(n for n in range(12) if n != 7)], its_score=[2.5, 0, 1, 4, 6])

# %% [markdown]
# ## Predict: the size of an answer

# %%
from minillm.lesson.predict import Predict

size = Predict("11.answer", "A rank's answer about 10,000 keys: how many times the bytes of one "
               "about 100?", "×", 0.5, 200)
size

# %%
import torch

from minillm.distkv.attention import partial_attention

q = torch.randn(1, 9, 64)  # one token, 9 heads of 64 numbers
answers = [partial_attention(q, *torch.randn(2, 3, keys, 64)).pack() for keys in (100, 10_000)]

# %%
size.reveal(
    answers[1].nbytes / answers[0].nbytes,
    f"{answers[0].nbytes:,} bytes both times: 9 heads of 64 + 2 numbers. However many keys there are, "
    "o, m and l say all that matters. This is why the query travels.",
    how="counted",
)

# %% [markdown]
# ## Send the query, not the keys
#
# The document again, on real ranks: what was sent in a decode step, and what would have been if the keys came instead?

# %%
instead = Predict("11.instead", "In a decode step: how many times the bytes, if all keys of the other "
                  "ranks came instead?", "×", 0.1, 1000)
instead

# %%
longer = SamplingParams(max_tokens=17, ignore_eos=True)
run = four.measure_messages([prompt], longer).only("compute")
decode_steps = sorted({span.step for span in run.spans})[-16:]
decoding = [span for span in run.spans if span.step in decode_steps]
sent = {name: sum(span.message_bytes for span in decoding if span.name == name) / 16
        for name in ("queries", "answers")}
lengths = range(len(prompt), len(prompt) + 16)  # block n of the document lies on rank n mod 4
elsewhere = sum(p // 16 % 4 != n // 16 % 4 for n in lengths for p in range(n)) / 16
key_bytes = one.config.kv_numbers_per_token * 4
keys_instead = elsewhere * key_bytes
print({name: f"{count:,.0f} bytes a step" for name, count in sent.items()})

# %%
instead.reveal(
    keys_instead / sum(sent.values()),
    f"{sum(sent.values()):,.0f} bytes a step: to three ranks and back, in {one.config.layers} layers. "
    f"{elsewhere:.0f} keys are elsewhere, each of {key_bytes:,} bytes of K and V. "
    "The question does not grow with the document.",
    how="counted",
)

# %% [markdown]
# ## What if: a prompt asks
#
# While a prompt is read, hundreds of queries ask at once. Then keys may be the lighter ones, above all where 8 query heads share a
# KV head. *Ring attention* sends them round. Where do the lines cross? And for this document, read 64 tokens at a time?

# %%
from minillm.model.shapes import SHAPES
from minillm.viz.travel import draw_travel

models = {"SmolLM2-135M": one.config, **SHAPES}


def travel(queries, keys, model):
    config = models[model]
    heads = f"{config.heads} heads, {config.kv_heads} KV heads of {config.head_dim}"
    return draw_travel(config, 2, queries, keys,
                       f"by formula · {model}, {heads} · bfloat16, answers float32")


WhatIf(travel, "Who should travel?", queries=[256, 1, 16, 64, 4096],
       keys=[1024, 64, 256, 16384, 131072], model=list(models))

# %% [markdown]
# The engine can do both: `EngineOptions(ring_prefill=True)` lets keys travel for prompts. For single tokens the query always goes.
#
# ## Where keys lie

# %%
pieces = Predict("11.pieces", "SmolLM2 has 3 KV heads. Among how many ranks, at most, can tp divide "
                 "a token's keys?", "", 1, 64)
pieces

# %%
from minillm.viz.whereabouts import draw_whereabouts

tiny = SamplingParams(max_tokens=1, ignore_eos=True)
print("KV cache of one request of 64 tokens, bytes on rank 0 and on rank 1")
for layout in ("pp=2", "tp=2", "dp=2", "dp=2,ep=2", "cp=2"):
    with LLM("tiny-moe", layout=layout, dtype="float32", options=EngineOptions(num_blocks=8)) as shared:
        shared.generate([list(range(64))], tiny)
        peaks = [shared.trace.peak_bytes(rank) for rank in (0, 1)]
        print(f"{layout:10}", [peak.get(Category.KV_CACHE, 0) for peak in peaks])

# %%
pieces.reveal(
    one.config.kv_heads,
    "A head is not cut in two: more ranks hold copies. pp cuts by layers, up to 30 ranks. Both are "
    "settled when the model is loaded. Positions are cut block by block, while the document grows.",
    draw_whereabouts("Only a cut by position grows with the document",
                     "by rule · one request, 4 layers, 4 KV heads, 4 ranks"),
    how="by rule",
)

# %% [markdown]
# ## What it costs

# %%
speed = Predict("11.speed", "Decoding after this document: how many times as fast are four ranks "
                "as one?", "×", 0.2, 4)
speed

# %% tags=["nbval-ignore-output"]
from dataclasses import replace

from minillm.ranks.speed import measure_ring
from minillm.trace.replay import replay
from minillm.trace.trace import Kind

link = measure_ring(ranks)


def decode_steps_of(llm):
    """The run's decode steps, on devices like a core of this machine."""
    run = replay(llm.record_for_replay([prompt], longer), link).only("compute")
    steps = sorted({span.step for span in run.spans if span.kind is Kind.DECODE})[-16:]
    return replace(run, spans=[span for span in run.spans if span.step in steps])


runs = {"one device": decode_steps_of(one), "cp=4": decode_steps_of(four)}
ms = {name: 1e3 * (run.end_s - run.start_s) / 16 for name, run in runs.items()}

# %%
from minillm.trace.waits import with_waits
from minillm.viz.timeline import draw_timeline

decode_step = max(span.step for span in runs["cp=4"].spans)
last = [span for span in with_waits(runs["cp=4"]).spans if span.step == decode_step]
begin = min(span.start_s for span in last) + 0.5 * ms["cp=4"] / 1e3
layers = [span for span in last if begin < span.start_s and span.end_s < begin + 0.012]
speed.reveal(
    ms["one device"] / ms["cp=4"],
    f"{ms['one device']:.0f} ms a token become {ms['cp=4']:.0f}. One rank computes the token, with all "
    "weights; the others only look at their keys, which for so few is soon done. In each of 30 layers "
    "it waits for three answers. Room adds up; speed does not, until keys take longer to read than "
    "weights.",
    draw_timeline(replace(runs["cp=4"], spans=layers),
                  "In each layer one rank asks, and all look at their keys",
                  "replayed · devices like a core of this machine · SmolLM2-135M float32, cp=4"),
    how="replayed",
)

# %% [markdown]
# ## The engine's own

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("distkv.attention.partial_attention")

# %% tags=["nbval-ignore-output"]
show_source("parallel.context_step.ContextStep._ask")  # `going`: the rows that go to others

# %% [markdown]
# ## Break it: finish first, then merge
#
# Every rank divides its o by its l, as if its keys were all there are; where two answers meet, their mean is taken.

# %%
averaged = Predict("11.averaged", "What comes out?",
                   choices=("the right text: a mean of means is the mean",
                            "an error: the shapes do not fit", "nonsense, from the first token on",
                            "fluent text with a wrong name"))
averaged

# %%
def average(how):
    """On every rank: the mean of two answers in place of the merge."""
    import minillm.distkv.attention as attention

    part = attention.Partial
    if not how:
        part.merge = part.kept
        return
    part.kept = part.merge

    def mean(mine, other):
        there = [each for each in (mine, other) if each.l.any()]
        o = sum(each.o / each.l[..., None].clamp(min=1e-9) for each in there) / len(there)
        return part(o, torch.maximum(mine.m, other.m), torch.ones_like(mine.l))

    part.merge = mean


ranks.run(average, True)
wrong = " ".join(four.generate([prompt], longer)[0].text.split())
ranks.run(average, False)
right = " ".join(four.generate([prompt], longer)[0].text.split())

# %%
averaged.reveal(
    2,
    f"The keeper's cat is called … merged: “{right}” averaged: “{wrong}”",
)

# %% [markdown]
# ## Your turn
#
# A hint comes after the first failed try and after the third; `solution("11.merge")` shows a solution, any time.
#
# **Who should travel?** (about 5 minutes).

# %% tags=["exercise"]
# %%exercise 11.travel

# %% [markdown]
# **The merge** (about 10 minutes). Some ranks have no keys.

# %% tags=["exercise"]
# %%exercise 11.merge

# %% [markdown]
# **Ask all ranks** (about 25 minutes).

# %% tags=["exercise"]
# %%exercise 11.ask

# %% [markdown]
# Your `merge` (or, until it is solved, the course's) on the two ranks' words above, and on those of a third that has no keys:

# %%
from minillm.lesson.desk import whose

said = [(m0, l0, [o0, 0.0]), (m1, l1, [o1, 0.0]), (float("-inf"), 0.0, [0.0, 0.0])]
print(f"merge is {whose(merge)}: {merge(said)[0]:.4f}; all keys in one place: {at_once:.4f}")

# %% [markdown]
# ## Passport
#
# | mode | what is cut | what is sent | lesson |
# |---|---|---|---|
# | **context** | a sequence's KV cache, by positions | queries to the keys, o, m and l back | 11 (you are here) |
# | tensor | every layer, by heads and columns | two sums a layer, to all ranks | 07 |
# | pipeline | the list of layers | one hidden state per token | 05 |
#
# > **Out there.** vLLM: `--decode-context-parallel-size`, within a tensor-parallel group, for models with few KV heads. Flash-Decoding does
# > the same merge on one GPU, over parts of its own cache. Prompts of a million tokens are read by ring attention.
# >
# > **Your devices.** No GPU: processes, as here. Two GPUs or more: `layout="cp=2"`, also with `tp` and `pp`.
# >
# > **Papers.** Lin et al., *Infinite-LLM*, 2024 (section 4.1: DistAttention) · Milakov and Gimelshein, *Online normalizer calculation for
# > softmax*, 2018 · Liu et al., *Ring Attention*, 2023 · Dao et al., *Flash-Decoding*, 2023.

# %%
four.close()
one.close()
ranks.close()

# %% [markdown]
# **Before you go on:** in one sentence: why is it cheaper to send the question than the keys, and when is it not?
#
# **Next:** *12 · Infinite-LLM*: instances that serve different requests lend each other their free blocks.
