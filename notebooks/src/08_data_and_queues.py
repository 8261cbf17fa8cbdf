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
# # 08 · Data, and queues
#
# **Two devices, two copies of the model. What is twice as good, and for whom?**
#
# 45 minutes, and about 40 for the exercises · comes after 02 and 05 · needs nothing but this machine
#
# Two questions from before: which of layers, pipeline and tensor gave *one* request its answer sooner? And what was TTFT?
#
# | term | 中文 | in one line |
# |---|---|---|
# | data parallelism | 数据并行 | whole copies of the model serve different requests |
# | replica | 副本 | one such copy, with its own queue and KV cache |
# | router | 路由器 | chooses the replica for each request |
# | utilisation ρ | 利用率 | the share of time in which a server is busy |
# | tail latency, P99 | 尾延迟 | what 99 of 100 requests stay below |

# %% tags=["needed"]
# %load_ext minillm
from minillm import LLM, EngineOptions, SamplingParams

two = LLM(layout="dp=2", dtype="float32")  # two ranks, each with the whole model
prompts = [[(37 * n + 11 * at) % 40_000 for at in range(32)] for n in range(16)]
some = SamplingParams(max_tokens=8, ignore_eos=True)

# %% [markdown]
# Eight people ask. A router hands each to one of the replicas, and from then on these two have nothing to say to each other.
# (A letter on the bars is a batch: requests that go through the model together.)

# %%
from minillm.viz.live import Timeline

two.generate(prompts[:2], SamplingParams(max_tokens=2))  # warm up
live = Timeline(finding="Two replicas, two queues, and not a single message")
shown = display(live, display_id=True)
two.on_span = live.push
two.generate(prompts[:8], some)
two.on_span = None
live.show(two.trace)
shown.update(live)

# %% [markdown]
# ## By hand
#
# Why do requests wait at all, when there is time for all of them? One server; each request takes it 1.0 s. Five come, and it is
# busy for 5.0 of 5.5 s.

# %%
free = 0.0
for name, time in zip("ABCDE", (0.0, 0.4, 2.5, 2.7, 3.0)):
    begin = max(time, free)
    waited = f"waits {begin - time:.1f} s" if begin > time else ""
    print(f"{name} " + " " * round(10 * time) + "·" * round(10 * (begin - time)) + name * 10, waited)
    free = begin + 1.0

# %% [markdown]
# C found nobody, E found two before it. The server had a *pause* of half a second, and it came too early for E: time in which
# nobody asks cannot be saved for later. The busier the server, the fewer pauses are left to catch up in.
#
# ## Guess
#
# Requests come at random, one by one, and each is served equally long: *M/D/1* in the books, for memoryless arrivals,
# deterministic service, one server.

# %%
from minillm.lesson.predict import Predict

longer = Predict("08.wait", "Busy 50 % of the time, then 90 %: how many times longer is the mean wait?",
                 "×", 1, 30)
longer

# %% [markdown]
# ## Run
#
# A real replica, one request at a time, each a short prompt and one token. Requests come on their own clock, whether the
# replica keeps up or not.

# %%
from random import Random

from minillm.load import drive
from minillm.sim.queue import arrivals
from minillm.trace.workload import Arrival
from minillm.viz.queue import Measured, draw_waits

one = LLM(dtype="float32", options=EngineOptions(max_running=1))
drive(one, [Arrival(0.0, 8, 1)] * 5)  # warm up


def measured(rate, count, seed):
    """Waits in service times, and how busy the replica was."""
    times = arrivals(count, rate, Random(seed))
    stretch = count / rate / times[-1]  # so few may come much too fast or too slowly
    lives = drive(one, [Arrival(stretch * time, 8, 1) for time in times]).lives
    length_s = lives[-1].token_s[-1] - lives[0].moments[0][1]
    return Measured(count * service_s / length_s, [life.queue_s / service_s for life in lives])


lives = drive(one, [Arrival(0.0, 8, 1)] * 10).lives
service_s = (lives[-1].token_s[-1] - lives[0].moments[0][1]) / 10
runs = [measured(load / service_s, count, count) for load, count in ((0.5, 20), (0.7, 25), (0.9, 30))]

# %%
from minillm.sim.queue import mean_wait

