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
# # 05 · Pipeline
#
# **Three of four devices always wait. Whose work could they do meanwhile?**
#
# 45 minutes, and about 40 for the exercises · comes after 02 and 04 · needs nothing but this machine
#
# Two questions from before: why did four ranks answer no sooner than one? And why does a decode step for eight requests
# cost hardly more than one for a single request?
#
# | term | 中文 | in one line |
# |---|---|---|
# | pipeline parallelism | 流水线并行 | stages work on different batches at the same time |
# | micro-batch | 微批次 | a part of the work that goes through the stages by itself |
# | bubble | 气泡 | the time in which a stage has nothing to do |
# | in flight | 在途 | begun, and not through all stages yet |
# | replay clock | 重放时钟 | a recorded run, laid out again with one device for each rank |

# %% tags=["needed"]
# %load_ext minillm
from minillm import LLM, EngineOptions, SamplingParams

four = LLM(layout="pp=4", dtype="float32", options=EngineOptions(max_step_tokens=64))
prompts = [[(37 * n + 11 * at) % 40_000 for at in range(64)] for n in range(16)]  # 16 of 64 tokens
read = SamplingParams(max_tokens=1, ignore_eos=True)  # prefill alone

# %% [markdown]
# Eight people ask, A to H. Rank 0 hands A on and begins B. (Four ranks share this machine's cores here, and get in each
# other's way. A clock further down takes that out.)

# %%
from minillm.viz.live import Timeline

four.generate(prompts[:4], read)  # warm up
live = Timeline(finding="Eight prompts follow one another through four ranks")
shown = display(live, display_id=True)
four.on_span = live.push
four.generate(prompts[:8], read)
four.on_span = None
live.show(four.trace.only("compute"))
shown.update(live)

# %% [markdown]
# ## By hand
#
# Three stages, four micro-batches, one unit of time each. A letter is a micro-batch, a dot is a **bubble**.

# %%
def forward(stages, batches):
    letters = "ABCDEFGHIJKLMNOP"[:batches]
    return ["·" * stage + letters + "·" * (stages - 1 - stage) for stage in range(stages)]


for batches in (1, 4):
    rows = forward(3, batches)
    dots = sum(row.count("·") for row in rows)
    print(f"{batches} micro-batches: {dots} of {sum(map(len, rows))} are bubbles", *rows, sep="\n    ")

# %% [markdown]
# ## Draw it
#
# Four equal stages. How does the share of bubbles fall as there are more micro-batches? Drag the dots.

# %%
from minillm.lesson.sketch import Sketch

counts = (1, 2, 4, 8, 16)
bubble = Sketch(
    "05.bubble", "What share of four stages' time is bubble?", counts, "micro-batches", "%", 0, 100
)
bubble

# %% [markdown]
# ## Two clocks
#
# Four ranks share this machine's cores, so its wall clock cannot show four devices. The **replay clock** can. The run is
# recorded with one rank computing at a time, then laid out again: every step takes its own CPU time, and begins when what it
# needs is there.

# %%
from minillm.ranks.speed import measure_link
from minillm.trace.replay import bubble_share, replay
from minillm.viz.style import show
from minillm.viz.timeline import draw_runs

link, here = measure_link(four.instance.ranks), "this machine, one thread a rank"
four.generate(prompts[:8], read)
recorded = four.record_for_replay(prompts[:8], read)
clocks = {"wall clock": four.trace, "replay clock": replay(recorded, link)}
clocks = {name: run.only("compute") for name, run in clocks.items()}
wall_s, replayed_s = (run.end_s - run.start_s for run in clocks.values())
finding = f"{wall_s:.1f} s on the cores of this machine, {replayed_s:.1f} s on four devices like a core"
caption = f"measured, then replayed · {four.instance.ranks.describe()} · SmolLM2-135M float32 · pp=4"
show(draw_runs(clocks, finding, caption + " · 8 prompts of 64 tokens", bubbles=False))

# %% [markdown]
# The same steps in the same order. Only on the replay clock nobody waits for a core. (That the replay tells the truth is
# checked where every rank does have a core of its own: `bench/pipeline.py`.)
#
# ## Run
#
# One to sixteen prompts, a prompt a micro-batch. First the cuts: the LM head takes time too, so that it counts like layers.

# %% tags=["nbval-ignore-output"]
from minillm.parallel.balance import balance, measure_costs

one = LLM(dtype="float32")
costs = measure_costs(one.model, sequences=1, tokens=64)
cuts = balance([costs.layer_s] * 30, 4, costs.embedding_s, costs.head_s)
layout = "pp=" + "+".join(map(str, cuts))
print(f"a layer {costs.layer_s * 1e3:.1f} ms, the LM head {costs.head_s * 1e3:.1f} ms: {layout}")

# %%
four.close()
four = LLM(layout=layout, dtype="float32", options=EngineOptions(max_step_tokens=64))
four.generate(prompts[:4], read)
replayed = [replay(four.record_for_replay(prompts[:count], read), link) for count in counts]

