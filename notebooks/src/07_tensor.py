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
# # 07 · Tensor
#
# **A pipeline makes no token come sooner. What if all devices shared every layer?**
#
# 45 minutes, and about 40 for the exercises · comes after 05 and 06 · needs nothing but this machine
#
# Two questions from before: what does an all-reduce leave on every rank? And how many bytes did a stage of the pipeline send
# for one token?
#
# | term | 中文 | in one line |
# |---|---|---|
# | tensor parallelism | 张量并行 | every rank has a slice of every layer |
# | column-parallel | 列并行 | a weight is cut by columns: a rank has some of the results, whole |
# | row-parallel | 行并行 | cut by rows: a rank has a summand of every result |
# | head | 注意力头 | a part of attention that needs no other one |
# | KV head | 键值头 | one cached head that serves a group of query heads |
# | shard | 分片 | the slice that a rank holds |

# %% tags=["needed"]
# %load_ext minillm
from minillm import LLM, Ranks, SamplingParams

ranks = Ranks(2)
two = LLM(layout="tp=2", dtype="float32", ranks=ranks)
question = two.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])

# %% [markdown]
# Two processes share every layer. One question: watch who works when. (Lesson 04 had a staircase here.)

# %%
from minillm.viz.live import Timeline

two.generate([question], SamplingParams(max_tokens=1))  # warm up
live = Timeline(finding="Both ranks work on every token")
shown = display(live, display_id=True)
two.on_span = live.push
answer = two.generate([question], SamplingParams(max_tokens=7))[0]
two.on_span = None
live.show(two.trace.only("compute"))
shown.update(live)
print(answer.text)

# %% [markdown]
# ## By hand
#
# A product `x · W`, with `W` cut in two. There are two ways to cut.

# %%
import torch

x = torch.tensor([1.0, 2.0])
W = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
print("whole:     ", x @ W)
print("by columns:", x @ W[:, :1], "and", x @ W[:, 1:], "side by side")
print("by rows:   ", x[:1] @ W[:1], "and", x[1:] @ W[1:], "added up")

# %% [markdown]
# On ranks, the pieces are in two memories. Both ways each rank has multiplied with half of `W` only.

# %%
# %%ranks
comm = context().comm()
x, W = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 3.0], [5.0, 7.0]])
columns = x @ W[:, rank : rank + 1]
rows = x[rank : rank + 1] @ W[rank : rank + 1]
print(f"columns: has {columns.tolist()}, all-gather gives {comm.all_gather(columns).tolist()}")
print(f"rows:    has {rows.tolist()}, all-reduce gives {comm.all_reduce(rows.clone()).tolist()}")

# %% [markdown]
# ## Predict: two products in a row
#
# An MLP is `f(x · W) · V`; `f` takes each number by itself. Every rank has `x`, every rank needs the result.

# %%
from minillm.lesson.predict import Predict

cuts = Predict("07.cuts", "Cut W and V how, so that ranks send only once?",
               choices=("W by columns, V by columns", "W by columns, V by rows",
                        "W by rows, V by columns", "W by rows, V by rows"))
cuts

# %%
from minillm.viz.block import draw_block

cuts.reveal(
    1,
    "Columns of W give a rank some numbers of the middle whole, so that f can be taken. Those are just "
    "what the same rows of V need. What remains is one sum.",
    draw_block("columns", "rows"),
    how="counted",
)

# %% [markdown]
# Why not the others? Try them, and watch what travels in the middle.

# %%
from minillm.viz.whatif import WhatIf

WhatIf(lambda W, V, ranks: draw_block(W, V, ranks), "What if W and V were cut another way?",
       W=["rows", "columns"], V=["columns", "rows"], ranks=[2, 4])

# %% [markdown]
# (SmolLM2's MLP has two such `W`, gate and up. Both are cut by columns, so that nothing changes.)
#
# Attention is the same once more. Queries, keys and values are cut by columns, whole heads to each rank; a head needs no
# other one. The output projection is cut by rows. So a layer has **two** sums: one after attention, one after the MLP.
#
# ## Predict: what a token sends
#
# The embedding is cut by words: whoever has the word looks it up, the others add zeros, one more sum. Here are 30 layers. In
# a pipeline a stage sent 2.3 kB for a token.

