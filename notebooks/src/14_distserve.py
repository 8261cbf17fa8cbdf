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
# # 14 · DistServe
#
# **I have some GPUs, and two promises to keep: a quick first word, and no stutter. Which GPUs read, which write, and how many for each?**
#
# 45 minutes, and about 40 for the exercises · comes after 07, 08 and 13 · needs 4 GB of free memory
#
# Two questions from before: what do tensor parallel ranks send in each layer (07)? Why does P99 climb long before a server is full (08)?
#
# | term | 中文 | in one line |
# |---|---|---|
# | placement | 部署方案 | which instances there are, and the layout of each |
# | goodput per GPU | 单卡有效吞吐 | requests/s that keep to all goals, for each GPU used |
# | SLO attainment | SLO 达成率 | the share of requests within the goals |
# | intra-, inter-operator | 算子内/算子间并行 | the paper's words for tensor parallel and pipeline |
# | M/D/1 | M/D/1 队列 | random arrivals, equal service times, one server |
# | simulation | 仿真 | the engine's policies, driven by computed step times |

# %% tags=["needed"]
# %load_ext minillm

# %%
from minillm import LLM, EngineOptions, Ranks
from minillm.load import drive
from minillm.trace.workload import Arrival

options = EngineOptions(num_blocks=192, max_running=16)
one = LLM(dtype="float32", options=options)
pair = Ranks(2)
two = LLM(layout="tp=2", dtype="float32", options=options, ranks=pair)

# %% [markdown]
# ## Two phases, two appetites
#
# The same model on one rank, and cut over two (`tp=2`, lesson 07). A prompt of 384 tokens is read; then a single request decodes.

# %%
from minillm.lesson.predict import Predict

step = Predict(
    "14.step", "Two ranks instead of one: how many times as fast is a decode step?", "×", 0.25, 4
)
step

# %% tags=["nbval-ignore-output"]
from statistics import median


def phases(llm):
    """Milliseconds of a prompt, and of a decode step."""
    drive(llm, [Arrival(0.0, 64, 4)])
    lives = [drive(llm, [Arrival(0.0, 384, 12)]).lives[0] for _ in range(3)]
    return median(1e3 * each.ttft_s for each in lives), median(1e3 * each.tpot_s for each in lives)


times = {"1": phases(one), "2": phases(two)}

# %%
from minillm.viz.goodput import draw_phases

HERE = "measured · two processes of this machine, a core each · SmolLM2-135M float32"
gains = [times["1"][n] / times["2"][n] for n in (0, 1)]
step.reveal(
    gains[1],
    f"The prompt is {gains[0]:.2f} times as fast. Each layer ends in two sums over the ranks. For"
    " hundreds of tokens they are small beside the products; a decode step is short, and waits for"
    " each of them.",
    lambda guess: draw_phases(
        times,
        f"Two ranks: prefill {gains[0]:.2f} times as fast, decode {gains[1]:.2f} times",
        HERE,
        guess,
    ),
)

# %% [markdown]
# Below the dotted 2 each rank gives less than it did alone: the first word is bought with throughput. Whether that is worth it depends on
# what was promised, and it need not be the same for both phases.

# %% [markdown]
# ## By hand: who waits behind whom
#
# Prompts come at random, each takes D = 1 s on one device; R come in a second. Two devices can be a pipeline of two stages (a prompt still takes 1 s,
# but the next one begins after 0.5), or two tensor parallel ranks, K times as fast together.

# %%
R, D, K = 0.5, 1.0, 1.5
print(f"one device      {D + R * D**2 / (2 * (1 - R * D)):.2f} s to the first token, on average")
print(f"pipeline        {D + R * D**2 / (4 * (2 - R * D)):.2f} s")
print(f"tensor parallel {D / K + R * D**2 / (2 * K * (K - R * D)):.2f} s")

# %% [markdown]
# At which load does the pipeline win? (The lines are those formulas, DistServe's (1) to (3); the dots are our simulator, which knows none of them.)

# %%
from minillm.sim.surveys import queues
from minillm.viz.goodput import draw_queues
from minillm.viz.whatif import WhatIf


def waits(load, K):
    return draw_queues(queues(K), load, f"formulas (1) to (3), dots simulated · K = {K}")


WhatIf(
    waits,
    "A pipeline, or tensor parallel ranks?",
    load=[0.5, 0.2, 0.8, 1.0, 1.2],
    K=[1.5, 1.3, 1.7, 1.9],
)