times = mean_wait(0.9) / mean_wait(0.5)
longer.reveal(
    times,
    "The mean wait is ρ / 2 (1 − ρ) service times: half of one at 50 %, 4.5 at 90 %, no end at 100 %. "
    "(Your guess stands at 90 %, times that half.) The last percent of a machine's time is dear.",
    lambda guess: draw_waits(
        runs, "Utilisation is paid for in the tail",
        f"M/D/1 planned; dots measured, 20 to 30 requests, two standard errors · one replica, "
        f"{service_s * 1e3:.0f} ms a request · SmolLM2-135M float32", guess),
    how="by the formula",
)

# %% [markdown]
# The dots are real, and so is their error: thirty requests, the first of which find an empty queue, say little about a tail. Nobody here was slow. The *same* requests,
# served equally fast, only came when others were there.
#
# ## What is bought
#
# With a second replica more is served. And one answer, when nobody else asks?

# %%
sooner = Predict("08.alone", "Two replicas: how many times sooner is a single answer there?",
                 "×", 0.4, 4)
sooner

# %%
from statistics import median

from minillm.hardware.machine import usable_cores
from minillm.viz.queue import draw_bought

replicas = {"one replica": one.with_options(EngineOptions()), "two": two}


def seconds(llm, count):
    """From the first arrival to the last token; and the tokens."""
    outputs = llm.generate(prompts[:count], some)
    lives = [output.metrics for output in outputs]
    took = max(life.token_s[-1] for life in lives) - min(life.moments[0][1] for life in lives)
    return took, [output.token_ids for output in outputs]


answers = [[seconds(llm, 1)[0] for llm in replicas.values()] for _ in range(5)]  # in turns
answer_s = dict(zip(replicas, map(median, zip(*answers[1:]))))  # the first round warms up
tokens_per_s, tokens = {}, {}
for name, llm in replicas.items():
    rounds = [seconds(llm, 16) for _ in range(3)]  # the first warms up
    tokens[name] = rounds[0][1]
    tokens_per_s[name] = 16 * some.max_tokens / min(took for took, _ in rounds[1:])

# %%
gain = tokens_per_s["two"] / tokens_per_s["one replica"]
sooner.reveal(
    answer_s["one replica"] / answer_s["two"],
    f"Nothing is shared, so nothing gets faster: one replica reads all its weights for one token, as "
    f"before. Sixteen requests get {gain:.1f} times the tokens. Throughput is bought, latency is not.",
    draw_bought(answer_s, tokens_per_s, "Two replicas serve more, not sooner",
                "measured: median of four rounds, and the better of two · one thread a replica, "
                f"{usable_cores()} cores · SmolLM2-135M float32 · 32 tokens in, 8 out"),
)

# %% [markdown]
# **One bigger batch, or two replicas?** Sixteen on one replica share each reading of the weights; eight on each of two read
# twice, so that two replicas give less than twice as much. (And where ranks share a memory bus, as here, less still.) They add a
# second device's speed and memory for KV, and may fail one at a time; they cost a second copy of the weights. (The second
# replica here does not read the file again: it takes the weights from the first one's memory, and what needs no repacking for
# the processor stays there, for both.) And the tokens?

# %%
print("the same tokens:", tokens["one replica"] == tokens["two"])

# %% tags=["nbval-ignore-output"]
read = [instance.loaded[0].bytes_read for instance in two.instances]
together = two.instance.loaded[0].shared_bytes
print(f"read from the file: {read[0] / 1e6:.0f} MB by replica 0, {read[1] / 1e6:.0f} by replica 1")
print(f"in memory that both map: {together / 1e6:.0f} MB, where a Linux host can")

# %% [markdown]
# ## Who gets the next one?
#
# **Round-robin** takes turns. **Least outstanding tokens** counts what each replica still has to read and to give.

# %%
turns = Predict("08.turns", "Long and short prompts alternate. How many times as long do turns take?",
                "×", 0.5, 10)
turns

# %% tags=["needed"]
from minillm.trace.replay import replay
from minillm.viz.timeline import draw_runs

lengths = [160 if n % 2 == 0 else 16 for n in range(10)]
mixed = [[(13 * n + 7 * at) % 40_000 for at in range(length)] for n, length in enumerate(lengths)]
few = SamplingParams(max_tokens=4, ignore_eos=True)
routed = {}
for router in ("round-robin", "least-tokens"):
    llm = two.with_options(router=router)
    routed[router] = replay(llm.record_for_replay(mixed, few))
    llm.close()