# %%
sends = Predict(
    "07.bytes", "How many times as much does each of the two ranks send here?", "×", 1, 1000
)
sends

# %%
greedy = SamplingParams(max_tokens=4, ignore_eos=True)
two.generate([question], greedy)
step = next(span for span in two.trace.spans if span.name == "decode")
vector = 4 * two.config.hidden_size

# %%
sums, best = divmod(step.message_bytes, vector)
sends.reveal(
    step.message_bytes / vector,
    f"{step.message_bytes:,} bytes: {sums} sums of {vector:,}. Two for each of {two.config.layers} "
    f"layers, one for the embedding; and {best} bytes to find the likeliest word. Nobody has all the "
    "logits: each rank tells the others only its own best word, and how good it is.",
    how="counted",
)

# %% [markdown]
# Where do they stand in a token? Here are its first layers, on the clock of the wall.

# %%
from dataclasses import replace

from minillm.trace.trace import Kind
from minillm.viz.style import show
from minillm.viz.timeline import draw_timeline

run = two.measure_messages([question], greedy).only("compute")
last = max(span.step for span in run.spans if span.kind is Kind.DECODE)
run = replace(run, spans=[span for span in run.spans if span.step == last])
soon = run.start_s + (run.end_s - run.start_s) / 5
run = replace(run, spans=[span for span in run.spans if span.start_s < soon])
show(draw_timeline(run, "After each block all ranks wait for the sum"))

# %% [markdown]
# ## Run
#
# The same engine, the same work, on one device, two ranks and four. First, prompts of 128 tokens.

# %%
prompt = Predict("07.prompt", "How many times as fast do two ranks read the prompts?", "×", 0.1, 10)
prompt

# %%
from statistics import median

one, four = LLM(dtype="float32"), LLM(layout="tp=4", dtype="float32")
engines = {"one device": one, "two ranks": two, "four ranks": four}
prompts = [[(37 * n + 11 * at) % 40_000 for at in range(128)] for n in range(8)]
read = SamplingParams(max_tokens=1, ignore_eos=True)
first = [[output.token_ids for output in llm.generate(prompts, read)] for llm in engines.values()]
traces = {name: llm.trace for name, llm in engines.items()}
print("the same tokens:", first[0] == first[1] == first[2])

# %% tags=["nbval-ignore-output"]
from minillm.ranks.speed import measure_ring
from minillm.trace.replay import replay

seconds = {one: [], two: []}
for _ in range(4):
    for llm in seconds:
        llm.generate(prompts[:3], read)
        seconds[llm].append(llm.trace.end_s - llm.trace.start_s)
gain = median(seconds[one][1:]) / median(seconds[two][1:])

link, clocks = measure_ring(ranks), {}
for name, llm in engines.items():
    llm.generate(prompts[:2], read)  # warm up
    clocks[name] = replay(llm.record_for_replay(prompts[:2], read), link)
took = [1e3 * (run.only("compute").end_s - run.only("compute").start_s) for run in clocks.values()]

# %%
from minillm.viz.timeline import draw_runs

prompt.reveal(
    gain,
    "Less than two: rank 0 has 6 of the 9 heads, for reasons that come below, and rank 1 waits for it; "
    "every rank does all norms; sums take time. Four devices, on the replay clock: "
    f"{took[0] / took[2]:.1f} times.",
    draw_runs(clocks, "Slices of every layer: with more devices, a prompt is read sooner",
              f"replayed · devices like a core of this machine · {link.name} · SmolLM2-135M float32 · "
              "2 prompts of 128 tokens", bubbles=False),
)

# %% [markdown]
# Now the tokens that follow. Each rank reads about half of the weights for a token, and computes about half.

# %%
token = Predict("07.token", "How many times as fast does a token come from two ranks?", "×", 0.1, 10)
token

