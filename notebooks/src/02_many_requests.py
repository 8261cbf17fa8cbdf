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
# # 02 · Many requests
#
# **Forty people ask one machine at once. How long must each of them wait?**
#
# 45 minutes, and about 40 for the exercises · comes after 01 · needs nothing but this machine
#
# Two questions from before: what does a decode step spend its time on? And which of prefill and decode gets cheaper per
# request when eight run together?
#
# | term | 中文 | in one line |
# |---|---|---|
# | static batching | 静态批处理 | a batch starts together, and the next one waits for its last answer |
# | continuous batching | 连续批处理 | whoever finishes leaves, whoever waits takes the seat, at every step |
# | scheduler | 调度器 | decides which tokens go into the next step |
# | chunked prefill | 分块预填充 | a long prompt is read in pieces, over several steps |
# | token budget | token 预算 | the most tokens that a step may compute |
# | ITL | token 间延迟 | inter-token latency: the gap before each token but the first |

# %% tags=["needed"]
# %load_ext minillm
from minillm import LLM, EngineOptions, SamplingParams

llm = LLM(dtype="float32", options=EngineOptions(max_running=4))  # four seats in the batch


def ask(question):
    return llm.tokenizer.chat([{"role": "user", "content": question}])


# %% [markdown]
# Five people, one machine. Watch who gets a word when.

# %% tags=["needed"]
names = ["Ada", "Ben", "Cleo", "Dov", "Eve"]
things = ["river", "planet", "fruit", "metal", "bird"]
lengths = [SamplingParams(max_tokens=tokens) for tokens in (5, 2, 4, 5, 4)]
stream = llm.stream([ask(f"Name a {thing}.") for thing in things], lengths)
for piece in stream:
    print(f"{names[piece.index]}:{piece.text!r}", end="  ", flush=True)

# %% [markdown]
# Four take turns, token by token. Eve, the fifth, comes as soon as one seat is free: the others are still being served.
#
# ## By hand
#
# Four answers of 2, 5, 1 and 4 tokens, two seats, one token per seat and step. A letter is a token, a dot an empty seat.

# %%
from string import ascii_uppercase


def static(answers, seats):
    rows = [""] * seats
    for begin in range(0, len(answers), seats):
        batch = answers[begin : begin + seats]
        for seat, length in enumerate(batch):
            rows[seat] += ascii_uppercase[begin + seat] * length + "·" * (max(batch) - length)
    return rows


def continuous(answers, seats):
    rows = [""] * seats
    for number, length in enumerate(answers):
        row = min(range(seats), key=lambda seat: len(rows[seat]))
        rows[row] += ascii_uppercase[number] * length
    return rows


for rule in (static, continuous):
    rows = rule([2, 5, 1, 4], 2)
    print(f"{rule.__name__}: {max(map(len, rows))} steps", *rows, sep="\n    ")

# %% [markdown]
# The same twelve tokens, in nine steps or in seven. A **static** batch is as long as its longest answer, and nobody knows
# beforehand which that is. **Continuous** batching (Orca, 2022) decides anew at every step who takes part.
#
# ## Predict
#
# Twelve requests on four seats. Most answers have 3 to 5 tokens; every fourth has 30. (You may count steps with the cell
# above: the answers are `[4, 3, 5, 30] * 3`.)

# %%
from minillm.lesson.predict import Predict

shorter = Predict(
    "02.static", "How many times longer do static batches take than continuous ones?", "×", 0.5, 10
)
shorter

# %% [markdown]
# ## Run
#
# The engine has a switch for it. The tokens must not care.

# %% tags=["needed"]
work = [SamplingParams(max_tokens=tokens, ignore_eos=True) for tokens in (4, 3, 5, 30) * 3]
prompts = [ask(f"Name a {thing}.") for thing in [*things, *things, "city", "tree"]]
runs, tokens = {}, {}
for name, switch in (("static batches", False), ("continuous batching", True)):
    engine = llm.with_options(EngineOptions(max_running=4, continuous=switch))  # the same weights
    engine.generate(prompts[:4], SamplingParams(max_tokens=2))  # warm up
    tokens[name] = [output.token_ids for output in engine.generate(prompts, work)]
    runs[name] = engine.trace