# %%
formula = [100 * (4 - 1) / (count + 4 - 1) for count in counts]
shares = [100 * bubble_share(run) for run in replayed]
bubble.reveal(
    {"(p − 1) / (m + p − 1)": formula, "replayed, this model": shares},
    "p stages, m micro-batches: each stage works for m units of time, and for p − 1 it waits, until its "
    "first micro-batch comes or while the others finish. Real stages are not quite equal, and messages "
    "take time: a larger bubble.",
    f"replayed · {here} · {link.name} · SmolLM2-135M float32 · {layout} · 64-token prompts",
)

# %% [markdown]
# The tokens do not care:

# %%
some = SamplingParams(max_tokens=6, ignore_eos=True)
both = [[output.token_ids for output in llm.generate(prompts[:6], some)] for llm in (one, four)]
print("the same tokens:", both[0] == both[1])

# %% [markdown]
# ## Decoding is different
#
# A prompt can be cut into pieces. A request that decodes has *one* token at a time, and its next one needs all stages. So
# stages are kept busy with **groups** of requests: while group A is in stage 1, group B is in stage 0.
#
# Sixteen requests decode on one device. Two stages now share them, eight in each group.

# %%
from minillm.lesson.predict import Predict

faster = Predict(
    "05.decode", "How many times the tokens per second do the two stages give?", "×", 0.5, 5
)
faster

# %%
from dataclasses import replace
from statistics import median

from minillm.trace.trace import Kind


def decoding(llm, requests):
    """The decode steps of so many requests, replayed."""
    answers = SamplingParams(max_tokens=5, ignore_eos=True)
    short = [prompt[:4] for prompt in (prompts * 2)[:requests]]
    run = replay(llm.record_for_replay(short, answers), link)
    begin = min(span.start_s for span in run.spans if span.kind is Kind.DECODE)
    return replace(run, spans=[span for span in run.only("compute").spans if span.start_s >= begin])


def rate(run):
    """Tokens per second, as they leave the last stage."""
    steps = [span for span in run.spans if span.kind is Kind.DECODE and span.rank == run.ranks[-1]]
    return sum(span.tokens for span in steps) / (steps[-1].end_s - steps[0].start_s)


costs = measure_costs(one.model, sequences=8, tokens=1, context=4)
halves = balance([costs.layer_s] * 30, 2, costs.embedding_s, costs.head_s)
two = LLM(layout=f"pp={halves[0]}+{halves[1]}", dtype="float32")
cases = {"one device, 16 requests": (one, 16), "two stages, 16 requests": (two, 16),
         "one device, 32 requests": (one, 32), "two stages, 32 requests": (two, 32)}
rounds = [{name: decoding(*case) for name, case in cases.items()} for _ in range(4)]
two.close()

# %%
rates = [median(rate(runs[name]) for runs in rounds[1:]) for name in cases]  # the first round warms up
shown = {name: rounds[-1][name] for name in list(cases)[:2]}
faster.reveal(
    rates[1] / rates[0],
    "A stage reads all its weights for a group of eight as it would for sixteen: half the requests, but "
    "not half the time. Two devices have room for twice the requests, though, and with 32 it is "
    f"{rates[3] / rates[0]:.1f} times. (Tokens/s: {rates[0]:.0f}, {rates[1]:.0f}, {rates[3]:.0f}. "
    f"One device with 32, if it has the room for them: {rates[2]:.0f}.)",
    draw_runs(shown, "While group A is in one stage, group B is in the other",
              f"replayed · {here} · {link.name} · SmolLM2-135M float32 · decode steps alone"),
    how="replayed",
)

# %% [markdown]
# ## What if: the cut strip
#
# Drag the cuts, or move them with the arrow keys. The Gantt chart follows. Prefill and decode want different cuts: find both.
# Then take a faster device, and leave the link slow.

# %%
from minillm.hardware.devices import LINKS, find_device
from minillm.parallel.balance import predict_costs
from minillm.trace.programs import pipeline_program
from minillm.viz.timeline import draw_timeline
from minillm.viz.whatif import CutStrip
from minillm.viz.words import plain

works = {"prefill, 8 prompts of 64 tokens": (1, 64, 0), "decode, 4 groups of 16 requests": (16, 1, 64)}
costs = {(work, here): measure_costs(one.model, *shape) for work, shape in works.items()}
for work, shape in works.items():
    for device in ("T4", "A100 80GB", "H100"):
        costs[work, device] = predict_costs(one.config, find_device(device), "float32", *shape)
links = {"as between ranks here": link, **{name: LINKS[name] for name in ("NVLink 4", "1 Gbit/s")}}


def stage_times(sizes, cost):
    """Seconds of each stage, with the embedding on the first and the LM head on the last."""
    times = [size * cost.layer_s for size in sizes]
    times[0] += cost.embedding_s
    times[-1] += cost.head_s
    return times


