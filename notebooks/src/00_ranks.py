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
# # 00 · Ranks
#
# **Four processes run one program. What does each of them know, and what happens when they disagree?**
#
# 45 minutes, and about 40 for the exercises · needs nothing but this machine · comes before every other lesson
#
# | term | 中文 | in one line |
# |---|---|---|
# | rank | 进程编号 | one process of a job, with its number: 0, 1, 2, … |
# | world size | 进程总数 | how many ranks a job has |
# | point-to-point | 点对点通信 | one rank sends, one receives |
# | collective | 集合通信 | an operation that all ranks of a group enter together |
# | deadlock | 死锁 | ranks wait for one another, and nobody can go on |

# %% [markdown]
# A model that is too large or too slow for one device runs on several. Each device is driven by a process of its own, a
# **rank**. On a server with eight GPUs there are eight. Here they are four processes on this machine: on its GPUs if it
# has them, else on its CPU cores. The code is the same.

# %% tags=["needed"]
# %load_ext minillm
from minillm import Ranks

ranks = Ranks(4)

# %% [markdown]
# The first line of the next cell, `%%ranks`, runs the cell on every rank instead of here. Every rank runs the *same*
# lines. Only its number differs.

# %%
# %%ranks
print(f"hello, I am rank {rank} of {world_size}")

# %% [markdown]
# ## Each rank has its own memory
#
# Let every rank make a tensor called `x`. Cells share a namespace *within* a rank, so the next `%%ranks` cell finds it
# there again.

# %%
# %%ranks
x = torch.full((2,), float(rank), device=device)

# %%
# %%ranks
x.tolist()

# %% [markdown]
# (Every `%%ranks` cell knows `rank`, `world_size`, `device`, `torch` and `dist` from the start; the notebook's own
# variables stay here.) Four different values under one name: four memories. Is one of them here, in the notebook?

# %%
"x" in globals()

# %% [markdown]
# No. No rank can read another's `x`, and neither can this notebook. What another rank should know must be **sent**.
# All of distributed inference follows from this one fact: who holds what, and what must be sent when.
#
# ## Send one tensor round a ring
#
# Rank 0 starts with 0. Each rank receives the number from its left neighbour, adds its own number, and sends it on to
# the right. Guess before you run it: make a choice, and fix it.

# %%
from minillm.lesson.predict import Predict

ring_guess = Predict("00.ring", "Which number comes back to rank 0?", choices=("0", "3", "4", "6"))
ring_guess

# %%
import time

import torch
import torch.distributed as dist

from minillm import context
from minillm.viz.ring import RingView


def go_round():
    here = context()
    left, right = (here.rank - 1) % here.world_size, (here.rank + 1) % here.world_size
    number = torch.zeros(1)
    if here.rank > 0:
        dist.recv(number, src=left)
    number += here.rank
    here.emit(f"{number.item():g}")  # tell the picture
    time.sleep(0.4)  # slow enough to watch
    dist.send(number, dst=right)
    if here.rank == 0:
        dist.recv(number, src=left)
        here.emit(f"{number.item():g}")
    return number.item()


ring = RingView(4)
display(ring)
held = ranks.run(go_round, on_event=ring.on_event)

# %%
ring_guess.reveal(3, "0 + 1 + 2 + 3 = 6. Nobody ever saw all four numbers, and yet the sum is right.")

# %% [markdown]
# `ranks.run(function)` sends a function to every rank and returns what each returned, in rank order. A **send** needs a
# matching **recv**: rank 0 must send *before* it receives, or the number would never start. What does each rank hold now?

# %%
held

# %% [markdown]
# ## The same with a collective
#
# Rank 3 completed the sum and rank 0 got it back, but ranks 1 and 2 know only a part. When *every* rank needs the sum, one line does it. `all_reduce` adds the tensors of all ranks and leaves the
# result on each. All ranks must call it.

