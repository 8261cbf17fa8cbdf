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
# # 04 · Layers over devices
#
# **The model fits on none of your devices. What do four of them buy you, and what not?**
#
# 45 minutes, and about 40 for the exercises · comes after 00, 01 and 03 · needs nothing but this machine
#
# Two questions from before: what does a decode step spend its time on? And how does a tensor get from one rank's memory
# into another's?
#
# | term | 中文 | in one line |
# |---|---|---|
# | layer | 层 | attention and MLP; a decoder is a stack of equal ones |
# | hidden states | 隐藏状态 | what goes from layer to layer: a vector for each token |
# | stage | 流水线阶段 | a run of neighbouring layers on one device |
# | model parallelism | 模型并行 | parts of one model on several devices |
# | offloading | 卸载 | weights lie elsewhere, and are fetched when it is their turn |
# | cut | 切分点 | where one stage ends and the next begins |

# %% tags=["needed"]
# %load_ext minillm
from minillm import LLM, EngineOptions, SamplingParams

naive = EngineOptions(in_flight=1)  # one batch under way: lesson 05 changes that
four = LLM(layout="pp=4", dtype="float32", options=naive)
prompt = four.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])

# %% [markdown]
# Four processes hold 8, 8, 7 and 7 of SmolLM2's 30 layers. Each is a rank with a memory of its own. One question goes
# through all of them: watch who works when.

# %%
from minillm.viz.live import Timeline

live = Timeline(finding="One question goes through four ranks")
shown = display(live, display_id=True)
four.on_span = live.push
answer = four.generate([prompt], SamplingParams(max_tokens=7))[0]
four.on_span = None
live.show(four.trace.only("compute"))
shown.update(live)
print(answer.text)

# %% [markdown]
# ## By hand
#
# A model of six layers on three devices. What must be sent from device to device?

# %%
layers = [lambda x, n=n: 3 * x % 11 + n for n in range(6)]
devices = {"A": layers[0:2], "B": layers[2:4], "C": layers[4:6]}

x = 5
for name, stage in devices.items():
    for layer in stage:
        x = layer(x)
    print(f"device {name} has run {len(stage)} layers and sends on: {x}")

# %% [markdown]
# Only `x`. In a real model that is one vector for each token, here 576 numbers; no weights are sent, and no cache: every
# device keeps the keys and values of its own layers.
#
# ## Predict
#
# One device answers a question. Now four share its layers.

# %%
from minillm.lesson.predict import Predict

seconds = Predict(
    "04.seconds", "How many times as long do four take, each with a quarter of the layers?", "×", 0.1, 10
)
seconds

# %% [markdown]
# ## Run
#
# The same engine, the same question, one device and four.

# %% tags=["needed"]
from statistics import median

one = LLM(dtype="float32")
greedy = SamplingParams(max_tokens=24, ignore_eos=True)
tpot, tokens = {}, {}
for name, llm in (("one", one), ("four", four)):
    runs = [llm.generate([prompt], greedy)[0] for _ in range(4)]
    tpot[name] = median(run.metrics.tpot_s for run in runs[1:])
    tokens[name] = runs[0].token_ids
print("the same tokens:", tokens["one"] == tokens["four"])

# %%
from minillm.viz.timeline import draw_timeline

stairs = four.generate([prompt], SamplingParams(max_tokens=4, ignore_eos=True)) and four.trace
seconds.reveal(
    tpot["four"] / tpot["one"],
    "Layer 9 needs what layer 8 gives. However many devices there are, the layers run one after the "
    "other, and handing on takes time too. Speed does not add up.",
    draw_timeline(stairs.only("compute"), "The staircase: whoever is not on a step waits"),
)

# %% [markdown]
# ## What adds up
#
# Memory does. Or does it? Each holds about a quarter of the layers, and so a quarter of the weights?

# %%
fullest = Predict(
    "04.fullest", "How much of all the weights does the fullest of the four hold?", "%", 10, 100
)
fullest

# %%
from minillm.viz.memory import draw_memory

