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
# # 03 · Paged KV cache
#
# **Four requests, and there is no room for a fifth, though most of the memory is empty. Where did it go?**
#
# 45 minutes, and about 40 for the exercises · comes after 01 and 02 · needs nothing but this machine
#
# Two questions from before: how many bytes does one token of SmolLM2 leave in the KV cache? And why does a larger batch
# give more tokens per second?
#
# | term | 中文 | in one line |
# |---|---|---|
# | block | 块 | room for the keys and values of a few tokens, 16 by default |
# | block table | 块表 | the numbers of a sequence's blocks, in order |
# | fragmentation | 碎片 | memory that is held or left over, and that nobody can use |
# | prefix reuse | 前缀复用 | a prompt that begins like an earlier one takes its blocks over |
# | copy-on-write | 写时复制 | blocks are shared until somebody writes |
# | preemption | 抢占 | a running request loses its blocks and starts again later |

# %% tags=["needed"]
# %load_ext minillm
from minillm import LLM, EngineOptions, SamplingParams

llm = LLM(dtype="float32")


def ask(question):
    return llm.tokenizer.chat([{"role": "user", "content": question}])


things = ["river", "planet", "fruit", "metal", "bird", "city", "colour", "tree"]
prompts = [ask(f"Name a {thing}.") for thing in things]

# %% [markdown]
# Eight requests, one cache of 64 blocks. Watch blocks being taken. The slider then stands at the fullest step; pull it either
# way, and point at a block.

# %%
from minillm.viz.blocks import BlockMap, draw_blocks, split, watch

where = f"measured · {llm.device.type.upper()} · SmolLM2-135M float32"
lengths = (24, 18, 22, 20, 25, 19, 21, 23)
answers = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
paged = llm.with_options(EngineOptions(num_blocks=64))
live = BlockMap("Blocks are taken when a token needs one, and given back at the end",
                f"{where} · 64 blocks of 16 tokens · the number is the request")
requests = {"paged": paged.prepare(prompts, answers)}
caches = {"blocks of 16": watch(paged, requests["paged"], live)}

# %% [markdown]
# ## By hand
#
# Room for 24 tokens. Three sequences may each grow to 8, and end at 3, 5 and 2. Dots are places that are held and empty.

# %%
def reserve(ends, longest):
    return " ".join("ABC"[n] * end + "·" * (longest - end) for n, end in enumerate(ends))


def page(ends, size):
    return " ".join("ABC"[n] * end + "·" * (-end % size) for n, end in enumerate(ends))


for rule, places in (("reserved", reserve([3, 5, 2], 8)), ("in blocks of 2", page([3, 5, 2], 2))):
    held = sum(place != " " for place in places)
    print(f"{rule:15} {places:28} {held} places held, {held - places.count('·')} used")

# %% [markdown]
# A **reservation** must be as long as an answer can get, because nobody knows how long it will be. **Blocks** are taken
# when they are needed (PagedAttention, 2023): at most the last one of a sequence is not full.
#
# ## Predict
#
# The cache of our engine once more, 1,024 tokens. But now each request reserves 256 of them before it starts.

# %%
from minillm.lesson.predict import Predict

used = Predict(
    "03.reserved", "At the fullest moment, how much of the held room has a token in it?", "%", 1, 100
)
used

# %% [markdown]
# ## Run
#
# A block of 256 tokens *is* a reservation: one block a request, four in all.

# %%
reserving = llm.with_options(EngineOptions(block_size=256, num_blocks=4))
requests["reserved"] = reserving.prepare(prompts, answers)
cells = watch(reserving, requests["reserved"])
caches = {"reservations of 256": split(cells, 16), **caches}
share = [filled for _, holders, filled in cells if holders]

# %%
used.reveal(
    100 * sum(share) / len(share),
    "Each of the four holds room for 256 tokens and ends with fewer than 70. The other four requests "
    "wait, though most places are empty. In systems of its day, the paper on PagedAttention (2023) "
    "measured 20 to 38 % of the memory kept for KV in use.",
    draw_blocks(caches, "The waste was reserved, not used",
                f"{where} · the same 1,024 places, 8 requests"),
)

# %%
for name, engine in (("reserved", reserving), ("paged", paged)):
    spans = engine.trace.spans
    at_once = max(len(span.request_ids) for span in spans)
    print(f"{name:9} {at_once} requests at a time, {8 - at_once} wait for room; {len(spans)} steps")
