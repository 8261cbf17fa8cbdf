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
# # 12 · Infinite-LLM
#
# **One instance is full and makes requests wait; its neighbour's memory is empty. What is that memory worth?**
#
# 40 minutes, and about 40 for the exercises · comes after 08 and 11 · needs 4 GB of free memory
#
# Two questions from before: why does a larger batch give more tokens/s, though each step takes longer? And what travels when keys lie on
# another rank?
#
# | term | 中文 | in one line |
# |---|---|---|
# | debtor | 债务方 | an instance with blocks in another's memory |
# | creditor | 债权方 | an instance that lends its free blocks |
# | instance | 实例 | one copy of the weights, with its own KV cache and requests |
# | rManager | 实例缓存管理器 | keeps an instance's account, and refuses when short |
# | gManager | 全局管理器 | hears heartbeats, plans who lends to whom |
# | heartbeat | 心跳 | "so much is free here": true when it was sent |

# %% tags=["needed"]
# %load_ext minillm
from minillm import LLM, EngineOptions, SamplingParams
from minillm.policy.router import Router


class Towards(Router):
    """All to one instance, as if only its users were awake."""

    instance = 0

    def prefer(self, present, prompt):
        return present[min(Towards.instance, len(present) - 1)]


small = EngineOptions(num_blocks=5)  # 5 blocks of 16 tokens at each instance
lends = EngineOptions(num_blocks=5, borrowing=True)
alone = LLM(layout="dp=2", dtype="float32", options=small, router=Towards)
prompts = [[(37 * n + 11 * at) % 40_000 for at in range(32)] for n in range(5)]  # any tokens will do
answer = SamplingParams(max_tokens=32, ignore_eos=True)

# %% [markdown]
# Five requests of 4 blocks each, all for instance 0, which has 5: the second one starts, and soon has no room. Instance 1 has 5 too, and
# nothing to do.

# %%
from minillm.lesson.predict import Predict

gain = Predict("12.gain", "With borrowing: how many times as many tokens/s?", "×", 0.25, 8)
gain

# %% tags=["nbval-ignore-output"]
import time

two = alone.with_options(lends, router=Towards)
seconds, texts = {}, {}
for name, llm in (("alone", alone), ("with borrowing", two)):
    llm.generate(prompts[:1], SamplingParams(max_tokens=2))  # warm up
    began = time.monotonic()
    texts[name] = [output.token_ids for output in llm.generate(prompts, answer)]
    seconds[name] = time.monotonic() - began
print("the same tokens:", texts["alone"] == texts["with borrowing"])

# %%
gain.reveal(
    seconds["alone"] / seconds["with borrowing"],
    f"{5 * 32 / seconds['alone']:.0f} tokens/s become {5 * 32 / seconds['with borrowing']:.0f}. "
    "Two or three requests run together where one did. A step reads the weights once for all of them, "
    "so it takes little longer: that is the gain. Why not two or three times? In every layer a step "
    "waits for what the other instance says.",
)

# %% [markdown]
# ## Who holds what
#
# Watch it. Once instance 1 has lent four of its five blocks, its own users wake up.

# %%
back = Predict("12.back", "Instance 1 has lent nearly all its blocks, and gets requests of its own. "
               "They …", choices=("wait until instance 0 has finished with them",
                        "start soon: lent blocks are called back", "are refused", "run at instance 0"))
back

# %% tags=["nbval-ignore-output"]
from IPython.display import Image

from minillm.viz.loans import draw_held, draw_lending
from minillm.viz.style import png


def pools():
    beats = [engine.beat for engine in two.engine.engines]
    notes = [f"{beat.running} run, {beat.waiting} wait" if beat else "not heard of" for beat in beats]
    return Image(png(draw_held(two.engine.exchange.held(), 5, notes, f"Blocks in use after {now:.1f} s",
                               "measured, from heartbeats · blocks of 16 tokens")), width=960)


Towards.instance, history, woke, theirs, now = 0, [], {}, [], 0.0
two.submit(two.prepare(prompts, answer))
shown, began, drawn = display(pools(), display_id=True), time.monotonic(), 0.0
while two.engine.requests:
    two.step()
    now = time.monotonic() - began
    held = two.engine.exchange.held()
    history.append((now, held))
    if not woke and held[1].get(0, 0) >= 4:
        woke, Towards.instance = {"two requests come": now}, 1
        theirs = two.prepare(prompts[:2], SamplingParams(max_tokens=8, ignore_eos=True))
        two.submit(theirs)
    if now > drawn + 0.5:
        shown.update(pools())
        drawn = now