print("the same tokens:", tokens["static batches"] == tokens["continuous batching"])

# %%
from minillm.viz.seats import draw_seats

seconds = [run.end_s - run.start_s for run in runs.values()]
steps = [len(run.spans) for run in runs.values()]
finding = "A seat that falls empty is taken at once, so the same work ends sooner"
shorter.reveal(
    seconds[0] / seconds[1],
    f"Counted in steps it is {steps[0]} against {steps[1]}, {steps[0] / steps[1]:.1f} times. Not all "
    "of it is time saved: a static step with empty seats has fewer rows, and on this CPU is shorter.",
    draw_seats(runs, finding),
)

# %% [markdown]
# ## The price of a larger batch
#
# More seats, then? Lesson 01 has it: a step reads the weights once for everybody. Here is the whole curve of this
# machine: all requests together gain (upwards), each of them loses (to the right). Where the curve bends over, its
# **knee**, more seats begin to add more waiting than tokens.

# %%
from statistics import median

from minillm.viz.curve import Point, draw_curve
from minillm.viz.style import show

engines = {batch: llm.with_options(EngineOptions(max_running=batch)) for batch in (1, 2, 4, 8, 16, 32)}
steps_s = {batch: [] for batch in engines}
for _ in range(3):  # in turns, so that what else the machine does hits all of them
    for batch, engine in engines.items():
        engine.generate([[1, 2, 3, 4]] * batch, SamplingParams(max_tokens=6, ignore_eos=True))
        steps_s[batch] += [span.duration_s for span in engine.trace.spans if span.name == "decode"]
points = [Point(batch, batch / median(steps), median(steps)) for batch, steps in steps_s.items()]
gain, price = points[-1].tokens_per_s / points[0].tokens_per_s, points[-1].tpot_s / points[0].tpot_s
finding = f"32 at a time: {gain:.0f} times the tokens, and each waits {price:.1f} times as long"
caption = f"measured · {llm.device.type.upper()} · SmolLM2-135M float32 · prompts of 4 tokens"
show(draw_curve({"this machine": points}, finding, caption))

# %% [markdown]
# ## A long prompt comes in
#
# Two people read their answers as they come. A third sends a prompt of 600 tokens. The engine reads it in **one** step.

# %%
felt = Predict("02.long_prompt", "What do the first two see while the prompt is being read?",
               choices=("nothing: requests do not touch each other", "every token comes a little later",
                        "one long pause, then on again", "their answers change"))
felt


# %%
def with_long_prompt(**switches):
    """Two answers run; after their sixth token the prompt comes. Returns the trace."""
    engine = llm.with_options(EngineOptions(**switches))
    readers = engine.prepare(prompts[:2], SamplingParams(max_tokens=18, ignore_eos=True))
    late = engine.prepare([[7] * 600], SamplingParams(max_tokens=4, ignore_eos=True))
    engine.new_trace()
    engine.submit(readers)
    while len(readers[0].token_ids) < 6:
        engine.step()
    engine.submit(late)
    while engine.engine.requests:
        engine.step()
    return engine.trace


whole = with_long_prompt(chunked_prefill=False)

# %%
from minillm.viz.requests import draw_requests

felt.reveal(
    2, "Who is in a step waits for all of it, and here everybody is in it.",
    draw_requests(whole, "Read in one step, the prompt makes everybody wait: see the gap between ticks"),
)

# %% [markdown]
# **Chunked prefill** (Sarathi-Serve, 2024) gives each step a budget of tokens: decodes first, then as much of a prompt as
# fits.

# %%
chunked = with_long_prompt(max_step_tokens=96)
show(draw_requests(chunked, "In pieces of 96 tokens, the others go on, more slowly"))

