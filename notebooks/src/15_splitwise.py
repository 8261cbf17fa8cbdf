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
# # 15 · Splitwise
#
# **The electricity bill is as high as the GPUs' price. If decode only reads memory, why does it need the newest, hungriest machine?**
#
# 45 minutes, and about 40 for the exercises · comes after 01, 08 and 13 · needs 4 GB of free memory
#
# Two questions from before: why does a decode step take as long for 1 request as for 8 (01)? What does a router know of a replica (08)?
#
# | term | 中文 | in one line |
# |---|---|---|
# | phase splitting | 阶段拆分 | the paper's word for prefill and decode apart |
# | JSQ | 最短队列优先 | join the shortest queue, here by prompt tokens that wait |
# | mixed pool | 混合池 | machines that do both for a while, and then go home |
# | power cap | 功耗上限 | a GPU is held below the watts it could draw |
# | TBT | 词元间隔 | time between tokens; this paper's word for TPOT |
# | provisioning | 资源配置 | how many machines of which kind to buy |

# %% tags=["needed"]
# %load_ext minillm

# %%
from dataclasses import replace

from minillm import LLM, EngineOptions
from minillm.load import drive
from minillm.trace.workload import Arrival

options = EngineOptions(num_blocks=192, max_running=16)
roles = LLM(layout="prefill=1xtp=1,decode=1xtp=1", dtype="float32", options=options)
pooled = roles.with_options(replace(options, dispatch="pools"))
pooled.engine.dispatcher.pools.most_pending = 300  # tokens that may wait before others are asked

# %% [markdown]
# ## A burst
#
# One rank reads, one decodes (lesson 13). Six prompts of 160 tokens come at once, and the rank that decodes has nothing to do yet. With
# `dispatch="pools"` it may be borrowed, once more than 300 tokens wait.

# %%
from minillm.lesson.predict import Predict

burst = Predict(
    "15.burst",
    "The last first token: how many times as soon, when the idle rank may be borrowed?",
    "×",
    0.5,
    8,
)
burst

# %% tags=["nbval-ignore-output"]
six = [Arrival(0.01 * n, 160, 8) for n in range(6)]
for llm in (roles, pooled):
    drive(llm, [Arrival(0.0, 48, 3)])  # warm up
traces = {"roles": drive(roles, six), "pools": drive(pooled, six)}
last = {name: max(life.ttft_s for life in trace.lives) for name, trace in traces.items()}

# %%
from minillm.viz.requests import draw_requests

burst.reveal(
    last["roles"] / last["pools"],
    f"{last['roles']:.1f} s with fixed roles, {last['pools']:.1f} s with pools: half of the prompts"
    " are read, and go on, where the others decode. That costs those others gaps, as in lesson 13;"
    " so machines go home when they are idle.",
    draw_requests(
        traces["pools"],
        f"Pools: the last first token after {last['pools']:.1f} s instead of {last['roles']:.1f}",
    ),
)

# %% [markdown]
# ## By hand: tokens for a watt
#
# An H100 computes 3.43 times as fast as an A100, reads memory 1.64 times as fast, and draws 1.75 times the power (the paper's table I). Prefill
# computes, decode reads. What does each machine give for a watt?

# %%
compute, memory, watts = 3.43, 1.64, 1.75
print(f"prefill: an H100 reads  {compute / watts:.2f} times an A100's tokens for a watt, at best")
print(f"decode:  an H100 gives  {memory / watts:.2f} times an A100's tokens for a watt")

# %%
watt = Predict(
    "15.watt",
    "Measured, 32 requests at a time: how many times the decoded tokens of an A100, for a watt, "
    "gives an H100 capped to 70 % of its power?",
    "×",
    0.25,
    4,
)
watt

# %%
from minillm.sim.designs import tokens_per_power
from minillm.viz.watts import draw_watts

per_watt = tokens_per_power()
PUBLISHED = (
    "published measurements of Splitwise · BLOOM-176B on eight GPUs · prompts of 2,048 tokens,"
    " decode batch 32"
)
watt.reveal(
    per_watt["H100, capped"][1],
    f"As it is, an H100 gives only {per_watt['H100'][1]:.2f} times as many: it waits for its"
    " memory, and draws power meanwhile. Capped, decode is as fast as before. (The cap's rows are"
    " no measurements: prompts take exactly 1.3 times as long there.)",
    lambda guess: draw_watts(
        per_watt,
        "For a watt an H100 reads more than an A100, and decodes less: unless it is capped",
        PUBLISHED,
        guess,
    ),
    how="published",
)

