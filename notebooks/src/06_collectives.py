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
# # 06 · Collectives
#
# **Each of n ranks has a part of the answer. What does it cost until all of them have the whole?**
#
# 45 minutes, and about 40 for the exercises · comes after 00 · needs nothing but this machine
#
# Two questions from before: what happens when one rank stays away from an all-reduce? And in a pipeline, how many bytes does
# a stage send for one token?
#
# | term | 中文 | in one line |
# |---|---|---|
# | collective | 集合通信 | a step of communication that all ranks of a group take together |
# | all-reduce | 全归约 | everybody gets the sum of what all have |
# | reduce-scatter | 归约散射 | everybody gets one chunk of the sum |
# | all-gather | 全收集 | everybody gets what all have, side by side |
# | all-to-all | 全交换 | everybody has something else for each |
# | α, β | 延迟, 每字节时间 | what a message costs at all, and for each byte |

# %% tags=["needed"]
# %load_ext minillm
from minillm import Ranks

ranks = Ranks(4)

# %% [markdown]
# Four ranks, four numbers each. Click a chunk of one rank, then the same chunk of another: it is sent there and added. How
# little can the busiest rank send until all have all sums?

# %%
from minillm.viz.ringboard import RingBoard

RingBoard(4)

# %% [markdown]
# ## Five collectives
#
# That was an **all-reduce**. It has relatives. Each takes one line on real ranks:

# %%
# %%ranks
comm = context().comm()
mine = torch.tensor([1.0, 2.0, 3.0, 4.0]) * 10**rank
told = {
    "broadcast": comm.broadcast(mine.clone()),
    "all_gather": comm.all_gather(mine[rank : rank + 1]),
    "all_to_all": comm.all_to_all(mine, [1] * 4, [1] * 4),
    "reduce_scatter": comm.reduce_scatter(mine),
    "all_reduce": comm.all_reduce(mine.clone()),
}
if rank == 2:
    for name, result in told.items():
        print(f"{name:15}", [int(number) for number in result])

# %%
from minillm.viz.collectives import draw_collectives
from minillm.viz.style import show

show(draw_collectives("Five collectives: an all-reduce is a reduce-scatter and then an all-gather"))

# %% [markdown]
# So an all-reduce is a reduce-scatter and then an all-gather; and that is the ring: the first half of its steps is the one, the
# second half the other.
#
# ## Predict
#
# Four ranks: each sends 1.5 times its numbers. Now there are 64.

# %%
from minillm.lesson.predict import Predict

sends = Predict(
    "06.sends", "How many times its numbers does each of 64 ranks send in a ring?", "×", 1, 100
)
sends

# %%
from minillm.viz.collectives import draw_growth

sends.reveal(
    2 * (64 - 1) / 64,
    "A ring has 2 (n − 1) steps, but each carries only 1 / n of the numbers: 2 (n − 1) / n, never 2. "
    "The steps grow in number instead. So a ring is for many bytes.",
    lambda guess: draw_growth("In a ring, what a rank sends barely grows with the ranks", guess),
    how="counted",
)

# %% [markdown]
# ## Run: what a message costs
#
# A token of SmolLM2 is 576 numbers, 2.3 kB. Two processes could hand them over by `gloo`, as over a network. They could also
# leave them in memory that both see.

# %%
faster = Predict(
    "06.memory", "How many times as fast is an all-reduce of 2.3 kB over shared memory?", "×", 1, 1000
)
faster

# %%
from statistics import median

from minillm.ranks.speed import fit_link, measure_all_reduce

sizes = [1024, 2304, 9216, 36_864, 147_456, 589_824, 2_359_296]
with Ranks(2) as pair, Ranks(2, shared_memory=False) as apart:
    rounds = [[measure_all_reduce(each, sizes) for each in (apart, pair)] for _ in range(5)]
points = {
    name: {size: median(both[at][size] for both in rounds) for size in sizes}
    for at, name in enumerate(("gloo", "shared memory"))
}
fits = {name: fit_link(name, seconds) for name, seconds in points.items()}

# %%
from minillm.hardware.machine import usable_cores
from minillm.viz.collectives import draw_fit

gloo, memory = points["gloo"][2304], points["shared memory"][2304]
faster.reveal(
    gloo / memory,
    f"{gloo * 1e6:.0f} µs against {memory * 1e6:.0f}. Small messages cost α, whatever their size; large "
    "ones cost β for each byte. One line, α + β · bytes (curved on these axes), says both.",
    draw_fit(points, fits, "Small messages pay α, large ones pay β",
             f"measured · 2 CPU processes on {usable_cores()} cores · lines: fitted"),
)

