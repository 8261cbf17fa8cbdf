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
# # 09 · Hybrid
#
# **Eight devices in two hosts, and a fast link only within each host. There are ten ways to use them: which one?**
#
# 45 minutes, and about 40 for the exercises · comes after 05, 07 and 08 · needs nothing but this machine
#
# Two questions from before: how many sums does a layer need when it is cut into slices? And what does a second replica do
# for a single answer?
#
# | term | 中文 | in one line |
# |---|---|---|
# | hybrid | 混合并行 | replicas, stages and slices at once |
# | mesh | 设备网格 | all ranks as a grid; its axes are dp, pp and tp |
# | host, or node | 主机 / 节点 | a machine with several devices |
# | interconnect | 互连 | what carries messages: NVLink, PCIe, Ethernet |
# | SLO | 服务等级目标 | what was promised: so long to the first token (TTFT), so long for each next one (TPOT) |

# %% tags=["needed"]
# %load_ext minillm
from minillm import LLM, Layout, SamplingParams
from minillm.parallel.instance import start_pools

one = LLM(dtype="float32")
pools = {replicas: start_pools(Layout(dp=replicas, tp=4 // replicas), one.device.type)
         for replicas in (1, 2)}  # four ranks, and two pairs
prompts = [[(37 * n + 11 * at) % 40_000 for at in range(24)] for n in range(4)]
some = SamplingParams(max_tokens=6, ignore_eos=True)

# %% [markdown]
# Four ranks: two stages, and each stage is cut into two slices. Four people ask, in two batches, A and B. (Sums are inside the
# bars; on the wire you see what goes from stage to stage.)

# %%
from minillm.viz.live import Timeline

four = LLM(layout="pp=2,tp=2", dtype="float32", ranks=pools[1])
four.generate(prompts[:1], SamplingParams(max_tokens=2))  # warm up
live = Timeline(finding="Ranks 0 and 1 work as one, and so do 2 and 3; work goes from pair to pair")
shown = display(live, display_id=True)
four.on_span = live.push
four.generate(prompts, some)
four.on_span = None
live.show(four.trace)
shown.update(live)

# %% [markdown]
# ## By hand
#
# Two replicas of two stages of two slices are eight ranks, and ranks 0 to 3 sit in one host, 4 to 7 in the other. Who sits with
# whom depends on how places are *numbered*: like hours, minutes and seconds, one axis counts fastest.

# %%
from itertools import product


def number(place, order):
    """The rank at a place, when the last axis of the order counts fastest."""
    rank = 0
    for axis in order:
        rank = 2 * rank + place[axis]
    return rank


places = [dict(zip(("dp", "pp", "tp"), each)) for each in product((0, 1), repeat=3)]
for order in (("dp", "pp", "tp"), ("tp", "pp", "dp")):
    print("counted by", ", ".join(order))
    for axis in ("tp", "pp", "dp"):
        pairs = [(number(p, order), number(p | {axis: 1}, order)) for p in places if p[axis] == 0]
        print(f"  {axis}", *(f"{a}-{b}" + ("*" if a // 4 != b // 4 else " ") for a, b in sorted(pairs)))
print("* leaves its host")

# %% [markdown]
# The axis that counts fastest stays at home, the slowest travels. Which one should?
#
# ## Guess

# %%
from minillm.lesson.predict import Predict

chattier = Predict("09.bytes",
                   "Rank 0 has 15 layers. For each byte to the next stage, how many go into sums?",
                   "×", 0.1, 100)
chattier

# %% [markdown]
# ## Run
#
# The three hybrids of four ranks, on the same prompts; and what rank 0 sends for one token that goes through the model.

# %%
from minillm.trace.collectives import ring_share
from minillm.trace.trace import Kind

expected = [output.token_ids for output in one.generate(prompts, some)]
sent = {}
for layout in map(Layout.parse, ("pp=2,tp=2", "dp=2,tp=2", "dp=2,pp=2")):
    there = pools[layout.dp]
    with four if layout == four.layout else LLM(layout=layout, dtype="float32", ranks=there) as llm:
        same = [output.token_ids for output in llm.generate(prompts, some)] == expected
        trace = llm.measure_messages(prompts, some)
    spans = [span for span in trace.spans if span.rank == 0 and span.kind is Kind.COMMUNICATION]
    counted = {name: sum(span.message_bytes for span in spans if span.name == name)
               for name in ("all_reduce", "hidden states")}
    tokens = len(prompts) // layout.dp * (24 + 5)  # those of a prompt, and all new ones but the last
    sums = counted["all_reduce"] * ring_share("all_reduce", layout.tp) / tokens
    sent[str(layout)] = {"tp": sums, "pp": counted["hidden states"] / tokens}
    print(f"{str(layout):9}  the same tokens: {same}   for a token: {sums:7,.0f} bytes in sums,"
          f" {sent[str(layout)]['pp']:5,.0f} to the next stage")

# %%
from minillm.viz.cube import Arrangement, draw_arrangements
from minillm.viz.words import bytes_text

notes = {layout: " and ".join(f"{bytes_text(size)} {what}" for size, what in
                              ((each["tp"], "in sums"), (each["pp"], "onward")) if size)
         for layout, each in sent.items()}
here = sent["pp=2,tp=2"]
chattier.reveal(
    here["tp"] / here["pp"],
    "Two sums in each of its 15 layers and one for the embedding, and a hidden state only where a stage "
    "ends. Replicas send each other nothing. So slices want the fastest link there is, for stages a "
    "slow one is enough, and replicas need none.",
    draw_arrangements([Arrangement(Layout.parse(text), note=note) for text, note in notes.items()], 4,
                      "Slices talk in every layer, stages only where they end",
                      "counted: what rank 0 sends for one token, sums by a ring · SmolLM2-135M float32"),
    how="counted",
)

# %% [markdown]
# ## Ten ways
#
# Two hosts of four H100: NVLink within; between them, each device has 25 Gbit/s of Ethernet. Sixteen people wait for their
# next token.

# %%
from minillm.hardware.devices import find_device, find_link
from minillm.model.shapes import SHAPES
from minillm.parallel.hybrid import factorisations
from minillm.parallel.plan import Hosts, Load
from minillm.viz.style import show

hosts = Hosts(find_device("H100"), 4, find_link("NVLink 4"), find_link("25 Gbit/s"))
llama = SHAPES["Llama-3.1-8B"]
CAPTION = "planned · hosts of H100, NVLink 4 inside, 25 Gbit/s a device between · Llama-3.1-8B bfloat16"


def step_ms(layout, load, hosts=hosts, order=("dp", "pp", "tp")):
    return 1e3 * hosts.step_time(layout, llama, "bfloat16", load, order).total_s


ten = sorted(factorisations(8), key=lambda layout: step_ms(layout, Load(16, 1, 1000)))
took = [step_ms(layout, Load(16, 1, 1000)) for layout in ten]
finding = f"Ten ways to use eight devices: a token takes {took[0]:.1f} to {took[-1]:.0f} ms"
each = [Arrangement(layout, note=f"{time:.1f} ms") for layout, time in zip(ten, took)]
show(draw_arrangements(each, 4, finding, CAPTION + " · decode, 16 requests after 1,000 tokens"))

# %% [markdown]
# Six of the ten have slices, and five keep their sums at home. `tp=8` cannot, and everybody waits for the slow link at every
# sum. So: slices as far as the host reaches, and across hosts replicas or stages. What stages buy is *memory, over a slow wire*:
# `pp=2,tp=4` takes hardly longer than `dp=2,tp=4`, and holds a model twice as large.
#
# ## Guess
#
# The same devices, the same links, the same `pp=2,tp=4`. Only, somebody numbered the ranks the other way round.

# %%
wrong = Predict("09.order", "How many times as long does a token take now?", "×", 1, 100)
wrong

# %%
orders = {"dp, pp, tp": ("dp", "pp", "tp"), "tp, pp, dp": ("tp", "pp", "dp")}
layout, token = Layout(pp=2, tp=4), Load(16, 1, 1000)
both = [step_ms(layout, token, order=order) for order in orders.values()]
pair = [Arrangement(layout, order, f"counted by {name}: a token takes {time:.1f} ms")
        for (name, order), time in zip(orders.items(), both)]
wrong.reveal(
    both[1] / both[0],
    "The words are the same. But now slices have neighbours in the other host: every sum has to cross "
    "Ethernet, and only hidden states go by NVLink. Whoever places processes at random does this too.",
    draw_arrangements(pair, 4, "The chattiest axis belongs on the fastest wire",
                      CAPTION + " · decode, 16 requests"),
    how="planned",
)

# %% [markdown]
# (Planned as one ring or tree over all slices, in which everybody waits for the slowest link. A library that sums within each
# host first loses less, and still loses.)
#
# ## What if
#
# Find a layout and a host so that the numbering does not matter. Then a large host in which `tp=8` is best.

# %%
from minillm.viz.cube import draw_cube
from minillm.viz.whatif import WhatIf

steps = {"decode, 16 requests": token, "prefill, 1 prompt of 2,048": Load(1, 2048, 0),
         "prefill, 16 prompts of 1,000": Load(16, 1000, 0)}


def draw_what_if(layout, counted_by, ranks_in_a_host, step):
    layout = Layout.parse(layout)
    boxes = Hosts(hosts.device, ranks_in_a_host, hosts.inside, hosts.between)
    took = step_ms(layout, steps[step], boxes, orders[counted_by])
    best = min(factorisations(8), key=lambda other: step_ms(other, steps[step], boxes))
    least = step_ms(best, steps[step], boxes)
    finding = f"{step}: {took:.3g} ms, and nothing is faster"
    if took > 1.02 * least:
        finding = f"{step}: {took:.3g} ms; the fastest, {best}, takes {least:.3g} ms"
    return draw_cube(layout, ranks_in_a_host, finding, CAPTION, orders[counted_by])


WhatIf(draw_what_if, "Eight ranks, arranged", layout=sorted(map(str, factorisations(8)), key=len)[::-1],
       counted_by=list(orders), ranks_in_a_host=[4, 2, 8], step=list(steps))

# %% [markdown]
# ## The winner map
#
# Now one host with eight devices, all on the same link; and *any* device, any link.

# %%
winner = Predict("09.winner", "A DGX: eight H100 on NVLink. Llama-3.1-8B, 16 requests. What is fastest?",
                 choices=("tp=8, to read the prompts and for each next token",
                          "dp=8, for both",
                          "dp=8 to read the prompts, tp=8 for each next token",
                          "tp=8 to read the prompts, dp=8 for each next token"))
winner

# %%
from minillm.hardware.devices import Device, Link
from minillm.parallel.plan import fullest_bytes, plan_step, step_time
from minillm.viz.winner import WinnerMap, draw_winners

H100, ROOM = find_device("H100"), 0.9 * 80e9
MACHINES = {
    "laptop": (Device("core of a laptop", {"float16": 1e11}, 30e9, 8e9, "round figures"),
               Link("shared memory", 2e9, 20e-6, "round figures")),
    "T4s": (find_device("T4"), find_link("PCIe 3 x16")),
    "DGX": (H100, find_link("NVLink 4")),
}


def link_of(rate):
    """Slow links also answer late: 2 µs with NVLink, 50 µs with 0.14 GB/s."""
    return Link("", rate, 2e-6 * (450e9 / rate) ** 0.4, "")


def fastest(device, link, shape, load, devices):
    """What wins on a machine, with its own memory and operations; None where nothing fits."""
    times = {layout: step_time(layout, device, link, shape, "float16", load)
             for layout in factorisations(devices)}
    fit = {layout: time.total_s for layout, time in times.items() if time.fits}
    return min(fit, key=fit.get) if fit else None


def winner_map(step, model="Llama-3.1-8B", devices=8):
    load, shape = steps[step], SHAPES[model]
    fit = [each for each in factorisations(devices)
           if fullest_bytes(each, shape, "float16", load) < ROOM]
    if not fit:
        raise ValueError(f"{step}: {model} and its KV do not fit on {devices} devices of 80 GB")
    plans = {layout: plan_step(layout, H100, shape, "float16", load) for layout in fit}

    def seconds(layout, memory_rate, link_rate):
        took = plans[layout].total_s(memory_rate / H100.bytes_per_s, link_of(link_rate))
        return took + 0 * link_rate  # replicas do not ask for the link

    machines = {name: (device.bytes_per_s, link.bytes_per_s, fastest(device, link, shape, load, devices))
                for name, (device, link) in MACHINES.items()}
    return WinnerMap(step, fit, seconds, machines)


def draw_map(*maps, finding, model="Llama-3.1-8B", devices=8):
    caption = (f"planned · {devices} devices on one link, of 80 GB and an H100's operations per byte; "
               f"dots: machines with their own · {model} float16")
    return draw_winners(maps, (1.5e10, 8e12), (5e7, 1e12), finding, caption)


steps["decode, 128 requests"] = Load(128, 1, 1000)
winner.reveal(
    2,
    "Sixteen prompts are as much to compute however they are shared out, and replicas need no message "
    "for it. For a next token all weights are read: by a replica all of them, by a slice an eighth. "
    "Prefill and decode want different layouts.",
    draw_map(winner_map("prefill, 16 prompts of 1,000"), winner_map("decode, 16 requests"),
             finding="Prompts want replicas, next tokens want slices, as far as the link allows"),
)

# %%
def draw_one(step, model, devices):
    drawn = winner_map(step, model, devices)
    best = drawn.machines["DGX"][2]
    finding = f"{step}: {best} is fastest on the DGX" if devices == 8 else f"{step}: {devices} devices"
    return draw_map(drawn, finding=finding, model=model, devices=devices)


WhatIf(draw_one, "Which layout wins?", step=list(steps), model=["Llama-3.1-8B", "Llama-3.1-70B"],
       devices=[8, 4, 2])

# %% [markdown]
# Down and to the right, links are slow beside their devices, and replicas win: messages cost more than they save. With the
# 70B no device holds a replica alone, and where sums are too slow, *stages* step in. (For a single prompt, `dp=8` means that
# seven devices do nothing.) A dot has the colour of its own winner: a T4 holds no replica of the 8B, and a core of a laptop
# computes so little for each byte it reads that even decode is bound by computing. Only weights, attention and messages are planned: next
# to a border, measure.
#
# ## No file for hybrids
#
# The engine has none. Each mode is applied to the plain model by the rank's place on the mesh, one after the other. Find the
# three lines: which part is mine, my stage's layers, my slice of each.

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("parallel.loading.load_part")

# %% [markdown]
# ## Break it
#
# Ranks 0 and 1 should add up 1 and 2, ranks 2 and 3 should add up 10 and 20. First all four count the other way round, then rank 1
# alone.

# %%
lost = Predict("09.broken", "What shows that ranks count wrong?",
               choices=("all four wrong: they wait for ever; rank 1 alone: wrong sums",
                        "all four wrong: wrong sums, no error; rank 1 alone: a wait, which is named",
                        "both times wrong sums, and no error", "both times an error that names rank 1"))
lost

# %%
import torch

from minillm import RankError, context

ranks = pools[1][0]


def add_up(wrong_ones):
    """On each rank: exchange with the neighbour along tp, by the numbering this rank believes in."""
    comm = context().comm()
    neighbour = comm.rank ^ 2 if comm.rank in wrong_ones else comm.rank ^ 1
    mine, theirs = torch.tensor([[1.0, 2.0, 10.0, 20.0][comm.rank]]), torch.zeros(1)
    if comm.rank < neighbour:
        comm.send(mine, neighbour)
        comm.recv(theirs, neighbour)
    else:
        comm.recv(theirs, neighbour)
        comm.send(mine, neighbour)
    return float(mine + theirs)


print("all right:        ", ranks.run(add_up, []))
everybody = ranks.run(add_up, [0, 1, 2, 3])
print("all wrong:        ", everybody)

# %% tags=["nbval-ignore-output"]
try:
    ranks.run(add_up, [1])
except RankError as error:
    print(error)

# %%
lost.reveal(
    1,
    f"Where all agree on the wrong neighbour, sums are {everybody} instead of 3 and 30, and nobody "
    "complains: only a comparison with one device's tokens tells. Where one disagrees, somebody waits, "
    "and a wait has a name.",
)

# %% [markdown]
# ## Your turn
#
# A hint comes after the first failed try and after the third; `solution("09.fewest")` shows a solution, any time.
#
# **Where am I?** (about 5 minutes).

# %% tags=["exercise"]
# %%exercise 09.place

# %% [markdown]
# **A token's way through a hybrid** (about 10 minutes). The target: 16 bytes a message, and none too many.

# %% tags=["exercise"]
# %%exercise 09.token

# %% [markdown]
# **Two goals, the fewest devices** (about 25 minutes). `plan` is the course's, as above. The target: plan nothing larger than needed.

# %% tags=["exercise"]
# %%exercise 09.fewest

# %% [markdown]
# Your `fewest` (or, until it is solved, the course's) for this machine, and then its choice really runs. Thirty-two prompts
# of 16 tokens. Goals: all read in half the time that one device takes, and each next token no slower than there. And let a
# device have only 0.45 GB, less than SmolLM2 needs, as an H100 has less than a 70B needs.

# %%
from dataclasses import replace

from minillm.hardware.ceilings import measure_ceilings
from minillm.lesson.desk import whose
from minillm.parallel.hybrid import factorisations
from minillm.parallel.plan import Hosts, Load
from minillm.ranks.speed import measure_ring

GOALS, DEVICE_BYTES = (0.5, 1.0), 0.45e9
core = replace(measure_ceilings(one.device.type), memory_bytes=DEVICE_BYTES)
link = measure_ring(pools[1][0])
mine, loads = Hosts(core, 4, link, link), (Load(32, 16, 0), Load(32, 1, 20))
alone = [mine.step_time(Layout(), one.config, "float32", load).total_s for load in loads]
planned, too_large = {}, set()
for layout in (each for count in (1, 2, 4) for each in factorisations(count)):
    steps_s = [mine.step_time(layout, one.config, "float32", load) for load in loads]
    planned[layout] = tuple(step.total_s / single for step, single in zip(steps_s, alone))
    if not all(step.fits for step in steps_s):
        too_large.add(layout)


def plan(dp, pp, tp):
    layout = Layout(dp=dp, pp=pp, tp=tp)
    return *planned[layout], layout not in too_large


chosen = fewest(plan, [1, 2, 4], *GOALS)
print("fewest is", whose(fewest))

# %% tags=["nbval-ignore-output"]
from statistics import median

from minillm.trace.replay import replay, replayed_lives
from minillm.viz.goals import draw_goals
from minillm.viz.style import show

many = [[(37 * n + 11 * at) % 40_000 for at in range(16)] for n in range(32)]


def times(llm):
    """When all prompts are read, and the median time of a next token."""
    llm.generate(many, SamplingParams(max_tokens=2, ignore_eos=True))  # warm up
    recorded = llm.record_for_replay(many, SamplingParams(max_tokens=8, ignore_eos=True))
    lives = replayed_lives(recorded, replay(recorded, link))
    return max(life.ttft_s for life in lives), median(life.tpot_s for life in lives)


layout = Layout(dp=chosen[0], pp=chosen[1], tp=chosen[2]) if chosen else Layout(tp=4)
there = pools.get(layout.dp, [])
there = there if sum(pool.world_size for pool in there) == layout.world_size else None
with LLM(layout=layout, dtype="float32", ranks=there) as llm:
    single, ran = times(one), times(llm)
    held = max(loaded.weight_bytes for instance in llm.instances for loaded in instance.loaded)
ran = ran[0] / single[0], ran[1] / single[1]
met = ran[0] <= GOALS[0] and ran[1] <= GOALS[1] and held < DEVICE_BYTES
finding = f"{layout}: both goals met, with {held / 1e9:.2f} GB of weights on the fullest rank"
if not met:
    finding = f"{layout} misses a goal" if chosen else f"No plan met both goals; {layout} ran"
caption = (f"planned and replayed, devices like a core of this machine · {link.name} · "
           "SmolLM2-135M float32 · 32 prompts of 16 tokens")
show(draw_goals(planned, {layout: ran}, GOALS, finding, caption, too_large))

# %% [markdown]
# A plan knows peaks; a run pays for what is between. That is why plans leave room, and why the last word is a run.
#
# ## Passport
#
# | mode | what is cut | what is sent | lesson |
# |---|---|---|---|
# | **hybrid** | requests, then layers, then each layer | sums within a host, hidden states between | 09 (you are here) |
# | data | the list of requests | nothing | 08 |
# | tensor | every layer, by heads and columns | two sums a layer, to all ranks | 07 |
# | pipeline | layers, and the work into micro-batches | hidden states, from stage to stage | 05 |
#
# > **Out there.** vLLM: `--tensor-parallel-size 4 --pipeline-parallel-size 2 --data-parallel-size 2`; its advice is ours: slices within a host,
# > stages between. SGLang: `--tp-size`, `--pp-size`, `--dp-size`, `--nnodes`. Here: `LLM(layout="dp=2,pp=2,tp=2")`.
# >
# > **Your devices.** No GPU: processes. Four GPUs: the lesson's hybrids by NCCL. Two hosts: `torchrun --nnodes 2 …`, see
# > *Several machines* in the README. `python -m minillm compare` runs every mode that fits.
# >
# > **Papers.** Narayanan et al., *Efficient large-scale language model training on GPU clusters*, 2021 (section 3: slices
# > within, stages between) · Pope et al., *Efficiently scaling Transformer inference*, 2022 · Zheng et al., *Alpa*, 2022 (a search over
# > layouts).

# %%
one.close()
for pool in (*pools[1], *pools[2]):
    pool.close()

# %% [markdown]
# **Next:** so far every weight is used for every token. What if only a few are, and they sit on different ranks?