# %% tags=["nbval-ignore-output"]
for name, run in (("whole", whole), ("in pieces", chunked)):
    first, _, late = run.lives
    print(f"{name:10} longest gap {max(first.itl_s) * 1e3:5.0f} ms, TPOT {first.tpot_s * 1e3:4.0f} ms, "
          f"TTFT of the long prompt {late.ttft_s:.1f} s")

# %% [markdown]
# One pause became several short ones, and the prompt itself is read more slowly: its TTFT grew. TPOT, a mean over the whole
# answer, hardly tells the two apart. The longest gap does. That is why latency is measured at its tail, by its worst cases.
#
# ## The loop and the scheduler
#
# Schedule, run, postprocess: the engine is this loop. A runner takes a batch and gives tokens; here it is the model itself.
# In the scheduler, find the line that takes decodes before prompts, and the condition under which nobody new may start.

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("engine.engine.Engine.step")

# %% tags=["nbval-ignore-output"]
show_source("policy.scheduler.Scheduler.schedule")

# %% [markdown]
# The scheduler holds no tensors, no clock and no model. So the picture below is *its* doing too: the same object, driven
# with step times from a roofline in the place of real steps. Such times are a bound: real steps, as in the curve above, take
# longer.
#
# ## What if: another device, other answers
#
# Where does static batching catch up? Where is the knee of an H100? Which model does not fit at all?

# %%
from random import Random

from minillm.hardware.ceilings import measure_ceilings
from minillm.hardware.devices import find_device
from minillm.model.shapes import SHAPES
from minillm.sim.engine import simulate
from minillm.trace.metrics import Report
from minillm.trace.workload import Arrival

here = measure_ceilings(llm.device.type)
devices = {"this machine": (here, "float32"), "T4": (find_device("T4"), "float16"),
           "H100": (find_device("H100"), "float16")}


def draw_what_if(device, model, answers):
    hardware, dtype = devices[device]
    curves = {"continuous": [], "static": []}
    for name, points in curves.items():
        for batch in (1, 4, 16, 64):
            lengths = Random(batch)
            wanted = [lengths.choice(answer_lengths[answers]) for _ in range(2 * batch)]
            arrivals = [Arrival(0.0, 32, tokens) for tokens in wanted]
            options = EngineOptions(max_running=batch, continuous=name == "continuous")
            report = Report.of(simulate(arrivals, SHAPES[model], hardware, dtype, options).lives)
            points.append(Point(batch, report.tokens_per_s, report.latency("tpot", 50).value))
    gains = [a.tokens_per_s / b.tokens_per_s for a, b in zip(curves["continuous"], curves["static"])]
    most = max(range(4), key=gains.__getitem__)
    batch = curves["static"][most].batch
    finding = f"Continuous batching gives up to {gains[most]:.1f} times as many tokens, at batch {batch}"
    if max(gains) < 1.15:
        finding = "Little is won: with answers of one length no seat stays empty"
    caption = f"planned by the roofline · {device} · {model} {dtype} · answers {answers}"
    return draw_curve(curves, finding, caption)


from minillm.viz.whatif import WhatIf

answer_lengths = {"of 4 to 48 tokens": (4, 8, 16, 48), "all of 16 tokens": (16,)}
WhatIf(draw_what_if, "Which curve wins, and where does it bend?", device=list(devices),
       model=["SmolLM2-135M", "Llama-3.1-8B"], answers=list(answer_lengths))

# %% [markdown]
# With answers of one length nothing is left to win. And where computing is the limit, as at batch 64 on this machine, an
# empty seat costs next to nothing: a full batch gives no more tokens per second, and each of them waits longer. Llama-3.1-8B on
# an H100 goes nearly straight up: many times the tokens for almost the same wait.
#
# ## Break it
#
# A plan of your own can rule the engine. This one is greedy: new prompts first, and running answers only when nobody
# waits. Nine people ask.