took = [run.end_s - run.start_s for run in routed.values()]
finding = f"In turns: {took[0]:.1f} s. By outstanding tokens: {took[1]:.1f} s"
caption = "replayed, one device a replica, like a core of this machine · SmolLM2-135M float32"
picture = draw_runs(routed, finding, caption + " · five prompts of 160 tokens, five of 16, 4 new each")

# %%
turns.reveal(
    took[0] / took[1],
    "Every second prompt is long, and every second one goes to the same replica: it gets all of these.",
    picture,
    how="replayed",
)

# %% [markdown]
# Bad luck? With lengths drawn at random, turns only average out slowly, and the tail is made of those who stood behind two
# long ones. The router is a small state machine: the engine runs it on real ranks, and a simulator, below, on thousands
# of requests.

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("policy.router.LeastTokens")

# %% [markdown]
# ## What if
#
# Which router wins, and when does it not matter? A P99 needs many requests, and has an error even so: the band.

# %%
from minillm.sim.queue import routed_waits
from minillm.trace.metrics import percentile
from minillm.viz.queue import draw_routers
from minillm.viz.whatif import WhatIf
from minillm.viz.words import plain

REQUESTS = 2000


def lengths_of(kind, random):
    if kind == "all 100 tokens":
        return [100] * REQUESTS
    if kind == "long and short in turns":
        return [180 if n % 2 == 0 else 20 for n in range(REQUESTS)]
    return [1000 if random.random() < 0.05 else 53 for _ in range(REQUESTS)]


def draw_what_if(lengths, replicas):
    curves = {"round-robin": [], "least-tokens": []}
    tokens = lengths_of(lengths, Random(0))
    mean = sum(tokens) / REQUESTS
    most = max(sum(tokens[first::replicas]) for first in range(replicas))  # of one replica, in turns
    full = {"round-robin": sum(tokens) / replicas / most, "least-tokens": 1.0}  # from here on no end
    for load in (0.3, 0.5, 0.7, 0.8, 0.9):
        times = arrivals(REQUESTS, load * replicas, Random(1))
        for router in (each for each in curves if load < full[each]):
            waited = routed_waits(times, tokens, router, replicas, 1 / mean)  # in mean service times
            curves[router].append((load, percentile(waited, 99)))
    caption = f"simulated · {REQUESTS} requests, one at a time · {replicas} replicas · {lengths}"
    if full["round-robin"] < 0.8:
        finding = f"From {full['round-robin']:.0%} on, turns give one replica more than it can serve"
        return draw_routers(curves, finding, caption)
    turns, counted = (points[3][1].value for points in curves.values())
    finding = "At 80 % busy it hardly matters who chooses"
    if turns > 1.15 * counted:
        finding = f"At 80 % busy, turns make P99 {plain(turns / counted)} times as long as counting does"
    if counted > 1.15 * turns:
        finding = f"At 80 % busy, counting makes P99 {plain(counted / turns)} times as long as turns do"
    return draw_routers(curves, finding, caption)


WhatIf(draw_what_if, "Which router?", replicas=[2, 4, 8],
       lengths=["1 in 20 is 19 times as long", "all 100 tokens", "long and short in turns"])

# %% [markdown]
# When all requests are equal, turns are right, and with eight replicas even better than counting: our count falls when a
# request ends, and does not know who is nearly done. The more lengths differ, the more counting is worth; and when they differ
# in step with the turns, one replica drowns while another rests. More replicas behind one router help everybody: somebody is
# nearly always free.
#
# ## When all is known beforehand
#
# A list of prompts, and nobody waits for a single one of them: every rank takes its part and works alone. accelerate splits by
# number, and so the long ones may all fall to one.

# %%
from minillm import Ranks
from minillm.parallel.data import split_evenly


def offline(prompts, fair, params):
    """On each rank, with a model of its own: both shares of the prompts, and how long each takes."""
    import time

    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    with state.split_between_processes(list(range(len(prompts)))) as numbers:
        shares = {"by number": numbers, "by length": fair[state.process_index]}
    llm, found = LLM(dtype="float32"), {}
    llm.generate(prompts[:1], SamplingParams(max_tokens=1))  # warm up
    for name, mine in shares.items():
        began = time.monotonic()
        llm.generate([prompts[number] for number in mine], params)
        found[name] = [len(prompts[number]) for number in mine], time.monotonic() - began
    return found


by_size = sorted(mixed, key=len)
with Ranks(2) as ranks:
    parts = ranks.run(offline, by_size, split_evenly([len(prompt) for prompt in by_size], 2), few)