# %% [markdown]
# So there are four designs: AA, HH, HA (H100 read, A100 decode) and HHcap (those that decode are capped).
#
# ## The scheduler
#
# It chooses who reads *and* who goes on when a request comes, so that the cache can leave layer by layer. This picture asks the engine's own
# `Pools`. From how many prompts on is somebody borrowed?

# %%
from minillm.policy.handing import Role
from minillm.policy.pools import Pools
from minillm.viz.poolmap import draw_pool_map
from minillm.viz.whatif import WhatIf


def place(prompts, tokens, prompt_machines):
    homes = [Role.PREFILL] * prompt_machines + [Role.DECODE] * 3
    pools = Pools(homes, [70_000] * len(homes))
    for number in range(prompts):
        pools.place(number, tokens, 100)
    some = (
        f"{len(pools.mixed)} of {len(homes)} machines are borrowed"
        if pools.mixed
        else "nobody is borrowed"
    )
    return draw_pool_map(
        pools,
        f"{prompts} prompts of {tokens:,} tokens at once: {some}",
        "the engine's own Pools · orange: home is the prompt pool, blue: the token pool · 8,192"
        " tokens may wait",
    )


WhatIf(
    place,
    "Who does what?",
    prompts=[6, 2, 12, 20, 30, 60],
    tokens=[1500, 500, 4000],
    prompt_machines=[3, 2, 5],
)

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("policy.pools.Pools.place")

# %% [markdown]
# ## What if: which machines?
#
# You may draw the power of eight H100 machines. Nine objectives must hold at once: TTFT, TBT and E2E at P50, P90 and P99, as multiples of what
# an idle A100 machine takes. Who serves 12 requests/s? Then change the load to code, and see what a cluster built for one does with the other.

# %%
from minillm.sim.designs import budgeted, trial
from minillm.viz.watts import draw_objectives

KINDS = {"A100": "A", "H100": "H", "H100 capped": "Hcap", "nobody, all do both": None}


def cluster(requests_per_s, read_by, decoded_by, percent_read, load):
    design = budgeted(KINDS[read_by], KINDS[decoded_by], percent_read / 100)
    tried = trial(
        design, requests_per_s, {"conversation": "azure-conversation", "code": "azure-code"}[load]
    )
    return draw_objectives(
        tried,
        f"simulated · BLOOM-176B, Splitwise's curves · {load}, {requests_per_s} requests/s, 30 s",
    )


WhatIf(
    cluster,
    "Are all nine kept?",
    requests_per_s=[12, 4, 8, 10, 14, 16, 20],
    read_by=["H100", "A100"],
    decoded_by=["A100", "H100", "H100 capped", "nobody, all do both"],
    percent_read=[55, 30, 45, 65, 80],
    load=["conversation", "code"],
)

# %% [markdown]
# ## The paper's figure
#
# How much more than machines that do both, at equal power? Eight seeds were simulated before; one run, of two minutes of conversations, is yours.

# %%
from random import randrange

from minillm.sim.claims import AA, ALL_A, over, recorded
from minillm.viz.style import show
from minillm.viz.watts import draw_claims

known = recorded()
mine = over(AA, ALL_A, seed=randrange(8, 10_000))

# %% tags=["nbval-ignore-output"]
rows = [
    ("AA over all A100", known["splitwise-aa"]),
    ("the same, slower in batches", known["splitwise-aa-by-batch"]),
    ("HA over all H100", known["splitwise-ha"]),
]
show(
    draw_claims(
        rows,
        f"AA serves {known['splitwise-aa'].mean:.2f} times the conversations, or"
        f" {rows[1][1].mean:.2f} times",
        "simulated · BLOOM-176B, Splitwise's curves, 70 A100 or 40 H100 machines · all nine"
        " objectives",
        {"AA over all A100": mine},
    )
)