waited = max(request.life.ttft_s for request in theirs)

# %%
back.reveal(
    1,
    "The creditor calls; the debtor brings blocks home where it has room, and else starts its youngest "
    f"request again later. Both had their first token after {waited:.1f} s at most. Without that, "
    "nobody would lend.",
    draw_lending(history, 5, woke,
                 "Instance 1 lends what it does not need, and gets it back when it does",
                 "measured, from heartbeats · two processes of this machine · SmolLM2-135M float32"),
)

# %% [markdown]
# ## By hand: what is a loan worth?
#
# Above, an instance borrowed as soon as its own blocks ran out. With `EngineOptions(on_demand=False)` the gManager plans all loans, by a
# model of a step's time: reading the weights, 20 ms, or computing the requests, whichever takes longer; and a little for every token
# in a cache. A debtor runs 4 requests of 1,000 tokens, a creditor 2. With 60 borrowed blocks the debtor could run one more.

# %%
def tokens_per_s(requests, tokens):
    return requests / (max(0.020, requests * 0.0005) + tokens * 1e-7)  # 20 ms for the weights


before = tokens_per_s(4, 4 * 1000) + tokens_per_s(2, 2 * 1000)
moved = 60 * 16  # tokens whose keys the creditor reads from now on
after = tokens_per_s(5, 5 * 1000 - moved) + tokens_per_s(2, 2 * 1000 + moved)
print(f"{before:.0f} tokens/s become {after:.0f}: the weights are read for 5 requests at once")

# %% [markdown]
# ## What it costs
#
# A block moves once. After that each token sends a query to every creditor, and gets an answer.

# %%
once = Predict("12.once", "The queries and answers of how many decoded tokens take as many bytes "
               "as one moved block of 16 tokens?", "tokens", 0.1, 1000)
once

# %%
Towards.instance = 0
long = [(7 * at) % 40_000 for at in range(112)]  # with its answer 128: 8 blocks, and no pool has
try:
    alone.generate([long], SamplingParams(max_tokens=16))
except ValueError as error:
    print("alone:", error)
tokens = two.generate([long], SamplingParams(max_tokens=16, ignore_eos=True))[0].token_ids
spans = two.trace.spans
with LLM(dtype="float32") as one:
    config = one.config
    same = one.generate([long], SamplingParams(max_tokens=16, ignore_eos=True))[0].token_ids == tokens
print("with borrowing: served, the same tokens as one device:", same)

# %%
from minillm.trace.trace import Kind

from minillm.distkv.spread import answer_bytes

moves = [span for span in spans if span.name.startswith("blocks to")]
queries = [span.message_bytes for span in spans if span.kind is Kind.DECODE and span.message_bytes]
block_bytes = 16 * config.kv_numbers_per_token * 4
token_bytes = config.layers * answer_bytes(config.heads, config.head_dim, 4)
moved_blocks = sum(span.message_bytes for span in moves) // block_bytes

# %%
once.reveal(
    block_bytes / token_bytes,
    f"Counted: {moved_blocks} blocks moved, and queries of {queries[-1]:,} bytes a token. With the "
    f"answers {token_bytes:,} bytes, and {block_bytes:,} a block. A loan costs both: each block once, "
    "and this for every token and creditor, however many blocks it holds. Blocks move while a step "
    "computes: in the paper 16 tokens of a request with each step cost no measurable time, and 32 cost "
    "8.6 % of the tokens/s.",
    how="by formula",
)

# %% [markdown]
# ## What if: does it pay?
#
# By formula: whole requests fill an instance's memory, and as many more fit into what it borrows of another's. In each layer queries go out
# and answers come back, while it reads its own keys. (What it costs the creditor is left out.) Find where it stops paying. Do long
# contexts make it better or worse?

# %%
from minillm.distkv.worth import worth_of
from minillm.hardware.devices import find_device, find_link
from minillm.model.shapes import SHAPES
from minillm.viz.whatif import WhatIf
from minillm.viz.worth import draw_worth

NAMES = "NVLink 4", "PCIe 5 x16", "400 Gbit/s", "100 Gbit/s", "25 Gbit/s", "10 Gbit/s", "1 Gbit/s"


def pays(device, model, context, borrowed):
    found, free = find_device(device), int(borrowed.rstrip(" %")) / 100
    dtype = "bfloat16" if "bfloat16" in found.flops else "float16"
    worths = {name: worth_of(SHAPES[model], found, find_link(name), dtype, context, free)
              for name in NAMES}
    return draw_worth(worths, f"by formula · {model} {dtype} on {device} · requests of {context:,} "
                      f"tokens, {borrowed} of another's cache borrowed")