# %%
longer = SamplingParams(max_tokens=12, ignore_eos=True)
runs = [[llm.generate([question], longer)[0] for llm in (one, two)] for _ in range(5)]
ms = [1e3 * median(run[at].metrics.tpot_s for run in runs[1:]) for at in (0, 1)]
print("the same tokens:", runs[0][0].token_ids == runs[0][1].token_ids)

# %%
token.reveal(
    ms[0] / ms[1],
    f"{ms[0]:.0f} ms a token, and {ms[1]:.0f}. Decoding reads (lesson 01), and the cores of this "
    "machine read through one memory bus: two readers gain little or nothing, and sums are on top. "
    "Where every device has a memory of its own, and a fast link, large models gain: see below.",
)

# %% [markdown]
# ## What each rank holds
#
# SmolLM2 has 9 query heads and 3 KV heads: three neighbouring query heads share the keys and values of one. Nobody can have
# half a KV head. The cache lives where it is computed, so what do four ranks buy?

# %%
room = Predict(
    "07.room", "How many times the tokens fit, with a GiB of cache on each of four ranks?", "×", 1, 10
)
room

# %%
from minillm.trace.trace import Category
from minillm.viz.memory import draw_memory

fit = [llm.engine.load.num_blocks * 16 for llm in engines.values()]
kept = Category.KV_CACHE
cache = {name: replace(run, memory=[each for each in run.memory if each.category is kept])
         for name, run in traces.items()}
room.reveal(
    fit[2] / fit[0],
    f"{fit[0]:,} tokens on one device, {fit[1]:,} on two ranks, {fit[2]:,} on four. Of two ranks the "
    "fuller has 2 of the 3 KV heads. Of four each has one, and one head is there twice; more than "
    "three buy no more. (vLLM and SGLang copy KV heads too, but evenly; 9 on 2 or 4 they refuse.)",
    draw_memory(cache, "Nobody can have half a KV head: from three ranks on, more do not help",
                "measured · the most that was cached at a time, same prompts · SmolLM2-135M float32"),
    how="counted",
)

# %%
show(draw_memory(traces, "Weights are cut nearly evenly; what differs is the heads"))

# %% [markdown]
# ## The engine's own
#
# Find the line that cuts by columns, the one that cuts by rows, and the one that adds up.

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("parallel.tensor.apply_tensor_parallel")

# %% tags=["nbval-ignore-output"]
show_source("parallel.tensor.RowParallelLinear")

# %% tags=["nbval-ignore-output"]
show_source("parallel.tensor.TensorGroup.argmax")

# %% [markdown]
# ## Break it: one sum of sixty-one
#
# One layer of thirty forgets to add up: each rank goes on with its own summand.

# %%
lost = Predict("07.lost_sum", "What comes out?",
               choices=("an error from the communicator", "one rank hangs",
                        "noise, whichever layer forgets",
                        "no error; the right text or nonsense, by layer",
                        "another text on each rank"))
lost

# %%
from minillm import context


def forget(name, layer):
    """On each rank: this layer's attention asks nobody for the other's summand."""
    projection = context().held[name].model.layers[layer].self_attn.o_proj
    projection.forward = projection.multiply


def mend(name, layer):
    """As it was."""
    del context().held[name].model.layers[layer].self_attn.o_proj.forward


def without_sum(layer):
    """The answer when one layer forgets the sum of its attention."""
    ranks.run(forget, two.instance.name, layer)
    text = two.generate([question], SamplingParams(max_tokens=12))[0].text
    ranks.run(mend, two.instance.name, layer)
    return text.strip()


heard = {layer: without_sum(layer) for layer in (1, 4, 8)}

# %%
lost.reveal(
    3,
    " ".join(f"Layer {layer}: “{text}”" for layer, text in heard.items()) + " No error tells, and "
    "nobody waits: every rank left out the same sum. All ranks even agree on the words, because the "
    "likeliest is found together. Only a comparison with one device tells, token by token.",
)

# %% [markdown]
# Try other layers: `without_sum(28)`. And if *one* rank alone forgot, its next call would meet another one: lesson 00 had that.
#
# ## What if: when does it stop helping?
#
# Each step of a sum costs α, the link's latency, whatever it carries; and there are 61 sums in a row in SmolLM2, 161 in a 70B. The more devices,
# the less there is to compute in between.