def draw_cuts(sizes, work, device, link):
    cost, (requests, tokens, _), decodes = costs[work, device], works[work], work.startswith("decode")
    times = stage_times(sizes, cost)
    message = requests * tokens * one.config.hidden_size * 4  # bytes
    program = pipeline_program([[time] * (12 if decodes else 8) for time in times], message,
                               4 if decodes else None, Kind.DECODE if decodes else Kind.PREFILL)
    run = replay(program, links[link])
    best = max(stage_times(balance([cost.layer_s] * 30, 4, cost.embedding_s, cost.head_s), cost))
    slow, least, sent = (plain(each * 1e3) for each in (max(times), best, links[link].time_s(message)))
    bubble = f"{bubble_share(run):.0%} bubble"
    finding = f"{bubble}. Slowest stage {slow} ms (at best {least}), a message {sent} ms"
    clock = "measured layers, replayed" if device == here else "rooflines, replayed"
    return draw_timeline(run.only("compute"), finding,
                         f"{clock} · {device} · {link} · SmolLM2-135M float32 · {work}")


CutStrip(draw_cuts, "Where would you cut?", [8, 8, 7, 7], ("embedding", "LM head"),
         work=list(works), device=[here, "T4", "A100 80GB", "H100"], link=list(links))

# %% [markdown]
# One token for each request goes through the LM head, whether it is decoded or ends a prompt. For a prompt of 64 tokens that
# is little; for a decode step it is as much as many layers. Systems cut once, for both. And the same wire that costs nothing
# here leaves an H100 waiting: a link is slow or fast only beside a device.
#
# ## Unequal prompts
#
# A micro-batch that takes longer holds up all behind it, however many may be in flight (here eight). Chunked prefill (lesson
# 02) cuts long prompts into pieces, and the pieces of *one* prompt follow one another through the stages.

# %%
lengths = (256, 16, 96, 32, 224, 48)
mixed = [[(13 * n + 7 * at) % 40_000 for at in range(length)] for n, length in enumerate(lengths)]
unequal = {}
for name, cut in (("prompts whole", False), ("in pieces of at most 64 tokens", True)):
    llm = four.with_options(EngineOptions(chunked_prefill=cut, max_step_tokens=64, in_flight=8))
    llm.generate(mixed[:1], read)  # warm up
    unequal[name] = replay(llm.record_for_replay(mixed, read), link)
show(draw_runs(unequal, "Equal pieces fill bubbles that unequal prompts leave",
               f"replayed · {here} · SmolLM2 float32 · {layout} · prompts of 16 to 256 tokens"))

# %% [markdown]
# ## The engine's own
#
# Find the line that hands a batch on without waiting. In the loop, find the one that decides how many are in flight.

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("parallel.runner.PipelineRunner.start")

# %% tags=["nbval-ignore-output"]
show_source("engine.engine.Engine.step")

# %% [markdown]
# ## Break it
#
# Two stages that both wait for the other's message first. Which rank is to blame?

# %%
from minillm import Ranks

ranks = Ranks(2, timeout_s=3)

# %% tags=["raises-exception"]
# %%ranks
message = torch.zeros(4)
dist.recv(message, src=1 - rank)
dist.send(torch.ones(4), dst=1 - rank)

# %% [markdown]
# Nobody is: they wait in a circle. A pipeline has one by nature, hidden states go down and tokens come back; it runs because
# rank 0 hands on before it waits.
#
# ## Your turn
#
# A hint comes after the first failed try and after the third; `solution("05.groups")` shows a solution, any time.
#
# **The forward schedule** (about 5 minutes).

# %% tags=["exercise"]
# %%exercise 05.ends

# %% [markdown]
# **The slowest stage** (about 10 minutes). As in lesson 04, but it is time that is balanced.

# %% tags=["exercise"]
# %%exercise 05.sizes

# %% [markdown]
# **Groups that keep stages busy** (about 25 minutes). The target: as fast as the course's groups.

# %% tags=["exercise"]
# %%exercise 05.groups

# %% [markdown]
# ## Passport
#
# | mode | what is cut | what is sent | lesson |
# |---|---|---|---|
# | **pipeline** | layers, and the work into micro-batches | hidden states, from stage to stage | 05 (you are here) |
# | layers over devices | the model, between layers | hidden states, from stage to stage | 04 |
# | continuous batching | time, into steps | nothing | 02 |
#
# > **Out there.** vLLM: `--pipeline-parallel-size`; as many batches are in flight as there are stages. SGLang: `--pp-size`,
# > `--pp-max-micro-batch-size`. TensorRT-LLM: `pp_size`. Torch has `torch.distributed.pipelining`, for training first of all.
# >
# > **Your devices.** No GPU: as here, on the replay clock. Two GPUs or more: a stage on each, on the wall clock.
# >
# > **Papers.** Huang et al., *GPipe*, 2019 (section 2.3: the bubble) · Yu et al., *Orca*, 2022 (section 4.1: pipelined
# > inference) · Agrawal et al., *Sarathi-Serve*, 2024 (equal chunks for pipelines).

# %%
four.close()
one.close()
ranks.close()

# %% [markdown]
# **Next:** a pipeline makes no token come sooner. What if four devices shared every *layer*?