# %%
# %%ranks
x = torch.full((1,), float(rank), device=device)
dist.all_reduce(x)
x.item()

# %% [markdown]
# ## They disagree, on purpose
#
# A collective is a meeting. It starts when the last rank has come. Let rank 2 stay away.
#
# %%
stay_away = Predict(
    "00.stay_away", "Rank 2 stays away from the all_reduce. What will you see?",
    choices=(
        "a sum without rank 2's number",
        "rank 2 reports an error of its own",
        "nothing, for a long time",
        "a report that blames rank 2",
    ),
)
stay_away

# %% tags=["raises-exception"]
# %%ranks
x = torch.full((1,), float(rank), device=device)
if rank != 2:
    dist.all_reduce(x)

# %%
stay_away.reveal(
    3,
    "In a plain torch program you would see nothing for up to half an hour, then a time-out on ranks "
    "that did nothing wrong. Here every rank notes on a board, before it waits, what it waits for.",
)

# %% [markdown]
# Read the error from the top: who is to blame, then where each rank stood. The ranks that wait are not the ones that made the
# mistake: 0, 1 and 3 are in the meeting, rank 2 has gone home. The same error as a picture:

# %%
from minillm.viz.style import show
from minillm.viz.waiting import draw_waiting

show(draw_waiting(ranks.last_error))

# %% [markdown]
# These ranks cannot go on: three of them would wait for ever. So they are ended, and the next call starts four new ones.
# What they held in memory is gone. Is `x` still there? (The stop button ends ranks in the same way, when a cell of yours
# runs too long.)

# %%
# %%ranks
"x" in globals()

# %% [markdown]
# ## Break it yourself: the ring that never starts
#
# This ring looks fair: everybody receives from the left, then sends to the right. Run it, and find in the picture why
# it cannot work.

# %% tags=["raises-exception"]
# %%ranks
number = torch.zeros(1)
dist.recv(number, src=(rank - 1) % world_size)
dist.send(number + rank, dst=(rank + 1) % world_size)

# %%
show(draw_waiting(ranks.last_error))

# %% [markdown]
# Everyone waits for someone who waits. No rank is wrong by itself; the *order* is.
#
# ## What if
#
# This picture draws an all-reduce as the messages it could be made of: everything goes to rank 0, the sum comes back.
# (They run on *toy ranks*: threads of this notebook that take turns.) Take more ranks. Then let one stay away, and see
# how far the others get.

# %%
from minillm.ranks.toy import run_toy
from minillm.viz.messages import draw_messages
from minillm.viz.whatif import WhatIf


def meeting(ranks, who_stays_away):
    def job(comm, number):
        if f"rank {comm.rank}" == who_stays_away:
            return number
        return comm.all_reduce(torch.tensor([number])).item()

    if who_stays_away != "nobody" and int(who_stays_away[5:]) >= ranks:
        raise ValueError(f"there is no {who_stays_away} among {ranks} ranks: take more ranks")
    run = run_toy(job, [float(rank) for rank in range(ranks)])
    if run.ended:
        return draw_messages(run, "Two messages for every rank but the first")
    return draw_messages(run, "One stays away, and nobody gets the sum of all")


WhatIf(
    meeting, "An all-reduce as messages: how many, and what if one rank stays away?",
    ranks=[4, 5, 6, 7, 8, 2, 3], who_stays_away=["nobody", "rank 0", "rank 1", "rank 2", "rank 3"],
)

# %% [markdown]
# Rank 0 has the most work, and the others wait for it in turn. Lesson 06 has a fairer way. What the engine itself calls
# is this. Find the line that *notes* the operation on this rank's board before it waits (`enter`), and the one after:

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("ranks.comm.Comm._run")

# %% [markdown]
# ## Four ranks, four questions, one real model each
#
# Now something worth several processes. Every rank loads a language model, SmolLM2 with 135 million parameters, and
# answers a question of its own. The ranks need not talk at all.

