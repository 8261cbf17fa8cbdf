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
# # 01 · One device
#
# **Why does the first word of an answer take so long, and the others so little?**
#
# 45 minutes, and about 40 for the exercises · comes after 00 · needs nothing but this machine
#
# Two questions from lesson 00: what does a rank know of another rank's memory? And which rank is to blame when four
# wait and one has gone home?
#
# | term | 中文 | in one line |
# |---|---|---|
# | prefill | 预填充 | computing all tokens of the prompt at once, up to the first new token |
# | decode | 解码 | computing one new token per step |
# | KV cache | KV 缓存 | keys and values of all tokens so far, kept |
# | TTFT | 首 token 延迟 | time to first token |
# | TPOT | 每 token 延迟 | time per output token after the first |
# | intensity | 计算强度 | operations per byte of memory traffic |

# %% tags=["needed"]
# %load_ext minillm
from minillm import LLM, SamplingParams

llm = LLM(dtype="float32")  # SmolLM2, 135 million parameters; on a GPU if there is one

STORY = """A lighthouse keeper named Ada lives on a small island. Every evening she climbs the stairs,
lights the lamp and writes the weather into a thick book. One night a storm breaks the window. The
wind puts out the lamp again and again. Far away she sees the lights of a ship that comes too close
to the rocks. Ada takes every mirror in the house, sets them around the fireplace in the kitchen and
opens the door to the sea. The bright fire shows the captain where the rocks are, and the ship turns
away in time. In the morning the captain sends her a new window, a box of oranges and a letter."""


def ask(question):
    return llm.tokenizer.chat([{"role": "user", "content": question}])


prompt = ask(STORY + "\n\nWhich gifts did the captain send?")
print(len(prompt), "tokens in the prompt")

# %% [markdown]
# Watch the answer come. `stream` hands out each token as soon as there is one. Look at the *rhythm*.

# %%
for piece in llm.stream(prompt, SamplingParams(max_tokens=16)):
    print(piece.text, end="", flush=True)

# %% [markdown]
# A pause, then a patter. (A window was sent too. A model this small reads fast and not carefully.)

# %%
from minillm.lesson.predict import Predict

first = Predict(
    "01.first_token", "How many times longer than one later token did the first one take?", "×", 1, 1000
)
first

# %%
from minillm.viz.requests import draw_latency

trace = llm.trace  # of the run above
life = trace.lives[0]
first.reveal(
    life.ttft_s / life.tpot_s,
    "All tokens of the prompt were computed first. But together: one by one they would take far longer.",
    lambda guess: draw_latency(trace, "The prompt is paid for once, at the start", guess_times=guess),
)

# %% [markdown]
# ## By hand: attention for four tokens
#
# One attention head, with vectors of two numbers. Every token has a query *q*, a key *k* and a value *v*. The last token
# looks at all keys, turns the scores into weights, and mixes the values.

# %%
import torch

q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])  # [4 tokens, 2]
k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 2.0]])
v = torch.tensor([[10.0, 0.0], [0.0, 10.0], [20.0, 0.0], [0.0, 20.0]])


def attend(tokens):
    scores = q[tokens - 1] @ k[:tokens].T / 2**0.5
    return torch.softmax(scores, dim=0) @ v[:tokens]


for tokens in (1, 2, 3, 4):
    result = attend(tokens).round().tolist()
    print(f"token {tokens} uses {tokens} keys, {tokens} values, 1 query: {result}")

# %% [markdown]
# Two things to see. Old *queries* are never used again. Old *keys and values* are used at every step, and they never
# change. So compute them once and keep them: that is the **KV cache**. Without it, step 1,000 would compute 1,000 tokens
# to get one. You will write it yourself in the exercises. The engine's is cut into blocks, for a reason that lesson 03
# tells; writing to it and reading from it are a line or two each:

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("kv.paged.PagedCache.write")

# %% tags=["nbval-ignore-output"]
show_source("kv.paged.PagedCache.read")

# %% [markdown]
# ## Look: one run on one rank
#
# Point at a bar. It tells tokens, time, operations and the bytes that had to move. Zoom in on the steps.

# %%
from minillm.viz.live import Timeline

Timeline(trace, "One wide step reads the prompt, narrow steps write the answer")