# %% tags=["needed"]
from minillm.lesson.exercises.lesson_02 import HandScheduler


def served_by(plan, count):
    """All of `count` requests by this plan: tokens, and the trace."""
    engine = llm.with_options(EngineOptions(max_running=9, max_step_tokens=64))
    engine.generate(prompts[:1], SamplingParams(max_tokens=2))  # warm up
    engine.engine.scheduler = HandScheduler(engine.engine.scheduler.pool, engine.options, plan)
    outputs = engine.generate(prompts[:count], SamplingParams(max_tokens=8, ignore_eos=True))
    return [output.token_ids for output in outputs], engine.trace


def prompts_first(running, waiting, budget, seats):
    if waiting and len(running) < seats:
        return [(waiting[0], min(waiting[0].left, budget))]
    return [(request, 1) for request in running if request.left == 1]


right, greedy = served_by(prompts_first, 9)
alone = llm.generate(prompts[:1], SamplingParams(max_tokens=8, ignore_eos=True))[0]
print("the same tokens:", right[0] == alone.token_ids)

# %%
show(draw_requests(greedy, "Prompts first: the first comer's second token waits for everybody's prompt"))

# %% [markdown]
# The tokens are right. A bad schedule never makes wrong answers, only late ones, and no error tells.
#
# ## Your turn
#
# A hint comes after the first failed try and after the third; `solution("02.schedule")` shows a solution, any time.
#
# **Static steps** (about 5 minutes).

# %% tags=["exercise"]
# %%exercise 02.static_steps

# %% [markdown]
# **Seats that a load takes** (about 10 minutes). From Little's law, with steps that get longer the more people sit.

# %% tags=["exercise"]
# %%exercise 02.seats_taken

# %% [markdown]
# **`schedule()`** (about 25 minutes). The frame makes static batches. The targets: no answer ever waits for its next token,
# and the work takes no more steps than the engine's own scheduler needs.

# %% tags=["exercise"]
# %%exercise 02.schedule

# %% [markdown]
# Your `schedule` (or, until it is solved, the course's) rules the engine, on real requests:

# %%
from minillm.lesson.desk import whose
from minillm.viz.requests import draw_requests
from minillm.viz.style import show

yours, trace = served_by(schedule, 9)
print(f"the schedule is {whose(schedule)}; the same tokens: {yours == right}")
show(draw_requests(trace, "Answers go on while new prompts come in"))

# %% tags=["nbval-ignore-output"]
for name, run in (("prompts first", greedy), ("answers go on", trace)):
    gaps = [gap for life in run.lives for gap in life.itl_s]
    print(f"{name:14} longest gap {max(gaps) * 1e3:5.0f} ms, ends after {run.end_s - run.start_s:.1f} s")

# %% [markdown]
# ## Passport
#
# | mode | what is cut | what is sent | lesson |
# |---|---|---|---|
# | **continuous batching** | time, into steps | nothing | 02 (you are here) |
# | one device | nothing | nothing | 01 |
# | many copies, nothing shared | the list of questions | nothing | 00, 08 |
#
# > **Out there.** vLLM: `--max-num-seqs` (seats), `--max-num-batched-tokens` (budget), `--enable-chunked-prefill`,
# > `--scheduling-policy fcfs|priority`. SGLang: `--max-running-requests`, `--chunked-prefill-size`,
# > `--schedule-policy`. Our `python -m minillm bench --requests 32 --rate 2` prints what their benchmarks print.
# >
# > **Your devices.** No GPU: as here. One GPU or more: the notebook runs on the first; its curve bends much later.
# >
# > **Papers.** Yu et al., *Orca*, 2022 (iteration-level scheduling) · Agrawal et al., *Sarathi-Serve*, 2024 (chunked
# > prefill) · Little, *A Proof for the Queuing Formula L = λW*, 1961.

# %%
llm.close()

# %% [markdown]
# **Next:** sixty-four seats need sixty-four caches. How much of that memory is ever used?
