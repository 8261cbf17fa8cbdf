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
# # 13 · Prefill and decode apart
#
# **Somebody sends a long prompt, and other people's answers stutter. What if other devices read the prompts?**
#
# 45 minutes, and about 40 for the exercises · comes after 02, 05 and 08 · needs 4 GB of free memory
#
# Two questions from before: why does a long prompt make a decode step long? And what does chunked prefill do about it?
#
# | term | 中文 | in one line |
# |---|---|---|
# | disaggregation | 预填充–解码分离 | some instances only read prompts, others only decode |
# | KV transfer | KV 缓存迁移 | a prompt's keys and values move to where it goes on |
# | TTFT, TPOT | 首词元时间, 每词元时间 | time to the first token; time per token after it |
# | ITL | 词元间延迟 | the gap between two tokens; its tail is what stutters |
# | SLO | 服务等级目标 | what users are promised: TTFT and ITL at most so long |
# | goodput | 有效吞吐 | requests/s that keep to all of that |

# %% tags=["needed"]
# %load_ext minillm
from minillm import LLM, EngineOptions, Ranks
from minillm.load import drive
from minillm.trace.workload import Arrival

pools = [Ranks(1), Ranks(1)]  # two ranks, used in turn by three ways to serve
at_once = EngineOptions(num_blocks=192, max_running=16, chunked_prefill=False)
cut = EngineOptions(num_blocks=192, max_running=16, max_step_tokens=48)
together = LLM(layout="dp=2", dtype="float32", ranks=pools, options=at_once)
apart = LLM(layout="prefill=1xtp=1,decode=1xtp=1", dtype="float32", ranks=pools,
            options=EngineOptions(num_blocks=192, max_running=16))
ways = {"together": together, "in chunks": together.with_options(cut), "apart": apart}

# %% [markdown]
# Two short questions stream their answers. After one second comes a prompt of 400 tokens. Two ranks serve them in three ways:
#
# - *together*: two replicas, as in lesson 08, and each reads a prompt at once;
# - *in chunks*: the same, but a step has at most 48 tokens;
# - *apart*: one instance only reads prompts, the other only decodes (`prefill=1xtp=1,decode=1xtp=1`: how many of each, and the layout of one).

# %%
from minillm.lesson.predict import Predict

gap = Predict("13.gap", "Together, while the long prompt is read: the longest gap (ITL) between "
              "two tokens of a short answer?", "ms", 20, 20_000)
gap

# %% tags=["nbval-ignore-output"]
three = [Arrival(0.0, 16, 40), Arrival(0.05, 16, 40), Arrival(1.0, 400, 4)]
for llm in ways.values():
    drive(llm, [Arrival(0.0, 16, 4), Arrival(0.0, 64, 4)])  # warm up
stutter = {name: drive(llm, three).lives for name, llm in ways.items()}

# %%
from minillm.viz.stutter import draw_stutter, longest_gap

gaps = {}
for name, lives in stutter.items():
    begin, end = longest_gap(lives)
    gaps[name] = 1e3 * (end - begin)
finding = "The longest gap: " + ", ".join(f"{ms:,.0f} ms {name}" for name, ms in gaps.items())
HERE = "measured · two processes of this machine, a core each · SmolLM2-135M float32"
gap.reveal(
    gaps["together"],
    "The whole prompt is read in one step, and the answer that shares the step waits; the other one is "
    "at the other replica. In chunks there are many small gaps, and the prompt takes longer. Apart, no "
    "decode step has a prompt in it.",
    lambda guess: draw_stutter(stutter, finding, HERE, guess and guess / 1e3),
)

# %% [markdown]
# ## By hand
#
# A decode step takes 50 ms, a prompt 400 ms. Cut in 4, each part takes 100 ms, and reads again the keys of the parts before it: 1 + 2 + 3 + 4
# parts of keys instead of 4. Only two things are counted here: the longest gap, and the first token of the long prompt. What would 8 parts
# give?

# %%
step, prompt, parts = 50, 400, 4
print(f"together  gap {step + prompt} ms, first token after {step + prompt} ms")
print(f"in chunks gap {step + prompt // parts} ms, "
      f"first token after {parts * (step + prompt // parts)} ms, "
      f"keys read {parts * (parts + 1) // 2} parts instead of {parts}")
print(f"apart     gap {step} ms, first token after {prompt} ms, and then its keys must move")

# %% [markdown]
# ## Who serves best?
#
# It depends on what was promised. Eleven requests in some four seconds, the same for all three; each dot is one of them.

# %% tags=["nbval-ignore-output"]
from random import Random

dice, traffic, at = Random(4), [], 0.0
for n in range(11):
    traffic.append(Arrival(at, 384, 6) if n % 4 == 2 else Arrival(at, 16, 24))
    at += dice.expovariate(2.2)
traces = {name: drive(llm, traffic) for name, llm in ways.items()}
served = {name: trace.lives for name, trace in traces.items()}

# %% tags=["nbval-ignore-output"]
from minillm.viz.slo_plane import SLOPlane

SLOPlane(served, "The goals decide who serves most", HERE, long=384)