# %% [markdown]
# Compare the prefill bar with a decode bar. Their *bytes* are much alike: either way every weight is read once, and the
# prefill adds its activations. Their *operations* are more than a hundred times apart, nearly as many times as the
# prompt has tokens. Operations per byte is the **intensity**, and the *roofline* says what it
# is worth. A device computes at most F operations and moves at most B bytes per second, so work of intensity I runs at
# min(F, I · B). Here are F and B of this very machine, measured now, and the run above as two dots:

# %%
from minillm.hardware.ceilings import measure_ceilings
from minillm.viz.roofline import draw_roofline, measured_dots
from minillm.viz.style import show

here = measure_ceilings(llm.device.type)
dots = measured_dots(trace)
show(draw_roofline(here, "float32", dots, "Prefill computes, decode reads", trace=trace))

# %% [markdown]
# **This is the one thing to take along.** Prefill hangs under the flat part: it waits for the arithmetic units. Decode
# hangs under the slope: it waits for memory, and the arithmetic units idle. The dots stay below the roof because
# norms, softmax and Python take time too, and products of a few rows read memory more slowly than a plain sum does. So
# read the roof as a bound, and expect a small model on a CPU to stay at half of it.
#
# ## Several requests in one step
#
# If a decode step mostly reads weights, why not let eight requests share the reading?

# %%
batch = Predict(
    "01.batch_of_8", "How many times longer than for 1 request is a decode step for 8?", "×", 0.5, 20
)
batch

# %%
things = ("river", "planet", "fruit", "colour", "metal", "bird", "city")
others = [ask(f"Name a {thing}.") for thing in things]
alone = llm.generate([prompt], SamplingParams(max_tokens=12))
runs = {}
for count in (1, 4, 8):
    everyone = [prompt, *others][:count]
    outputs = llm.generate(everyone, SamplingParams(max_tokens=12, ignore_eos=True))
    runs[count] = llm.trace
print("the same tokens, alone or in company:", outputs[0].token_ids == alone[0].token_ids)

# %%
from statistics import median

from minillm.trace.trace import Kind

step_s, dots = {}, []
for count, run in runs.items():
    step_s[count] = median(span.duration_s for span in run.spans if span.kind is Kind.DECODE)
    dots += [dot for dot in measured_dots(run) if dot.label.startswith("decode")]

# %%
finding = "Each further request of the batch moves decode to the right"
batch.reveal(
    step_s[8] / step_s[1],
    "Eight requests need eight times the operations, but one reading of the weights. On a GPU the "
    "factor is close to 1; here the slope ends at three operations per byte, so it is more.",
    draw_roofline(here, "float32", dots, finding, trace=runs[8]),
)

# %% [markdown]
# ## Two goals that conflict
#
# So always take all requests that come? Look at each request's life:

# %%
from minillm.viz.requests import draw_requests

show(draw_requests(runs[8], "The more start together, the longer the last one waits"))

# %% tags=["nbval-ignore-output"]
for count, run in runs.items():
    ttft_ms = max(life.ttft_s for life in run.lives) * 1e3
    tpot_ms = median(life.tpot_s for life in run.lives) * 1e3
    rate = 12 * count / (run.end_s - run.start_s)
    print(f"batch {count}: last TTFT {ttft_ms:5.0f} ms, TPOT {tpot_ms:4.0f} ms, {rate:5.1f} tokens/s")

# %% [markdown]
# From one request to several, throughput rises, and so do TTFT (prompts queue for the same device) and TPOT (steps get
# longer, and prefills of others stand in between). Who pays for the device wants large batches; who reads the answer wants small
# ones. Most of this course is about moving that line.
#
# ## Where the memory goes
#
# One token leaves 2 · layers · KV heads · head_dim numbers behind. Weights do not grow; this does.

# %%
config = llm.config
sizes = f"2 · {config.layers} · {config.kv_heads} · {config.head_dim} · 4 bytes"
print(f"one token of SmolLM2 in float32: {sizes} = {config.kv_bytes_per_token:,} bytes")
print(f"its weights: {sum(weight.nbytes for weight in llm.model.parameters()):,} bytes")

# %%
from minillm.viz.memory import draw_memory

some = SamplingParams(max_tokens=2, ignore_eos=True)
measured = {f"{count} × Ada": llm.measure_memory([prompt] * count, some) for count in (1, 3)}
show(draw_memory(measured, "Each request brings a cache of its own; the weights are shared"))

# %%
from minillm.hardware.devices import find_device
from minillm.model.shapes import SHAPES
from minillm.viz.growth import draw_kv_growth