for name in ("by number", "by length"):
    print(name, *(part[name][0] for part in parts))

# %% tags=["nbval-ignore-output"]
for name in ("by number", "by length"):
    print(name, "the ranks take", " and ".join(f"{part[name][1]:.1f} s" for part in parts))

# %% [markdown]
# ## Break it
#
# A replica is killed while both are busy. What becomes of its requests?

# %%
lost = Predict("08.lost", "A replica dies under load. Its requests …",
               choices=("fail, and their users ask again",
                        "start anew elsewhere, and may answer differently",
                        "go on elsewhere, token for token as if nothing had happened",
                        "go on elsewhere, but the first tokens come twice"))
lost

# %% tags=["nbval-ignore-output"]
import os
import signal
import warnings

long = SamplingParams(max_tokens=24, temperature=0.8, seed=7, ignore_eos=True)
expected = [output.token_ids for output in one.with_options(EngineOptions()).generate(prompts[:6], long)]
requests = two.prepare(prompts[:6], long)
two.new_trace()
two.submit(requests)
while len(requests[0].inbox) < 40:
    two.step()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    os.kill(two.instances[1].ranks.pids[0], signal.SIGKILL)
    while two.engine.requests:
        two.step()
replica, error = two.engine.losses[0]
print(f"replica {replica}: {str(error).splitlines()[0]}")

# %%
from minillm.viz.requests import draw_requests

same = [request.token_ids for request in requests] == expected
lost.reveal(
    2 if same else 1,
    "The tokens a request has are known where it was asked, and go along: the other replica reads them "
    "like a prompt, and continues. Noise depends on seed, request and position, so even sampled text is "
    "the same. Replica 0's own requests wait while it reads three more: the long step. Meanwhile "
    "replica 1 is started anew.",
    draw_requests(two.trace, "Three of six lose their replica, wait, and are read again"),
)

# %% [markdown]
# That is why a replica is a *fault domain*. The ranks of a pipeline or of a tensor group die together; replicas do not.
#
# ## Your turn
#
# A hint comes after the first failed try and after the third; `solution("08.router")` shows a solution, any time.
#
# **Waits** (about 5 minutes).

# %% tags=["exercise"]
# %%exercise 08.waits

# %% [markdown]
# **How many replicas?** (about 10 minutes). More than the work itself needs.

# %% tags=["exercise"]
# %%exercise 08.replicas

# %% [markdown]
# **Beat round-robin** (about 25 minutes). The target: the P99 of the course's router, and a tenth more.

# %% tags=["exercise"]
# %%exercise 08.router

# %% [markdown]
# Your `MyRouter` (or, until it is solved, the course's) before two real replicas:

# %%
from minillm.lesson.desk import whose
from minillm.lesson.exercises.lesson_08 import router_of

yours = two.with_options(router=router_of(MyRouter))
routed["MyRouter"] = replay(yours.record_for_replay(mixed, few))
yours.close()
print("the router is", whose(MyRouter))

# %% tags=["nbval-ignore-output"]
for name, run in routed.items():
    print(f"{name:13} {run.end_s - run.start_s:.1f} s")

# %% [markdown]
# ## Passport
#
# | mode | what is cut | what is sent | lesson |
# |---|---|---|---|
# | **data** | the list of requests | nothing | 08 (you are here) |
# | tensor | every layer, by heads and columns | two sums a layer, to all ranks | 07 |
# | pipeline | layers, and the work into micro-batches | hidden states, from stage to stage | 05 |
#
# > **Out there.** vLLM: `--data-parallel-size`, each replica an engine core with its own scheduler, chosen by queue lengths. SGLang:
# > `--dp-size` and its router, whose cache-aware policy is our `prefix-aware`. Here: `python -m minillm serve --layout dp=2
# > --router least-tokens`.
# >
# > **Your devices.** No GPU: processes. Two GPUs or more: `layout="dp=2"` gives each replica its own.
# >
# > **Papers.** Lindley, *The theory of queues with a single server*, 1952 · Dean and Barroso, *The Tail at Scale*, 2013 ·
# > Mitzenmacher, *The Power of Two Choices*, 2001 (two random replicas, the emptier of them: nearly as good).

# %%
two.close()
one.close()

# %% [markdown]
# **Next:** replicas, stages, slices: eight devices can be arranged in ten ways. Which axis goes on which wire?