# %% [markdown]
# ## A cluster on a laptop
#
# DistServe's authors measured OPT-13B on A100s, and published the fits: a prompt step takes a + b · tokens + c · tokens². With these our
# simulator drives *the engine's own* dispatcher and routers. 300 requests, a few lines:

# %%
from minillm.sim import distserve
from minillm.sim.distserve import Parallelism, Placement, Setting
from minillm.sim.report import SimReport

setting = Setting("OPT-13B")  # TTFT ≤ 0.2 s and TPOT ≤ 0.1 s for 90 % of requests; a chat's lengths
placement = Placement(prefill=Parallelism(tp=2), decode=Parallelism(tp=1))
cluster = distserve.build(placement, setting)
tasks = cluster.serve(distserve.load(setting, rate=6.0, seed=0))
print(SimReport.of(cluster, tasks, setting.slo).as_text())

# %%
best = Predict(
    "14.best",
    "Four GPUs at most, these goals. Which pair serves most requests/s for each GPU it uses?",
    choices=(
        "prefill on 1 GPU, decode on 1",
        "prefill on 2, decode on 1",
        "prefill on 1, decode on 2",
        "prefill on 2, decode on 2",
    ),
)
best

# %%
from minillm.sim.surveys import survey
from minillm.viz.goodput import draw_goodput_map

maps = survey(setting, gpus=4, seeds=2)
best.reveal(
    1,
    "On one GPU a long prompt alone takes most of the 0.2 s: the first promise wants two. Decode"
    " keeps to 0.1 s on one GPU; a second one would make it faster than anybody asked.",
    draw_goodput_map(
        maps.pairs,
        maps.together,
        f"Prefill on 2, decode on 1: {maps.pairs[2, 1]:.1f} requests/s for each GPU",
        "simulated · OPT-13B on A100 80GB, fits of DistServe · TTFT ≤ 200 ms, TPOT ≤ 100 ms for 90"
        " %, mean of 2 seeds",
    ),
    how="simulated",
)

# %% [markdown]
# Look at the grey bars. With the same step times *and* two ranks, instances that do both serve more. Then where does the paper's gain come from?

# %% [markdown]
# ## The paper's figure
#
# It compares with vLLM as it was in 2023, on one GPU: prompts first, its own slower steps. Eight seeds; what the paper says is dotted.

# %%
from minillm.sim.claims import check, find
from minillm.sim.surveys import figure8
from minillm.viz.goodput import draw_attainment
from minillm.viz.style import show

ratio = check(find("distserve-over-vllm"), seeds=8)
show(
    draw_attainment(
        figure8(seeds=8),
        {"DistServe, 2 and 1 GPUs": 1.56},
        f"DistServe over vLLM on one GPU: {ratio.mean:.1f} ± {ratio.deviation:.1f} times the"
        " goodput; the paper: 4.6",
        "simulated · OPT-13B on A100 80GB, fits of DistServe and of its vLLM · TTFT ≤ 250 ms, TPOT"
        " ≤ 100 ms · 300 requests, 8 seeds",
    )
)

# %% [markdown]
# **What the paper does not say.** Its lengths (ShareGPT) are not at hand here; we draw log-normal ones with the same means, so knees move: signs, not
# digits. Its released simulator moves caches in no time and ignores L_m, the number of prompt tokens that fill a GPU. Its curves are
# 100 requests for each GPU: a start, not a steady state. And the baseline does not cut prompts. vLLM's documentation says of splitting that it
# *"does not improve throughput"*: it separates the two promises.

# %% [markdown]
# ## What if: which promise is strict?
#
# Find goals for which *doing both* wins, and others for which it cannot keep up. When does decode want more ranks than prefill?

# %%
from minillm.sim.surveys import asking


def goals(TTFT_ms, TPOT_ms, tokens_in, tokens_out, GPUs):
    found = survey(asking(TTFT_ms, TPOT_ms, tokens_in, tokens_out), gpus=GPUs)
    load = (
        f"{tokens_in} tokens in, {tokens_out} out at the median · TTFT ≤ {TTFT_ms} ms, TPOT ≤"
        f" {TPOT_ms} ms for 90 %"
    )
    return draw_goodput_map(
        found.pairs,
        found.together,
        found.words,
        f"simulated · OPT-13B on A100 80GB · {load} · 100 requests",
    )


WhatIf(
    goals,
    "Which placement?",
    TTFT_ms=[200, 100, 400, 1000, 4000],
    TPOT_ms=[100, 25, 30, 40, 60],
    tokens_in=[800, 100, 1400],
    tokens_out=[145, 20, 400],
    GPUs=[8, 4],
)