# %% [markdown]
# Each goal of the SLO is at first what six of ten requests keep to, taken by itself; fewer keep to both. Click the three ways, and drag the
# corner. Can you find goals for which *together* is best? For which do you need *apart*? (Few requests on a busy machine: your neighbour's dots lie elsewhere.)

# %% [markdown]
# Apart, a short question can still wait: behind a long prompt, or in the same step with it. Requests 2, 6 and 10 have the long prompts.

# %% tags=["nbval-ignore-output"]
from minillm.viz.requests import draw_requests
from minillm.viz.style import show

show(draw_requests(traces["apart"], "Apart: each request's way, one instance for orange, one for blue"))

# %% [markdown]
# ## What moves
#
# The KV cache of the prompt goes to the other instance: while it is read, *layer by layer*, or *whole*, afterwards. The link is slowed to
# 1 Gbit/s here.

# %%
moved = Predict("13.moved", "A prompt of 400 tokens, SmolLM2 in float32: how many MB of keys and "
                "values?", "MB", 0.1, 1000)
moved

# %% tags=["nbval-ignore-output"]
from dataclasses import replace

slow = {f"{way}": apart.with_options(replace(apart.options, kv_transfer=way, link_gbits=1.0))
        for way in ("whole", "layer")}
for llm in slow.values():
    drive(llm, [Arrival(0.0, 64, 2)])
runs = {name: drive(llm, [Arrival(0.0, 400, 6)]) for name, llm in slow.items()}
sent = {name: sum(span.message_bytes for span in run.spans if span.name == "KV cache")
        for name, run in runs.items()}

# %%
from minillm.viz.moves import draw_moves, waits_of

seen = {name: 1e3 * (began - first) for name, (first, began) in
        ((name, waits_of(run)) for name, run in runs.items())}
moved.reveal(
    sent["layer"] / 1e6,
    f"{400 // 16} blocks of 16 tokens, in 30 layers, K and V of 3 heads of 64 numbers of 4 bytes. "
    f"Decode begins {seen['whole']:.0f} ms after the first token when the whole cache moves then, and "
    f"{seen['layer']:.0f} ms after it layer by layer: that left while the prompt was read.",
    draw_moves(runs, f"Decode waits {seen['whole']:.0f} ms, or {seen['layer']:.0f} ms",
               HERE + " · link slowed to 1 Gbit/s"),
    how="counted",
)

# %% [markdown]
# ## What if: link and device
#
# A faster device reads the prompt sooner, and leaves less time to hide behind. From which link on is *layer by layer* hidden, that is, shorter
# than a decode step of 16 requests? For which prompts can even *whole* be? (Chunks have 512 tokens: a prompt of one chunk moves as it does whole.)

# %%
from minillm.disagg.sizing import Demand, rates_of
from minillm.hardware.devices import find_device
from minillm.model.shapes import SHAPES
from minillm.viz.sizing import draw_ratio, draw_stall
from minillm.viz.whatif import WhatIf

def stall(Gbit_per_s, device, model, prompt_tokens):
    return draw_stall(SHAPES[model], find_device(device), "bfloat16", prompt_tokens, Gbit_per_s,
                      f"by formula · {model} bfloat16 on {device} · {prompt_tokens:,} tokens")


WhatIf(stall, "When is the move hidden?", Gbit_per_s=[100, 1, 10, 25, 50, 200, 300],
       device=["H100", "A100 80GB", "L4"], model=["Llama-3.1-8B", "Llama-2-7B"],
       prompt_tokens=[4096, 512, 2048, 16384])

# %% [markdown]
# ## What if: how many of each?
#
# Eight instances of one H100, Llama-3.1-8B, 2,048 tokens in and 256 out. Some read, the others decode; or all do both, and then steps have
# prompts in them.

# %%
loose = Predict("13.loose", "TPOT may be 100 ms: how many times the requests/s of all doing both does "
                "the best split serve?", "×", 0.25, 4)
loose

# %%
def rates_for(tpot_goal_ms, tokens_in=2048, tokens_out=256, model="Llama-3.1-8B"):
    demand = Demand(tokens_in, tokens_out, tpot_goal_ms / 1e3)
    return rates_of(SHAPES[model], find_device("H100"), "bfloat16", demand)


def gain(rates):
    return rates.split(rates.best(8), 8 - rates.best(8)) / (8 * rates.both)


loose.reveal(
    gain(rates_for(100)),
    "Splitting adds no throughput: no step gets faster by it, and vLLM's documentation says so, too. "
    "What gets through is what the slower kind lets through. It can add goodput, where the goal is "
    f"strict: at 10 ms it is {gain(rates_for(10)):.2f} times, since who reads prompts in between must "
    "keep batches small.",
    how="by formula",
)

# %% [markdown]
# Long prompts with short answers want readers, long answers want decoders. How strict must the goal be before splitting wins?

# %%
def split(TPOT_goal_ms, tokens_in, tokens_out, model):
    rates = rates_for(TPOT_goal_ms, tokens_in, tokens_out, model)
    load = f"{tokens_in:,} tokens in, {tokens_out:,} out, TPOT ≤ {TPOT_goal_ms} ms"
    batches = f"decode batch {rates.batch} apart, {rates.both_batch} together"
    return draw_ratio(rates, 8, f"by formula · {model} bfloat16 on 8 × H100 · {load} · {batches}")