name, finding = "Llama-3.1-8B", "With many long requests the KV cache outgrows weights and device"
show(draw_kv_growth(name, SHAPES[name], find_device("H100"), (1, 16, 64), finding))

# %% [markdown]
# ## Break it
#
# The first sixteen cached tokens lose their values, as if their block had been given to another request too early.

# %%
lost = Predict("01.lost_values", "Sixteen cached values are lost. What comes out?",
               choices=("an error", "the same answer", "noise", "a fluent answer that is wrong"))
lost

# %%
from unittest.mock import patch

from minillm.kv.paged import PagedCache

write = PagedCache.write


def forgetful(self, layer, blocks, offsets, keys, values):
    if len(keys) == 1:  # in a decode step
        self.values[layer, 0] = 0  # block 0 has the prompt's first 16 tokens
    write(self, layer, blocks, offsets, keys, values)


with patch.object(PagedCache, "write", forgetful):
    print(llm.generate([prompt], SamplingParams(max_tokens=16))[0].text)

# %%
lost.reveal(3, "No error, no noise: caches fail silently. So every mode is checked token by token.")

# %% [markdown]
# ## What if: the roofline walk
#
# One decode step on any device. Which of the two dots will a larger batch lift? Then move it.

# %%
from minillm.viz.walk import RooflineWalk

RooflineWalk(here)

# %% [markdown]
# Move the batch to both ends: products with weights climb the slope and reach the flat part. Attention stays where it is, whatever
# the batch: every request reads *its own* cache, so nobody shares. Now pull the context up until attention takes most of
# the step. Then find a batch that does not fit into the device's memory.
#
# ## The loop
#
# All of this is one loop. Find the line that calls the model, and the one where eight requests become one batch.

# %% tags=["nbval-ignore-output"]
show_source("engine.runner.LocalRunner.compute")

# %% tags=["nbval-ignore-output"]
show_source("engine.engine.Engine.schedule")

# %% [markdown]
# ## Your turn
#
# Edit a frame and run its cell: one fact about the smallest case that fails. It runs in a process of its own. With
# `%%exercise 01.kv_cache --here` it runs in this one, and `breakpoint()` stops in it. A hint comes after the first failed
# try and after the third; `solution("01.kv_cache")` shows a solution, any time.
#
# **Bytes** (about 5 minutes). How much memory does a KV cache take?

# %% tags=["exercise"]
# %%exercise 01.kv_bytes

# %% [markdown]
# **Which batch fills the device?** (about 10 minutes). The point where the slope meets the flat part, from two numbers
# of a datasheet.

# %% tags=["exercise"]
# %%exercise 01.enough_batch

# %% [markdown]
# **The KV cache by hand** (about 25 minutes). The frame is right, but it projects every token again at every call. The
# target: each token is projected once.

# %% tags=["exercise"]
# %%exercise 01.kv_cache

# %% [markdown]
# Your `enough_batch` (or, until it is solved, the course's) for three devices:

# %%
from minillm.hardware.devices import find_device

for name in ("T4", "A100 80GB", "H200"):
    device = find_device(name)
    batch_size = enough_batch(device.flops_per_s("float16"), device.bytes_per_s, 2)
    print(f"{name}: from batch {batch_size} on, computing takes as long as reading")

# %% [markdown]
# ## Passport
#
# | mode | what is cut | what is sent | lesson |
# |---|---|---|---|
# | **one device** | nothing | nothing | 01 (you are here) |
# | many copies, nothing shared | the list of questions | nothing | 00, 08 |
#
# > **Out there.** vLLM and SGLang print TTFT, TPOT and ITL in `vllm bench serve` and `sglang.bench_serving`.
# > `--gpu-memory-utilization` decides how much memory is left for the KV cache, `--max-num-seqs` how large the batch may get.
# >
# > **Your devices.** No GPU: as here, float32 on one thread, with a ridge near 3 operations per byte. One GPU or more:
# > the notebook runs on the first, in float32 as here; in half precision, which serving uses, its ridge lies near 200.
# >
# > **Papers.** Williams et al., *Roofline*, 2009 · Pope et al., *Efficiently Scaling Transformer Inference*, 2022 ·
# > Shazeer, *Fast Transformer Decoding*, 2019 (fewer KV heads).

# %%
llm.close()

# %% [markdown]
# **Next:** eight requests started together and waited for the slowest. Real ones come and go when they like. Who may
# join a batch that is already running?