WhatIf(pays, "On which links does borrowing pay?", device=["H100", "A100 80GB", "L4"],
       model=["Llama-3.1-8B", "Llama-2-7B"], context=[8192, 1024, 2048, 4096, 16384],
       borrowed=["90 %", "50 %", "20 %"])

# %% [markdown]
# The longer the context, the more keys are read for each query that travels, and the less the link matters. A debtor may also borrow
# too much: on a slow link a smaller share can pay where a large one does not.
#
# ## The engine's own
#
# The gManager's plan is greedy: smallest batch first, its longest request, to whoever has most room. What it knows is old; so the
# creditor has the last word.

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("policy.planning.GManager.plan")

# %% tags=["nbval-ignore-output"]
show_source("policy.creditor.Creditor.try_move_kvcache")

# %% [markdown]
# ## Break it: the creditor dies
#
# It is killed while it holds blocks of instance 0's requests.

# %%
lost = Predict("12.lost", "What becomes of the requests of instance 0?",
               choices=("all of them fail", "those with blocks there fail",
                        "those with blocks there start again, and end with the same tokens",
                        "nothing: the blocks are copied back first"))
lost

# %% tags=["nbval-ignore-output"]
import os
import signal
import warnings

from minillm.trace.life import Event

requests = two.prepare(prompts[:3], answer)
two.submit(requests)
while two.engine.exchange.held()[1].get(0, 0) < 3:
    two.step()
had = [len(request.token_ids) for request in requests]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    os.kill(two.instances[1].ranks.pids[0], signal.SIGKILL)
    while two.engine.requests:
        two.step()
kept = [request.token_ids for request in requests] == texts["alone"][:3]
again = [sum(what is Event.PREEMPTED for what, _ in request.life.moments) for request in requests]

# %%
lost.reveal(
    2 if kept else 1,
    f"They had {had} tokens, and were started again {again} times; the tokens are those of before: "
    f"{kept}. A part of their keys was gone; prompts and tokens were not. That is a price of loans: "
    "when one instance fails, its debtors feel it too.",
)

# %% [markdown]
# ## Your turn
#
# A hint comes after the first failed try and after the third; `solution("12.grant")` shows a solution, any time.
#
# **Bytes per token** (about 5 minutes).

# %% tags=["exercise"]
# %%exercise 12.wire

# %% [markdown]
# **The creditor's word** (about 10 minutes).

# %% tags=["exercise"]
# %%exercise 12.grant

# %% [markdown]
# **A plan on a stale view** (about 25 minutes).

# %% tags=["exercise"]
# %%exercise 12.borrow

# %% [markdown]
# Your `borrow` (or, until it is solved, the course's) among three real accounts, of which one is fuller than it was said to be:

# %%
from minillm.lesson.desk import whose

free, held = [1, 5, 4], [0, 0, 0]


def ask(creditor, blocks):
    if blocks > free[creditor]:
        return False
    free[creditor] -= blocks
    held[creditor] += blocks
    return True


def give_back(creditor, blocks):
    free[creditor] += blocks
    held[creditor] -= blocks


got = borrow(7, [6, 5, 4], ask, give_back)
print(f"borrow is {whose(borrow)}: all borrowed: {got}, held at {held}")

# %% [markdown]
# ## Passport
#
# | mode | what is cut | what is sent | lesson |
# |---|---|---|---|
# | **borrowing** | a request's KV cache, between instances | blocks once, then queries and answers | 12 (you are here) |
# | context | a sequence's KV cache, by positions | queries to the keys, o, m and l back | 11 |
# | data | requests | nothing | 08 |
#
# > **Out there.** The paper reports 1.35 to 1.73 times the tokens/s of vLLM instances that do not share, more where lengths vary more. Mooncake and
# > LMCache pool KV caches too, mostly to find prefixes again: there keys travel, once.
# >
# > **Your devices.** No GPU: processes, as here. GPUs: `minillm generate --layout dp=2 --borrowing`; blocks go through the host's memory, and
# > all instances are on one host.
# >
# > **Papers.** Lin et al., *Infinite-LLM*, 2024 (version 1 as *DistAttention and Distributed KVCache*; sections 4 and 5).

# %%
two.close()
alone.close()

# %% [markdown]
# **Before you go on:** in one sentence: why can an instance serve more with its neighbour's memory, though it computes no faster?
#
# **Next:** *13 · Prefill and decode apart*: some instances only read prompts, others only decode, and the cache travels between them.