weights = {"one device": one.trace, "four stages": four.trace}
held = [sum(four.trace.peak_bytes(rank).values()) for rank in range(4)]
whole = sum(one.trace.peak_bytes(0).values())
fullest.reveal(
    100 * max(held) / whole,
    "The first stage has the embedding too, a table of 49,152 words, and the last one the LM head. In "
    "SmolLM2 they are the same numbers, and one device needs them once; here both ends hold them. So "
    f"the four hold {sum(held) / 1e6:.0f} MB together, and one device {whole / 1e6:.0f} MB.",
    draw_memory(weights, "Four ranks share the layers; the ends carry more"),
)

# %% [markdown]
# Nothing was read twice for it: a rank reads its own slices of the checkpoint and no more. The layout says how much that
# will be, before anything is loaded.

# %%
from minillm.parallel.shards import Shard

for rank, loaded in enumerate(four.instance.loaded):
    shard = Shard(four.config, four.layout, rank)
    layers = f"layers {shard.layers.start:2}-{shard.layers.stop - 1:2}"
    predicted, held = shard.weight_bytes(4), loaded.weight_bytes
    print(f"rank {rank}: {layers}  predicted {predicted:11,} bytes, holds {held:11,}")

# %% [markdown]
# The KV cache adds up better. A stage caches its own layers only, so the same gigabyte on each device holds nearly four
# times the tokens:

# %%
for name, llm in (("one device", one), ("four stages", four)):
    print(f"{name:11} 1 GiB for the cache on each: {llm.engine.load.num_blocks * 16:6,} tokens")

# %% [markdown]
# ## The engine's own
#
# Find the line that leaves a rank without the other ranks' layers, and the one that decides where a stage's output goes.

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("parallel.pipeline.cut_to_stage")

# %% tags=["nbval-ignore-output"]
show_source("parallel.pipeline.Stage.pass_on")

# %% [markdown]
# ## Break it
#
# A cut off by one: a layer falls between two stages, and nobody runs it. First the layer at the first cut, number 8; then
# the one at the last cut, number 22.

# %%
lost = Predict(
    "04.lost_layer", "What comes out, once without layer 8, once without layer 22?",
    choices=("an error, both times", "noise, both times", "nonsense, and then a fluent answer",
             "the right answer, both times"))
lost

# %%
from minillm.parallel.pipeline import Elsewhere


def without(layer):
    """The answer when one layer is skipped."""
    kept, one.model.layers[layer] = one.model.layers[layer], Elsewhere()
    question = one.tokenizer.chat([{"role": "user", "content": "Why is the sky blue?"}])
    text = one.generate([question], SamplingParams(max_tokens=14))[0].text
    one.model.layers[layer] = kept
    return text.strip()


heard = [without(layer) for layer in (8, 22)]

# %%
lost.reveal(
    2,
    f"Without 8: “{heard[0]}” Without 22: “{heard[1]}” No error tells. Only a comparison with one "
    "device does, token by token; every layout of this course is held to it.",
)

# %% [markdown]
# Try `without(0)`, and others. Which layers can a model do without, at least for a moment?

# %% [markdown]
# ## The other way out: fetch the weights
#
# With one small device there is another way: leave the weights on the disk, and read each layer when it is its turn.
# `accelerate` does it for any model; here for ours, with its weights on this machine's disk.

# %%
fetched = Predict(
    "04.disk", "How many times as long does a token take, fetched from the disk?", "×", 1, 1000
)
fetched

# %% tags=["nbval-ignore-output"]
from tempfile import TemporaryDirectory

from minillm.lesson.offload import offloaded

with TemporaryDirectory() as folder:
    disk = offloaded(one, folder)
    run = disk.generate([prompt], SamplingParams(max_tokens=4, ignore_eos=True))[0]
print("the same tokens:", run.token_ids == tokens["one"][:4])