tokens = {name: [request.token_ids for request in each] for name, each in requests.items()}
print("the same tokens:", tokens["reserved"] == tokens["paged"])

# %% [markdown]
# The memory saved is batch size: fewer steps for the same tokens. And batch size is throughput, by the curve of lesson 02.
#
# ## The same beginning twice
#
# Every conversation with a product starts with the same instructions. Full blocks never change, so a second
# prompt can use the first one's, if *everything before them* is the same. The key of a block is a hash of its tokens and of
# the key before it.

# %%
RULES = "You are the assistant of a small railway museum. Be brief. " + " ".join(
    f"Rule {n}: if somebody asks about engine {n}, say that it stands in hall {n % 4 + 1}."
    for n in range(12)
)
questions = [RULES + f"\n\nVisitor: where is engine {n}?\n\nAssistant:" for n in (7, 10)]
ids = [llm.tokenizer.encode(question) for question in questions]
alike = next(n for n, (a, b) in enumerate(zip(*ids)) if a != b)
print(f"{len(ids[0])} and {len(ids[1])} tokens; the first {alike} are the same")

# %%
sooner = Predict(
    "03.prefix", "How many times sooner, with reuse, does the second visitor get a word?", "×", 1, 100
)
sooner

# %%
seconds, said = {}, {}
for switch in (False, True):
    engine = llm.with_options(EngineOptions(prefix_reuse=switch))
    for question in questions:
        output = engine.generate([question], SamplingParams(max_tokens=8))[0]
    seconds[switch], said[switch] = output.metrics.ttft_s, output.token_ids
print("the same tokens:", said[True] == said[False])

# %%
sooner.reveal(
    seconds[False] / seconds[True],
    f"{output.metrics.reused_tokens} of {len(output.prompt_token_ids)} tokens, whole blocks, were there "
    "already. The few others still go through all the weights, a step at least: lesson 01. Blocks that "
    "nobody holds are kept until their room is needed; the least recently used go first.",
)

# %% [markdown]
# ## Three answers to one question
#
# With `n=3` the samples *share* the prompt's blocks. Pull the slider: ×3 is held by three. Who writes into a shared block
# gets a copy of it first, and the last holder keeps the original; full blocks stay shared to the end.

# %%
sampling = llm.with_options(EngineOptions(num_blocks=32))
live = BlockMap("Three answers share what they have in common",
                f"{where} · 32 blocks of 16 tokens · ×3: held by three; a number is the sample's")
three = SamplingParams(max_tokens=24, n=3, temperature=0.8, seed=1, ignore_eos=True)
_ = watch(sampling, sampling.prepare([RULES], three), live)

# %% [markdown]
# ## When the room ends
#
# Blocks are promised to nobody, so they can run out in the middle of an answer. Then the request that came last is
# **preempted**: it loses its blocks, waits, and computes them again.

# %%
from minillm.trace.life import Event
from minillm.viz.requests import draw_requests
from minillm.viz.style import show

tight = llm.with_options(EngineOptions(num_blocks=13))
long = SamplingParams(max_tokens=30, ignore_eos=True)
outputs = tight.generate(prompts[:4], long)
lost = sum(event is Event.PREEMPTED for life in tight.trace.lives for event, _ in life.moments)
roomy = llm.generate(prompts[:4], long)
print(f"preemptions: {lost}; the same tokens:",
      [output.token_ids for output in outputs] == [output.token_ids for output in roomy])
show(draw_requests(tight.trace, "Who came last gives its blocks up, waits, and is prefilled again"))

# %% tags=["nbval-ignore-output"]
for name, run in (("13 blocks", tight.trace), ("room for all", llm.trace)):
    print(f"{name:13} {len(run.spans)} steps, {run.end_s - run.start_s:.1f} s, "
          f"longest gap {max(gap for life in run.lives for gap in life.itl_s) * 1e3:.0f} ms")

# %% [markdown]
# ## The engine's own
#
# Find the line of `write` that makes a copy. A block that nobody holds may still be *kept*, to be found by its key: in `take`,
# find the line that gives such a block away, the one that was not used for longest.

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("policy.blocks.BlockTable.write")

# %% tags=["nbval-ignore-output"]
show_source("policy.blocks.BlockPool.take")

# %% [markdown]
# ## Break it
#
# Copy-on-write without the copy: the samples go on writing into one block.

# %%
wrong = Predict("03.no_copy", "What comes out?", choices=(
    "an error", "three right answers", "three times the same answer", "no error: one right, two wrong"))
