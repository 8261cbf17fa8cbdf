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
# Eight people ask. No rank waits for the first answer before it begins the second: watch the stairs close up.

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

link = measure_link(four.instance.ranks)
four.generate(prompts[:8], read)
recorded = four.record_for_replay(prompts[:8], read)
clocks = {"wall clock": four.trace, "replay clock": replay(recorded, link)}
show(draw_runs(clocks, "Two cores cannot show four devices; the replay clock can",
               "measured and replayed · SmolLM2-135M float32 · pp=4 · 8 prompts of 64 tokens"))

# %% [markdown]
# The same steps in the same order. Only now nobody waits for a core. (That the replay tells the truth is checked where every
# rank does have a core of its own: `bench/pipeline.py`.)
#
# ## Run
#
# One to sixteen prompts, a prompt a micro-batch. First the cuts: the LM head takes time too, so that the last stage gets
# fewer layers.

# %%
from minillm.parallel.balance import balance, measure_costs

one = LLM(dtype="float32")
costs = measure_costs(one.model, sequences=1, tokens=64)
cuts = balance([costs.layer_s] * 30, 4, costs.embedding_s, costs.head_s)
layout = "pp=" + "+".join(map(str, cuts))

# %%
four.close()
four = LLM(layout=layout, dtype="float32", options=EngineOptions(max_step_tokens=64))
four.generate(prompts[:4], read)
replayed = [replay(four.record_for_replay(prompts[:count], read), link) for count in counts]
formula = [100 * (4 - 1) / (count + 4 - 1) for count in counts]
shares = [100 * bubble_share(run) for run in replayed]
bubble.reveal(
    {"(p − 1) / (m + p − 1)": formula, "replayed, this model": shares},
    "Each stage waits p − 1 units, before its first micro-batch comes or after its last one has left, "
    "of m + p − 1 in all. Real stages are not quite equal, and messages take time: a larger bubble.",
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
def decode_rate(llm, requests):
    """Tokens per second of decoding, on the replay clock."""
    answers = SamplingParams(max_tokens=9, ignore_eos=True)
    short = [prompt[:16] for prompt in (prompts * 2)[:requests]]
    llm.generate(short, SamplingParams(max_tokens=2, ignore_eos=True))  # warm up
    run = replay(llm.record_for_replay(short, answers), link)
    steps = [span for span in run.spans if span.kind is Kind.DECODE and span.rank == run.ranks[-1]]
    return sum(span.tokens for span in steps) / (steps[-1].end_s - steps[0].start_s)


from minillm.trace.trace import Kind

costs = measure_costs(one.model, sequences=8, tokens=1, context=16)
halves = balance([costs.layer_s] * 30, 2, costs.embedding_s, costs.head_s)
two = LLM(layout=f"pp={halves[0]}+{halves[1]}", dtype="float32")
rates = {("one device", 16): decode_rate(one, 16), ("two stages", 16): decode_rate(two, 16),
         ("two stages", 32): decode_rate(two, 32)}
two.close()
faster.reveal(
    rates["two stages", 16] / rates["one device", 16],
    "A stage reads all its weights for a group of eight as it would for sixteen: half the requests, but "
    "not half the time. The memory that the split has freed holds twice the requests: with 32 it is "
    f"{rates['two stages', 32] / rates['one device', 16]:.1f} times.",
)

# %% tags=["nbval-ignore-output"]
for (name, requests), rate in rates.items():
    print(f"{name}, {requests} requests: {rate:4.0f} tokens/s, replayed")

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

here = "this machine, one thread a rank"
works = {"prefill, 8 prompts of 64 tokens": (1, 64, 0), "decode, 4 groups of 16 requests": (16, 1, 64)}
costs = {(work, here): measure_costs(one.model, *shape) for work, shape in works.items()}
for work, shape in works.items():
    for device in ("T4", "A100 80GB", "H100"):
        costs[work, device] = predict_costs(one.config, find_device(device), "float32", *shape)
links = {"as between ranks here": link, **{name: LINKS[name] for name in ("NVLink 4", "1 Gbit/s")}}


def draw_cuts(sizes, work, device, link):
    cost, (requests, tokens, _), decodes = costs[work, device], works[work], work.startswith("decode")
    times = [size * cost.layer_s for size in sizes]
    times[0] += cost.embedding_s
    times[-1] += cost.head_s
    message = requests * tokens * one.config.hidden_size * 4  # bytes
    program = pipeline_program([[time] * (12 if decodes else 8) for time in times], message,
                               4 if decodes else None, Kind.DECODE if decodes else Kind.PREFILL)
    run = replay(program, links[link])
    slowest, sent = max(times) * 1e3, links[link].time_s(message) * 1e3
    finding = f"Slowest stage {slowest:.3g} ms, a message {sent:.2g} ms: {bubble_share(run):.0%} bubble"
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
# A micro-batch that takes longer holds up all behind it. Chunked prefill (lesson 02) cuts long prompts into pieces, and the
# pieces of *one* prompt follow one another through the stages.

# %%
lengths = (256, 16, 96, 32, 224, 48)
mixed = [[(13 * n + 7 * at) % 40_000 for at in range(length)] for n, length in enumerate(lengths)]
unequal = {}
for name, cut in (("prompts whole", False), ("in pieces of at most 64 tokens", True)):
    llm = four.with_options(EngineOptions(chunked_prefill=cut, max_step_tokens=64))
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

show_source("parallel.pipeline.PipelineRunner.start")

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
# **Next:** a pipeline makes no single answer faster. What if four devices shared every *layer*?