# %%
disk_s = run.metrics.tpot_s
fetched.reveal(
    disk_s / tpot["one"],
    "Every token needs all the weights, so every token waits for all of them to come: "
    f"{tpot['one'] * 1e3:.0f} ms a token from memory, {tpot['four'] * 1e3:.0f} on four ranks, "
    f"{disk_s * 1e3:.0f} from the disk.",
)

# %% [markdown]
# (On a machine with several GPUs, `accelerate` spreads layers as we do here, with `device_map="auto"`; one process then
# drives them all. And what was just written may still be in the system's memory: a cold disk is slower.)
#
# ## What if: other devices, other models
#
# Layers over devices beside fetching from the host. When is one device enough? When do more stop helping?

# %%
from minillm.hardware.devices import find_device, find_link
from minillm.model.shapes import SHAPES
from minillm.viz.stack import draw_stack
from minillm.viz.whatif import WhatIf


def draw_what_if(device, model, link):
    caption = f"planned by the roofline · {device} · {link} · {model} float16 · host by PCIe 4 x16"
    return draw_stack(find_device(device), find_link(link), find_link("PCIe 4 x16"), SHAPES[model],
                      "float16", caption)


WhatIf(draw_what_if, "How many devices does it take?", device=["A100 80GB", "T4", "H200"],
       model=["Llama-3.1-70B", "Llama-3.1-8B", "SmolLM2-135M"],
       link=["PCIe 4 x16", "NVLink 3", "100 Gbit/s", "1 Gbit/s"])

# %% [markdown]
# For a large model the link hardly matters: a few kilobytes go from stage to stage, and Ethernet will do. That is why layers
# are what one cuts *between machines*. Only a model that is small for its devices spends more on the way than on the work.
#
# ## Your turn
#
# A hint comes after the first failed try and after the third; `solution("04.cut")` shows a solution, any time.
#
# **Even stages** (about 5 minutes).

# %% tags=["exercise"]
# %%exercise 04.even_stages

# %% [markdown]
# **The fullest stage** (about 10 minutes).

# %% tags=["exercise"]
# %%exercise 04.fullest

# %% [markdown]
# **The best cuts** (about 25 minutes). The target: no other cut has a lighter heaviest stage.

# %% tags=["exercise"]
# %%exercise 04.cut

# %% [markdown]
# Your `cut` (or, until it is solved, the course's) divides SmolLM2, and the engine runs so:

# %%
from minillm.lesson.desk import whose

layer, head = 4 * one.config.layer_parameters, 4 * one.config.vocab_size * one.config.hidden_size
sizes = cut([layer] * 30, 4, head, head)
print(f"cut is {whose(cut)}:", sizes)

# %%
four.close()
with LLM(layout="pp=" + "+".join(map(str, sizes)), dtype="float32", options=naive) as best:
    again = best.generate([prompt], greedy)[0].token_ids
    print("the same tokens:", again == tokens["one"])
    bars = {"even numbers of layers": four.trace, "even weights": best.trace}
from minillm.viz.memory import draw_memory
from minillm.viz.style import show

show(draw_memory(bars, "Cut by weight, the fullest stage is lighter"))

# %% [markdown]
# ## Passport
#
# | mode | what is cut | what is sent | lesson |
# |---|---|---|---|
# | **layers over devices** | the model, between layers | hidden states, from stage to stage | 04 (you are here) |
# | paged KV cache | each sequence's cache, into blocks | nothing | 03 |
# | one device | nothing | nothing | 01 |
#
# > **Out there.** accelerate and transformers: `device_map="auto"`, one process for all GPUs. vLLM and SGLang:
# > `--pipeline-parallel-size`, `--pp-size`. llama.cpp: `--split-mode layer`, `--tensor-split`.
# >
# > **Your devices.** No GPU, or one: four processes, as here. Two GPUs or more: `layout="pp=2"` puts a stage on each.
# >
# > **Papers.** Huang et al., *GPipe*, 2019 · Aminabadi et al., *DeepSpeed-Inference*, 2022 · Sheng et al., *FlexGen*, 2023
# > (offloading).

# %%
one.close()

# %% [markdown]
# **Next:** three of four devices always wait. Whose work could they do meanwhile?