# %%
from minillm.hardware.devices import find_device, find_link
from minillm.model.shapes import SHAPES
from minillm.viz.slices import Load, draw_slices

loads = {"decode, 1 request": Load(1, 1, 1000), "decode, 64 requests": Load(64, 1, 1000),
         "prefill, 2,048 tokens": Load(1, 2048, 0)}


def draw_what_if(device, link, model, step):
    caption = f"planned, roofline and α + β · bytes · {device} · {link} · {model} float16 · {step}"
    return draw_slices(find_device(device), find_link(link), SHAPES[model], "float16", loads[step],
                       caption)


WhatIf(draw_what_if, "How many devices for a step?", device=["A100 80GB", "H100", "T4"],
       link=["NVLink 3", "PCIe 4 x16", "100 Gbit/s", "1 Gbit/s"],
       model=["Llama-3.1-8B", "Llama-3.1-70B", "SmolLM2-135M"], step=list(loads))

# %% [markdown]
# So tensor parallelism stays inside a host, where links are fast, and pipelines go between hosts. A slow link hurts a fast
# device most: take the T4 and the A100 at 100 Gbit/s, for a prompt.
#
# ## Your turn
#
# A hint comes after the first failed try and after the third; `solution("07.mlp")` shows a solution, any time.
#
# **The likeliest word** (about 5 minutes). The target: two numbers from each rank.

# %% tags=["exercise"]
# %%exercise 07.argmax

# %% [markdown]
# **Columns, then rows** (about 10 minutes). The target: one sum, and nobody reads more than its share.

# %% tags=["exercise"]
# %%exercise 07.mlp

# %% [markdown]
# **3 KV heads on 2 ranks** (about 25 minutes). The target: as few query heads on the busiest rank as can be.

# %% tags=["exercise"]
# %%exercise 07.heads

# %% [markdown]
# Your `heads` (or, until it is solved, the course's) for SmolLM2, beside what the engine's ranks hold. (Which ranks
# share a head is free; the engine takes neighbours.)

# %%
from minillm.lesson.desk import whose
from minillm.parallel.layout import Layout
from minillm.parallel.shards import Shard

print("heads is", whose(heads))
for count, layout in ((2, "tp=2"), (4, "tp=4")):
    for rank, (keys, queries) in enumerate(heads(9, 3, count)):
        shard = Shard(two.config, Layout.parse(layout), rank)
        held = f"KV heads {list(shard.kv_heads)}, query heads {list(shard.heads)}"
        print(f"{layout}, rank {rank}: KV heads {keys}, query heads {queries}; the engine's: {held}")

# %% [markdown]
# ## Passport
#
# | mode | what is cut | what is sent | lesson |
# |---|---|---|---|
# | **tensor** | every layer, by heads and columns | two sums a layer, to all ranks | 07 (you are here) |
# | pipeline | layers, and the work into micro-batches | hidden states, from stage to stage | 05 |
# | layers over devices | the model, between layers | hidden states, from stage to stage | 04 |
#
# > **Out there.** vLLM: `--tensor-parallel-size`. SGLang: `--tp-size`. TensorRT-LLM: `tp_size`. All cut columns, then rows, and
# > copy KV heads when there are more ranks; heads must divide by the ranks. Torch: `parallelize_module` with `ColwiseParallel` and `RowwiseParallel`.
# >
# > **Your devices.** No GPU: processes that share memory, as here. Two GPUs or more: `layout="tp=2"` sums by NCCL.
# >
# > **Papers.** Shoeybi et al., *Megatron-LM*, 2019 (section 3: columns, then rows) · Pope et al., *Efficiently scaling
# > Transformer inference*, 2022 (which cut for which phase) · Ainslie et al., *GQA*, 2023.

# %%
four.close()
two.close()
one.close()
ranks.close()

# %% [markdown]
# **Next:** all of this is for one stream of requests. With twice the requests, is a second copy of everything the better
# buy?