WhatIf(split, "How should the eight be split?", TPOT_goal_ms=[30, 10, 15, 100],
       tokens_in=[2048, 128, 512, 8192], tokens_out=[256, 16, 128, 1024],
       model=["Llama-3.1-8B", "Llama-2-7B"])

# %% [markdown]
# A ratio that was right in the morning is wrong in the evening. So instances can change roles while they serve: with
# `prefill=2xtp=1,decode=1xtp=1`, `llm.engine.flip(1, Role.DECODE)` (`Role` is in `minillm.policy.handing`) lets instance 1 finish what it has, and
# then decode; no weights are read. The last instance of a role keeps it.

# %% [markdown]
# ## The engine's own
#
# The two layouts determine which rank holds what, and therefore which sends what. (Context parallel ranks, lesson 11, hold every so many-th block.)

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("disagg.routes.Route")

# %% [markdown]
# And prefill may forget a request only when two things are true: its prompt has been read, and its cache is where it goes on.

# %% tags=["nbval-ignore-output"]
show_source("policy.handing.Dispatcher.free")

# %% [markdown]
# ## Break it: decode does not wait
#
# Of the cache the last ten of thirty layers get lost on the way, and nobody tells decode.

# %%
early = Predict("13.early", "What comes out?",
                choices=("an error: keys are missing", "the right text: 20 of 30 layers suffice",
                         "the right first token, and then something else",
                         "nothing: decode waits for ever"))
early

# %%
from minillm import SamplingParams


def forget(layers):
    """On the rank that decodes: from now on the last layers of what comes are not written."""
    from minillm.disagg.receiver import Receiver

    if not layers:
        Receiver._write = Receiver.kept
        return
    Receiver.kept = Receiver._write

    def write(self, route, layer, blocks, came):
        there = max(0, min(came.shape[1], 30 - layers - layer))
        Receiver.kept(self, route, layer, blocks, came[:, :there])

    Receiver._write = write


question = [{"role": "user", "content": "What is the capital of France?"}]
right = apart.chat(question, SamplingParams(max_tokens=16)).text
_ = pools[1].run(forget, 10)
empty = apart.with_options()  # its own engine, in whose blocks nothing has been yet
wrong = empty.chat(question, SamplingParams(max_tokens=16)).text.replace("\ufffd", "")
_ = pools[1].run(forget, 0)

# %%
early.reveal(
    2,
    f"All layers: “{right}” Without ten: “{wrong}” The first token comes from the instance that "
    "read the prompt. Nobody notices that the rest is wrong: a cache has no checksum. So the receiver "
    "counts what comes, and decode waits for all of it.",
)

# %% [markdown]
# ## Your turn
#
# A hint comes after the first failed try and after the third; `solution("13.plan")` shows a solution, any time.
#
# **How many readers?** (about 5 minutes).

# %% tags=["exercise"]
# %%exercise 13.share

# %% [markdown]
# **What decode may pull** (about 10 minutes).

# %% tags=["exercise"]
# %%exercise 13.pull

# %% [markdown]
# **A transfer plan, tp=2 → pp=2** (about 25 minutes).

# %% tags=["exercise"]
# %%exercise 13.plan

# %% [markdown]
# Your `plan` (or, until it is solved, the course's) for SmolLM2, which has 3 KV heads: from tp=2 to pp=2.

# %%
from minillm.lesson.desk import whose

sends = plan([((0, 30), (0, 2)), ((0, 30), (2, 3))], [((0, 15), (0, 3)), ((15, 30), (0, 3))])
print(f"plan is {whose(plan)}:")
print(*sends, sep="\n")

# %% [markdown]
# ## Passport
#
# | mode | what is cut | what is sent | lesson |
# |---|---|---|---|
# | **prefill and decode apart** | a request's life, after its first token | its KV cache, once | 13 (you are here) |
# | borrowing | a request's KV cache, between instances | blocks once, then queries and answers | 12 |
# | data | requests | nothing | 08 |
#
# > **Out there.** vLLM: `--kv-transfer-config` with a connector (NIXL, Mooncake, LMCache); its documentation says that it "does not improve
# > throughput". SGLang: `--disaggregation-mode prefill` and `decode`. NVIDIA Dynamo sends only long prompts away.
# >
# > **Your devices.** No GPU: processes, as here. GPUs: `minillm serve --layout prefill=1xtp=2,decode=1xtp=2`; caches go through the host's
# > memory, and all instances are on one host.
# >
# > **Papers.** Zhong et al., *DistServe*, 2024 (sections 3 and 4) · Patel et al., *Splitwise*, 2024 (section 4) · Agrawal et al., *Sarathi-Serve*,
# > 2024: chunked prefill.

# %%
apart.close()
together.close()
for pool in pools:
    pool.close()

# %% [markdown]
# **Before you go on:** in one sentence: what does splitting buy, and what does it not?
#
# **Next:** *14 · DistServe*: each phase wants its own layout, and the ratio is found by simulation.