# %% [markdown]
# This is the whole of it. Find three lines: where a rank writes, where it raises its flag, and where it waits for the others'.

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("ranks.shared.SharedMemory")

# %% [markdown]
# Why two slots, used in turns? Whoever sees all flags of the next sum knows that everybody has read this one.
#
# ## Break it: everybody adds up for itself
#
# All ranks gather all numbers. Each adds them up, beginning with its own. Do they agree?

# %%
agree = Predict("06.order", "Four ranks add the same four numbers, each in another order. They get",
                choices=("the same sum, always", "sums that may differ, by rounding",
                         "an error from the communicator", "the same sum, on the same processor"))
agree

# %%
import torch

from minillm import context


def own_order():
    """On each rank: everybody's number, added up from its own on."""
    comm = context().comm()
    numbers = comm.all_gather(torch.tensor([[1e8, 1.0, -1e8, 1.0][comm.rank]]))
    total = torch.zeros(())
    for step in range(4):
        total += numbers[(comm.rank + step) % 4]
    return float(total)


sums = ranks.run(own_order)

# %%
agree.reveal(
    1,
    f"1e8 + 1 - 1e8 + 1 is 2. The ranks have {', '.join(f'{each:g}' for each in sums)}: beside 1e8 a "
    "float32 has no room for 1, and when it is lost depends on the order. "
    "Ranks that differ may choose different "
    "tokens, and nobody notices. So all-reduces add in one order everywhere: in a ring each chunk is "
    "added up once, and the sum goes round; over shared memory all do the same additions.",
)

# %% [markdown]
# ## What if: which algorithm, which link, which device
#
# A sum for each token of Llama-3.1-8B, in 16 bits. A ring, a tree (up and down again), or **one-shot**: an all-gather, and then
# everybody adds up. Who wins for one token, who for thousands? And is it much, beside what a block computes?

# %%
from minillm.hardware.devices import find_device, find_link
from minillm.model.shapes import SHAPES
from minillm.viz.collectives import draw_algorithms
from minillm.viz.whatif import WhatIf

shape = SHAPES["Llama-3.1-8B"]


def draw_sums(link, device, ranks):
    caption = f"planned, α + β · bytes and roofline · {ranks} × {device} · {link} · Llama-3.1-8B float16"
    return draw_algorithms(ranks, find_link(link), find_device(device), shape.hidden_size,
                           shape.layer_parameters // 2, caption)


WhatIf(draw_sums, "What does the sum after a block cost?",
       link=["NVLink 4", "PCIe 4 x16", "100 Gbit/s", "1 Gbit/s"],
       device=["H100", "A100 80GB", "T4"], ranks=[4, 2, 8, 16])

# %% [markdown]
# For one token the number of steps counts, for thousands the bytes. NCCL chooses between such algorithms for every message.
#
# ## Your turn
#
# A hint comes after the first failed try and after the third; `solution("06.ring")` shows a solution, any time.
#
# **A broadcast tree** (about 5 minutes). Down the line it takes n − 1 rounds. The target: ⌈log₂ n⌉.

# %% tags=["exercise"]
# %%exercise 06.tree

# %% [markdown]
# **All-to-all** (about 10 minutes). The frame sends everything to everybody. The target: nothing that nobody keeps.

# %% tags=["exercise"]
# %%exercise 06.exchange

# %% [markdown]
# **The ring** (about 25 minutes). The target: 2 (n − 1) / n of its numbers from each rank, to the byte.

# %% tags=["exercise"]
# %%exercise 06.ring

# %% [markdown]
# ## Passport
#
# | what | sent by each rank | steps | lesson |
# |---|---|---|---|
# | **all-reduce, ring** | 2 (n − 1) / n of its numbers | 2 (n − 1) | 06 (you are here) |
# | all-gather, ring | (n − 1) times its numbers | n − 1 | 06 |
# | pipeline | hidden states, once | 1 | 05 |
#
# > **Out there.** NCCL: `NCCL_ALGO=Ring`, `Tree`, `NVLS`; `nccl-tests` measures what this lesson did. vLLM and SGLang have an
# > all-reduce of their own for small messages between GPUs of one host (`--disable-custom-all-reduce` switches it off), in the
# > same manner: slots and flags in memory that all see.
# >
# > **Your devices.** No GPU, or one: on Linux and x86 by shared memory, but for reduce-scatter, which goes by gloo. Several
# > GPUs: NCCL, for every collective of this page.
# >
# > **Papers.** Patarasuk and Yuan, *Bandwidth optimal all-reduce*, 2009 · Thakur et al., *Optimization of collective
# > communication operations in MPICH*, 2005.

# %%
ranks.close()

# %% [markdown]
# **Next:** one sum for each block of each layer is all that is needed so that every rank holds a slice of *every* layer.