# %% [markdown]
# ## The engine's own
#
# The search is a loop of simulations; that is the whole trick. (Where caches cross nodes fast, `place_high` looks at each half by itself.)

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("sim.distserve.place_low")

# %% tags=["nbval-ignore-output"]
show_source("policy.handing.Dispatcher.read")

# %% [markdown]
# ## Simulated, and real
#
# The same dispatcher on two ranks here, one for each phase: first step times are fitted (`minillm calibrate`), then a load is simulated, then it
# really runs.

# %% tags=["nbval-ignore-output"]
from minillm.calibrate import calibrate
from minillm.policy.router import ShortestQueue
from minillm.twin import compare, twin_of

two.close()
pair.close()
apart = LLM(
    layout="prefill=1xtp=1,decode=1xtp=1", dtype="float32", options=options, router=ShortestQueue
)
fit = calibrate(apart, rounds=1, prompts=(32, 128, 384), batches=(1, 4), contexts=(16, 320))
chat = [Arrival(0.6 * n, (40, 200, 90, 300)[n % 4], (24, 10, 16)[n % 3]) for n in range(9)]
print(compare(twin_of(apart, fit).serve(chat), drive(apart, chat).lives))

# %% [markdown]
# ## Break it: a promise that nobody can keep
#
# TTFT ≤ 20 ms: shorter than an empty step on four A100s.

# %%
hopeless = Predict(
    "14.hopeless",
    "What does the search say?",
    choices=(
        "the pair with the most GPUs",
        "a goodput of 0 for all",
        "that it cannot be, and by how much",
        "it searches for ever",
    ),
)
hopeless

# %%
from minillm.trace.metrics import SLO

try:
    distserve.place_low(Setting("OPT-13B", slo=SLO(0.02, 0.1)))
except ValueError as error:
    said = str(error)
hopeless.reveal(
    2, f"“{said}”. A goodput of 0 alone would not tell whether 21 ms would do.", how="simulated"
)

# %% [markdown]
# ## Your turn
#
# A hint comes after the first failed try and after the third; `solution("14.place")` shows a solution, any time.
#
# **Which prompts share a step?** (about 5 minutes).

# %% tags=["exercise"]
# %%exercise 14.batch

# %% [markdown]
# **Pipeline or tensor parallel?** (about 10 minutes).

# %% tags=["exercise"]
# %%exercise 14.means

# %% [markdown]
# **Find the placement** (about 25 minutes). Five loads that you do not see, and 20 simulations for each.

# %% tags=["exercise"]
# %%exercise 14.place

# %% [markdown]
# Your `place` (or, until it is solved, the course's) on this lesson's load, with up to eight GPUs:

# %%
from minillm.lesson.desk import whose
from minillm.sim import distserve
from minillm.sim.distserve import Parallelism, Placement, Setting

setting = Setting("OPT-13B", requests=120)


def simulate(prefill, decode, rate):
    pair_of = Placement(Parallelism(prefill), Parallelism(decode))
    served = distserve.build(pair_of, setting).serve(
        distserve.load(setting, rate * pair_of.gpus, 0)
    )
    return distserve.attainment(served, setting.slo)


print(f"place is {whose(place)}: {place(simulate)}")

# %% [markdown]
# ## Passport
#
# | mode | what is cut | what is sent | lesson |
# |---|---|---|---|
# | **placement by simulation** | GPUs, between the phases | KV cache, once | 14 (you are here) |
# | prefill and decode apart | a request's life, after its first token | its KV cache, once | 13 |
# | tensor | every layer | two sums a layer | 07 |
#
# > **Out there.** vLLM and SGLang leave the placement to you: one command for each kind of instance, with its own `--tensor-parallel-size`. NVIDIA
# > Dynamo's planner adds and removes instances by TTFT and ITL; DistServe searches again when its profiler sees the load change.
# >
# > **Your devices.** No GPU: simulate, as here, or `python -m minillm simulate --system distserve --cluster prefill=1xtp=2,decode=1xtp=1
# > --rate 4`. GPUs: `python -m minillm calibrate` fits yours.
# >
# > **Papers.** Zhong et al., *DistServe*, 2024: section 3 (queues), 4 (the two searches), appendix A (step times).

# %%
apart.close()
one.close()

# %% [markdown]
# **Before you go on:** in one sentence: why does a strict TTFT want other layouts than a strict TPOT?
#
# **Next:** *15 · Splitwise*: the phases want different *machines*, too, and that saves watts.