# %%
from minillm import LLM, SamplingParams

QUESTIONS = [
    "What is the capital of France?",
    "What is the capital of Japan?",
    "What is the largest ocean on Earth?",
    "What is the chemical symbol for water?",
]


def answer(questions):
    llm = LLM()
    output = llm.chat(questions[context().rank], SamplingParams(max_tokens=32))
    weights = sum(parameter.nbytes for parameter in llm.model.parameters())
    return output.text, weights, llm.trace


answers = ranks.run(answer, QUESTIONS)
for number, (text, _, _) in enumerate(answers):
    print(f"rank {number}: {text}")

# %% [markdown]
# Small models are fluent and sometimes wrong: do not learn geography from this one. What did each rank do, and when?

# %%
from minillm.trace.trace import Trace
from minillm.viz.timeline import draw_timeline

show(
    draw_timeline(
        Trace.of_ranks([trace for _, _, trace in answers]),
        "Four ranks answer at once, each with a whole model of its own",
        f"measured · {ranks.describe()} · SmolLM2-135M float32 · the ranks send each other nothing",
        QUESTIONS,
    )
)

# %% [markdown]
# The orange bar ends with the first token; each blue bar is one more, and the last one says: the answer is over. With more ranks than cores they take turns, so look for the moment when short answers are
# done: the bars of the others get narrower. And what did it cost?

# %%
for number, (_, weights, _) in enumerate(answers):
    print(f"rank {number} holds {weights:,} bytes of weights")
print(f"together      {sum(weights for _, weights, _ in answers):,} bytes for one and the same model")

# %% [markdown]
# Four ranks, four full copies. For 135 million parameters that hardly matters. A model of 70 billion parameters in bfloat16 takes
# 140 GB, and no single 80 GB GPU holds it. **The rest of the course is about not doing this**: cutting one model over
# many ranks, and paying for it with messages.

# %% [markdown]
# ## Your turn
#
# Change a frame and run its cell. You see your messages, and one fact about the smallest case that fails: first on toy
# ranks, where a `send` returns only when the other side receives, then on real ones. The cell runs in a process of its
# own. `solution("00.shift")` shows a way, any time; with `%%exercise 00.tell --here` the toy ranks run in this notebook,
# and `breakpoint()` stops in them.
#
# **Shift** (about 5 minutes). Every rank gives its number to the right. In which order?

# %% tags=["exercise"]
# %%exercise 00.shift

# %% [markdown]
# **Tell** (about 10 minutes). Rank 0's number for everybody: a *broadcast* by hand.

# %% tags=["exercise"]
# %%exercise 00.tell

# %% [markdown]
# **Total** (about 25 minutes). The ring that never starts, from above. Repair it, so that *every* rank returns the sum,
# with 2 (n - 1) messages for n ranks.

# %% tags=["exercise"]
# %%exercise 00.total

# %%
# solution("00.shift")  # take the "#" away to see one

# %% [markdown]
# ## Passport
#
# A row is added with every lesson.
#
# | mode | what is cut | what is sent | lesson |
# |---|---|---|---|
# | one device | nothing | nothing | 00, 01 |
# | many copies, nothing shared | the list of questions | nothing | 00 (you are here), 08 |

# %%
ranks.close()

# %% [markdown]
# > **Out there.** `torchrun --nproc-per-node 4 script.py` starts ranks too, and so does `accelerate launch --multi_gpu`;
# > in their processes, `minillm.context()` gives the same rank, world size and device. vLLM and SGLang start one worker process
# > per GPU in just this way: `--tensor-parallel-size 4` means four ranks.
# >
# > **Your devices.** No GPU: four CPU processes, messages by gloo. One GPU: all ranks share it. Four or more: one rank
# > per GPU, messages by NCCL. `python -m minillm doctor` tells what this machine has.
#
# **Next:** one rank is enough to answer a question. Why, then, does its first token take so much longer than the second?