# %% [markdown]
# **What the paper does not say.** The upper row is its number, found again. But its released simulator looks decode times up where they hardly
# depend on the batch. With the dependence *that its authors measured*, decode machines miss TBT early, and most of the gain is gone: the second
# row. It promises 25 % less power, for no load that it names: we find 14 % for conversations and 44 % for code. Its caches
# move over links of their own, as if nobody else were sending. And prompts are never cut: chunked prefill came later. vLLM's documentation
# says that splitting "does not improve throughput".

# %% [markdown]
# ## Simulated, and real
#
# The burst again: the same `Pools` on our two ranks, and on a simulated twin of them.

# %% tags=["nbval-ignore-output"]
from minillm.calibrate import calibrate
from minillm.twin import compare, twin_of

fit = calibrate(roles, rounds=1, prompts=(32, 128, 320), batches=(1, 4), contexts=(16, 256))
for name, llm in {"roles": roles, "pools": pooled}.items():
    print(f"{name}:\n{compare(twin_of(llm, fit).serve(six), traces[name].lives)}")

# %% [markdown]
# ## Break it: without the mixed pool
#
# Seven of eight H100 machines read: right for code, whose answers are short. Now people come and chat, 10 requests/s, and everybody keeps to
# their role.

# %%
wrong = Predict(
    "15.wrong",
    "Which objectives are missed?",
    choices=(
        "TTFT: prompts wait",
        "TBT: the one that decodes is full",
        "none: there is power enough",
        "all: requests are refused",
    ),
)
wrong

# %%
rigid, mixing = (trial(budgeted("H", "H", 0.88), 10, mixed=mixed) for mixed in (False, True))
wrong.reveal(
    1,
    f"Of nine {rigid.kept} are kept: conversations decode for long, and one machine cannot hold"
    f" them all. With the mixed pool {mixing.kept} of nine are kept, on the same machines. (The"
    " paper reports 7 % less throughput for the wrong load.)",
    draw_objectives(
        rigid,
        "simulated, fixed roles · BLOOM-176B on H100 · conversation, 10 requests/s, 30 s",
    ),
    how="simulated",
)

# %% [markdown]
# ## Your turn
#
# A hint comes after the first failed try and after the third; `solution("15.router")` shows a solution, any time.
#
# **The fewest watts** (about 5 minutes).

# %% tags=["exercise"]
# %%exercise 15.provision

# %% [markdown]
# **Which objectives are missed?** (about 10 minutes).

# %% tags=["exercise"]
# %%exercise 15.missed

# %% [markdown]
# **Beat the shortest queue** (about 25 minutes). Old and new machines together; loads that you do not see.

# %% tags=["exercise"]
# %%exercise 15.router

# %% [markdown]
# Your `MyRouter` (or, until it is solved, the course's): three prompts come at once, to an A100 and an H100.

# %%
from minillm.lesson.desk import whose

router = MyRouter([1.0, 2.1])
print(
    f"MyRouter is {whose(MyRouter)}: machines",
    [router.arrived(number, 2000) for number in range(3)],
)

# %% [markdown]
# ## Passport
#
# | mode | what is cut | what is sent | lesson |
# |---|---|---|---|
# | **pools** | a cluster, into kinds of machines | KV cache, layer by layer | 15 (you are here) |
# | placement by simulation | GPUs, between the phases | KV cache, once | 14 |
# | data | requests | nothing | 08 |
#
# > **Out there.** Splitwise's cache transfer became a pull request to vLLM; vLLM's `--kv-transfer-config` and SGLang's `--disaggregation-mode` let
# > each kind of instance have its own GPUs. `nvidia-smi --power-limit` caps one.
# >
# > **Your devices.** No GPU: `EngineOptions(dispatch="pools")` on processes, as here, and `python -m minillm simulate --system splitwise --cluster
# > prefill=25xH100,decode=26xA100 --rate 100`. With GPUs of two generations: read on the newer one.
# >
# > **Papers.** Patel et al., *Splitwise: Efficient Generative LLM Inference Using Phase Splitting*, 2024: section III (what was measured), IV (the
# > scheduler), VI (designs).

# %%
pooled.close()
roles.close()

# %% [markdown]
# **Before you go on:** in one sentence: why may a machine that decodes be older, or capped, and one that reads not?
#
# **Next:** *16 · TetriInfer*: nobody knows how long an answer will be. Is a rough guess enough?