wrong

# %%
def no_copy(self, start, length):
    while len(self.blocks) < self.pool.blocks_for(length):
        self.blocks.append(self.pool.take())
    return []


# %% tags=["needed"]
from unittest.mock import patch

from minillm.policy.blocks import BlockTable

sampling = llm.with_options(EngineOptions(num_blocks=32))
forks = [ask("Tell me a short story about a fox.")]
three = SamplingParams(max_tokens=24, n=3, temperature=0.8, seed=3, ignore_eos=True)
good = sampling.generate(forks, three)[0]

# %%
with patch.object(BlockTable, "write", no_copy):
    bad = sampling.generate(forks, three)[0]
pairs = list(zip(bad.samples, good.samples))
broken = [mine for mine, theirs in pairs if mine.token_ids != theirs.token_ids]

# %%
wrong.reveal(3, f"{3 - len(broken)} of 3 is right. Where all three write, the words of the last one "
                f"stay, and the others attend to them: “{broken[0].text.strip()}” No error tells.")

# %% [markdown]
# ## What if: another device, longer texts
#
# How many sequences fit at a time? Look for lengths at which a reservation is nearly as good.

# %%
from minillm.hardware.devices import find_device
from minillm.model.shapes import SHAPES
from minillm.viz.room import draw_room
from minillm.viz.whatif import WhatIf

texts = {"chats of 50 to 600 tokens": lambda longest: (50, 120, 300, 600),
         "documents that fill the context": lambda longest: (longest * 9 // 10, longest)}


def draw_what_if(device, model, sequences):
    config = SHAPES[model]
    lengths = texts[sequences](config.max_positions)
    caption = f"computed · {device} · {model} float16 · {sequences} · 90 % of memory used"
    return draw_room(find_device(device), config, "float16", lengths, caption)


WhatIf(draw_what_if, "How many sequences fit beside the weights?", device=["A100 80GB", "T4", "H200"],
       model=["Llama-2-7B", "SmolLM2-135M", "Llama-3.1-8B", "Llama-3.1-70B"], sequences=list(texts))

# %% [markdown]
# Blocks of one token would waste nothing. But tables get long, and kernels read a long run of memory faster than scattered
# tokens (PagedAttention, section 7.2); vLLM takes 16 by default. And a model of 70 billion parameters fits beside no cache on
# any of the three.
#
# ## Your turn
#
# A hint comes after the first failed try and after the third; `solution("03.write")` shows a solution, any time.
#
# **Waste** (about 5 minutes).

# %% tags=["exercise"]
# %%exercise 03.waste

# %% [markdown]
# **What is known of a prompt** (about 10 minutes).

# %% tags=["exercise"]
# %%exercise 03.known_tokens

# %% [markdown]
# **Writing with copies** (about 25 minutes). The frame takes new blocks, and writes into shared ones. The target: not one
# block more than needed.

# %% tags=["exercise"]
# %%exercise 03.write

# %% [markdown]
# Your `write` (or, until it is solved, the course's) in the real engine:

# %%
from minillm.lesson.desk import whose
from minillm.lesson.exercises.lesson_03 import method_of

with patch.object(BlockTable, "write", method_of(write)):
    yours = sampling.generate(forks, three)[0]
same = [mine.token_ids == right.token_ids for mine, right in zip(yours.samples, good.samples)]
print(f"write is {whose(write)}; the same tokens: {all(same)}")

# %% [markdown]
# ## Passport
#
# | mode | what is cut | what is sent | lesson |
# |---|---|---|---|
# | **paged KV cache** | each sequence's cache, into blocks | nothing | 03 (you are here) |
# | continuous batching | time, into steps | nothing | 02 |
# | one device | nothing | nothing | 01 |
#
# > **Out there.** vLLM: `--block-size`, `--enable-prefix-caching`, `--gpu-memory-utilization` (how many blocks there are).
# > SGLang: `--page-size`, RadixAttention keeps prefixes in a tree, `--mem-fraction-static`. Both preempt by recomputation.
# >
# > **Your devices.** No GPU: as here. One GPU or more: the notebook runs on the first; its pool takes most of the free memory.
# >
# > **Papers.** Kwon et al., *Efficient Memory Management for LLM Serving with PagedAttention*, 2023 · Zheng et al.,
# > *SGLang* (RadixAttention), 2024.

# %%
llm.close()

# %% [markdown]
# **Next:** some models do not fit beside *any* cache. What if one device holds only some of the layers?
