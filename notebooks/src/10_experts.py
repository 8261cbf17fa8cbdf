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
# # 10 · Experts
#
# **DeepSeek-V3 has 671 billion numbers and uses 37 billion for a token. Where do the others live, and what if all tokens want the same ones?**
#
# 45 minutes, and about 40 for the exercises · comes after 06 to 08 · needs 5 GB of free memory
#
# Two questions from before: what does an all-to-all leave on every rank? And when one rank has 6 of 9 heads, what do the
# others do?
#
# | term | 中文 | in one line |
# |---|---|---|
# | mixture of experts (MoE) | 混合专家 | many small MLPs in place of a large one |
# | router | 路由 | chooses for each token the k experts that it likes best |
# | expert parallelism | 专家并行 | experts lie on different ranks, tokens travel |
# | dispatch, combine | 分发、合并 | tokens to their experts, answers back |
# | imbalance | 负载不均 | the fullest rank's work over the mean |
# | redundant expert | 冗余专家 | a second copy of one that many want |

# %% tags=["needed"]
# %load_ext minillm
from minillm import LLM, Ranks, SamplingParams

ranks = Ranks(2)
one = LLM("tiny-moe", dtype="float32")  # 16 experts in each of 4 layers, 2 for a token

# %% [markdown]
# It writes 48 tokens. Watch which experts they ask; the text comes at the end. (It has read Shakespeare, and has 2.7 million numbers:
# its plays are no good.)

# %%
from IPython.display import Image

from minillm.viz.choices import draw_choices
from minillm.viz.style import png


def map_of_choices(finding):
    picture = draw_choices(one.tally.pairs, finding, "counted · tiny-moe, one device")
    return Image(png(picture), width=960)


text = ""
shown = display(map_of_choices("Which experts do the tokens ask?"), display_id=True)
for number, piece in enumerate(one.stream("HAMLET\n", SamplingParams(max_tokens=48, ignore_eos=True))):
    text += piece.text
    if number % 8 == 7:
        shown.update(map_of_choices(f"{number + 1} tokens, and who was asked"))
print("HAMLET\n" + text.strip())

# %% [markdown]
# ## By hand
#
# One token, four experts. The router gives a score to each; the best two are asked, and count by a softmax of their scores.
# Expert *e* of this toy answers (*e* + 1) · x.

# %%
import torch

x, scores = torch.tensor([10.0]), torch.tensor([2.0, -1.0, 1.0, 0.0])
best, experts = scores.topk(2)
weights = best.softmax(0)
print("asks experts", experts.tolist(), "which count", [round(w, 2) for w in weights.tolist()])
print("answer:", sum(weight * (expert + 1) * x for weight, expert in zip(weights, experts)).item())

# %% [markdown]
# ## Predict: what is read
#
# One token reads two experts of a layer, an eighth of them. That is why a mixture is cheap. Or is it?

# %%
from minillm.lesson.predict import Predict

asked = Predict("10.read", "64 requests decode together. How many experts of a layer are read?",
                "of 16", 1, 16)
asked

# %% tags=["needed"]
from minillm.policy.experts import even

plays = ["ROMEO\nBut soft, what light", "HAMLET\nTo be, or not to be", "FALSTAFF\nGive me a cup of sack",
         "KING HENRY V\nOnce more unto the breach", "LADY MACBETH\nOut, damned spot",
         "BRUTUS\nRomans, countrymen", "ROSALIND\nAll the world's a stage",
         "PROSPERO\nOur revels now are ended"]
ends = ("", ",", ".", "\nI", " of", " and", " the", "\nMy lord")
crowd = [opening + end for opening in plays for end in ends]


def heard(run):
    """What every router chose while something ran, in order: a hook on each of them."""
    told = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda gate, x, routing: told.append(routing.experts))
             for layer in one.model.layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return told


told = heard(lambda: one.generate(crowd, SamplingParams(max_tokens=8, ignore_eos=True)))
decoded = [experts for experts in told if len(experts) == 64]
past = one.expert_choices().pairs  # of (token, expert), layer by layer, all that was asked so far
mean = sum(len(experts.unique()) for experts in decoded) / len(decoded)

# %%
asked.reveal(
    mean,
    "Every token asks two, but not the same two. (With a router that has no favourites it would be "
    "all 16.) So a mixture saves computing, not memory: all experts must lie somewhere, and most are "
    "read for a batch. That is why they are spread over many devices, and why the tokens of many "
    "requests should meet there.",
    how="counted",
)

# %% [markdown]
# ## Two all-to-alls
#
# Two ranks, two experts on each. Each rank has two tokens of one number, each for one expert. Who sends what, and what comes back?

# %%
# %%ranks
comm = context().comm()
x = torch.tensor([[1.0], [2.0]]) if rank == 0 else torch.tensor([[10.0], [20.0]])
asks = [[1, 3], [2, 3]]  # the expert of each token, rank by rank; expert e lives on rank e // 2
home = [[expert // 2 for expert in each] for each in asks]
send = [home[rank].count(other) for other in (0, 1)]
recv = [home[other].count(rank) for other in (0, 1)]
came = comm.all_to_all(x, send, recv)  # dispatch: so many rows to each rank, so many from each
here = torch.tensor([[expert] for each in asks for expert in each if expert // 2 == rank])
back = comm.all_to_all((here + 1) * came, recv, send)  # combine: the way back
mine, got, answers = (each.flatten().tolist() for each in (x, came, back))
print(f"has {mine}, gets {got} for experts {here.flatten().tolist()}; its answers: {answers}")

# %% [markdown]
# Rank 1 has three of the four tokens to work on, and rank 0 waits for its answers. How unfair is a real router?
#
# ## Predict: the fullest rank

# %%
fullest = Predict("10.fullest", "16 experts over 4 ranks: the fullest has how many times the mean?",
                  "×", 1, 4)
fullest

# %%
from minillm.parallel.exchange import destinations
from minillm.policy.experts import place
from minillm.viz.river import MOST, draw_river


def choices_of(words):
    """The first tokens of a text, and the experts that each asks in every layer."""
    ids = one.tokenizer.encode(words)[:MOST]
    if not ids:
        raise ValueError("type a word")
    return [one.tokenizer.decode([each]) for each in ids], heard(lambda: one.score(ids))


def placed(layer, ranks, how):
    """Which experts of a layer each rank holds."""
    if how == "in order":
        return even(16, ranks)
    copies = max(4, ranks) if how == "by load, with copies" else 0
    return place(past[layer].tolist(), ranks, 16 + copies)


def river(words, layer, ranks, experts):
    tokens, told = choices_of(words)
    placement = placed(layer, ranks, experts)
    work = torch.bincount(destinations(told[layer], placement).flatten(), minlength=ranks)
    times = work.max().item() * ranks / work.sum().item()
    finding = f"The slowest rank is the clock: {times:.2f} times the mean"
    if times < 1.2:
        finding = f"Nearly even: the fullest rank has {times:.2f} times the mean"
    first = "the first " * (len(tokens) == MOST)
    caption = (f"counted · tiny-moe, layer {layer} · experts {experts} · {first}{len(tokens)} "
               f"token{'s' * (len(tokens) > 1)}, 2 experts each")
    chosen = told[layer].tolist()
    return times, draw_river(tokens, chosen, placement, finding, caption, 2 * len(tokens))


words = "But soft, what light through yonder window breaks? It is the east"
times, picture = river(words, 2, 4, "in order")

# %%
fullest.reveal(
    times,
    "Each rank has a quarter of the experts, and no rank a quarter of the work. Nobody can combine "
    "before the fullest rank has answered: the others wait.",
    picture,
    how="counted",
)

# %% [markdown]
# ## What if: your own words
#
# Where experts lie is free: placed *by load*, the busiest are apart; *with copies*, they are on several ranks. The loads are those
# of all texts above, not of yours: a server too knows only what was. Which words defeat it?
# (Try one word, again and again, in every layer.)

# %%
from minillm.viz.whatif import WhatIf

WhatIf(lambda **how: river(**how)[1], "Who has to wait for whom?", words=words, layer=[2, 0, 1, 3],
       ranks=[4, 2, 8], experts=["by load", "in order", "by load, with copies"])

# %% [markdown]
# ## Run
#
# Real ranks, and a model whose text can be judged: SmolLM2 with every MLP copied four times, and a router that never learned.
# Whoever is asked, the text must be SmolLM2's. Each rank has its own requests and its own attention (`dp=2`); experts 0 and
# 1 are on rank 0, 2 and 3 on rank 1 (`ep=2`).

# %%
gain = Predict("10.gain", "How many times as fast do two ranks read the prompts?", "×", 0.5, 4)
gain

# %%
from statistics import median

two = LLM("smollm2-moe", layout="dp=2,ep=2", dtype="float32", ranks=ranks)
single = LLM("smollm2-moe", dtype="float32")
prompts = [[(37 * n + 11 * at) % 40_000 for at in range(96)] for n in range(4)]
first = SamplingParams(max_tokens=1, ignore_eos=True)


def seconds(llm):
    tokens = [output.token_ids for output in llm.generate(prompts, first)]
    return llm.trace.end_s - llm.trace.start_s, tokens


def race(rounds):
    """How many times as fast two ranks are; one device and they take turns."""
    times = [[seconds(llm)[0] for llm in (single, two)] for _ in range(rounds)]
    return median(alone / shared for alone, shared in times)


print("the same tokens:", seconds(single)[1] == seconds(two)[1])

# %%
from dataclasses import replace

from minillm.ranks.speed import measure_ring
from minillm.trace.replay import replay
from minillm.trace.waits import with_waits
from minillm.viz.timeline import draw_timeline

in_order = race(3)
unfair = two.expert_choices(clear=True).imbalance
link = measure_ring(ranks)
run = replay(two.record_for_replay(prompts, first), link).only("compute")
middle, shown_s = (run.start_s + run.end_s) / 2, (run.end_s - run.start_s) / 10
run = replace(run, spans=[span for span in run.spans if middle < span.start_s < middle + shown_s])
caption = ("replayed · devices like a core of this machine · messages as fast as between two ranks "
           "here · SmolLM2-135M with 4 experts, float32 · 4 prompts of 96 tokens, two on each rank")
finding = "In every layer, the rank that has less to do waits for the other"
picture = draw_timeline(with_waits(run), finding, caption)

# %%
gain.reveal(
    in_order,
    f"The fullest rank has {unfair:.2f} times the mean, in this layer one, in that layer the other; and "
    "messages take time. Everything else is shared evenly.",
    picture,
)

# %% [markdown]
# Now the same by load, with two copies in each layer. The weights move from rank to rank, and the model stays loaded.

# %%
placements, moved = two.place_experts(redundant=2)
print("experts of layer 0 on each rank:", *map(list, placements[0].ranks))
print("the same tokens:", seconds(two)[1] == seconds(single)[1])

# %% tags=["nbval-ignore-output"]
by_load = race(3)
fair = two.expert_choices().imbalance
print(f"{sum(moved) / 1e6:.0f} MB moved")
print(f"the fullest rank has {fair:.2f} times the mean, and had {unfair:.2f}")
print(f"two ranks are {by_load:.2f} times as fast as one, and were {in_order:.2f} times")

# %% [markdown]
# (Three races on a busy machine tell little; the counts are exact. Twice the speed is out of reach: messages remain.)
#
# ## Predict: what copies buy
#
# Four ranks, the Shakespeare model, 64 requests. Its router has favourites. By load, with 8 copies: each rank holds six of 24.

# %%
copies = Predict("10.copies", "The fullest rank then has how many times the mean?", "×", 1, 4)
copies

# %%
four = LLM("tiny-moe", layout="dp=4,ep=4", dtype="float32")
longer = SamplingParams(max_tokens=12, ignore_eos=True)
expected = [output.token_ids for output in one.generate(crowd, longer)]
tokens, imbalance = [], []
for redundant in (None, 8):
    if redundant is not None:
        four.place_experts(redundant=redundant)
    tokens.append([output.token_ids for output in four.generate(crowd, longer)])
    imbalance.append(four.expert_choices().imbalance)
print("the same tokens as one device:", tokens[0] == expected, tokens[1] == expected)

# %%
copies.reveal(
    imbalance[1],
    f"In order it was {imbalance[0]:.2f}. No token changes: a copy is the same expert. What is left is "
    "chance: in a single step few tokens choose, and never just as the mean says. (They were placed by "
    "the same texts' choices; other texts choose otherwise, and more is left.)",
    draw_choices(one.tally.pairs, "The router has favourites, others in every layer",
                 "counted · tiny-moe · everything it has read and written here · 1 is an even share"),
    how="counted",
)

# %% [markdown]
# A server repeats that while it runs, DeepSeek's every ten minutes: `EngineOptions(rebalance_steps=500, redundant_experts=8)`.
#
# ## Bytes

# %%
leaves = Predict("10.bytes", "A token asks 2 of 16 experts on 4 ranks. How often is its vector sent?",
                 "times", 0.5, 4)
leaves

# %%
from minillm.model.shapes import MIXTURES, Mixture
from minillm.parallel.wide import rows_sent

four.place_experts([even(16, 4)] * 4)  # in order again, without copies
four.expert_choices(clear=True)
run = four.measure_messages(crowd, longer).only("compute")
sent = {name: sum(span.message_bytes for span in run.spans if span.name == name)
        for name in ("dispatch", "combine", "all_gather")}
pairs = four.expert_choices(clear=True).pairs.sum().item()
vectors = sent["dispatch"] / (4 * four.config.hidden_size) / (pairs / 2)  # for each token of each layer
drawn = rows_sent(Mixture(128, 16, 2, 96, 4), 4, once=True)

# %%
leaves.reveal(
    vectors,
    "In order, without copies. An expert is elsewhere three times out of four, so 2 · 3/4 = 1.5; but if "
    "both are on the same rank, the vector goes there once. If all pairs were as likely, "
    f"{drawn:.2f} by the formula below. The combine brings back as much: the experts of a rank "
    "add up before they answer.",
    how="counted",
)

# %% [markdown]
# Of R ranks with e of E experts each, a token with k experts goes to (R − 1) · (1 − C(E − e, k) / C(E, k)) others: at most k, however
# many ranks there are. A tensor-parallel sum sends 2 (R − 1) vectors for a token, all ranks together:

# %%
deepseek = MIXTURES["DeepSeek-V3"]
print("vectors that a token sends for one layer's experts")
for ranks_there in (8, 32, 144):
    once = f"{rows_sent(deepseek, ranks_there, once=True):.1f}"
    print(f"{ranks_there:4} ranks: dispatch {once}, combine {once}; a sum {2 * (ranks_there - 1)}")
print("on the four ranks above:", ", ".join(f"{name} {size:,} bytes" for name, size in sent.items()))
print("(the all-gather tells all ranks who asks whom)")

# %% [markdown]
# ## The engine's own
#
# Find the two all-to-alls, and what happens before each. (`yield from` lets the other half of a batch compute while a message is
# under way: `EngineOptions(micro_batches=2)`.)

# %% tags=["nbval-ignore-output"]
from minillm.lesson.source import show_source

show_source("parallel.expert.ExpertParallelMLP.exchange")

# %% tags=["nbval-ignore-output"]
show_source("policy.experts.replicate")

# %% [markdown]
# ## Break it: answers in the wrong order
#
# In one layer of thirty, rank 1 hands its answers back last row first.

# %%
mixed = Predict("10.mixed", "What comes out?",
                choices=("an error: the rows do not fit", "a hang: a rank waits for its answers",
                         "the right text: all experts are alike", "noise, whichever layer it is",
                         "no error: the right text or another one, by layer"))
mixed

# %%
from minillm import context

question = two.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
short = SamplingParams(max_tokens=10)


def turn_round(name, layer):
    """On rank 1: this layer's experts answer the last row first."""
    if context().rank == 1:
        experts = context().held[name].model.layers[layer].mlp.experts
        experts.forward = lambda x, routing: type(experts).forward(experts, x, routing).flip(0)


def mend(name, layer):
    """As it was."""
    vars(context().held[name].model.layers[layer].mlp.experts).pop("forward", None)


def broken(layer):
    """The answer with one layer's answers mixed up."""
    ranks.run(turn_round, two.instance.name, layer)
    text = two.generate([question], short)[0].text
    ranks.run(mend, two.instance.name, layer)
    return text.strip()


right = two.generate([question], short)[0].text.strip()
wrong = {layer: broken(layer) for layer in (5, 12, 16)}

# %%
mixed.reveal(
    4,
    f"Before: “{right}” " + " ".join(f"Layer {layer}: “{text}”" for layer, text in wrong.items()) +
    " Shapes fit, everybody gets as many rows as it waits for, and tokens get each other's answers. "
    "That the experts are alike does not help: what they answer depends on the token. And one question "
    "is no test: many layers hide it. Compare many texts, token by token, or the logits.",
)

# %% [markdown]
# Try others, while the ranks are there: `broken(0)`.
#
# ## What if: hundreds of devices
#
# DeepSeek-V3 has 256 experts a layer, and 32 redundant ones where it serves: for prompts nine on each of 32 devices (EP32), for decoding
# two on each of 144 (EP144). Why so few for prompts? (Here without redundant ones; their weights fit from 16 H100s on.)

# %%
from minillm.hardware.devices import find_device, find_link
from minillm.parallel.wide import experts_time
from minillm.viz.wide import draw_wide


def wide(tokens_on_each, device, link, model, fullest_rank):
    mixture = MIXTURES[model]
    widths = [width for width in (4, 8, 16, 32, 64, 144, 256) if width <= mixture.experts]
    parts = (find_device(device), find_link(link))
    times = [experts_time(mixture, *parts, width, tokens_on_each, fullest_rank) for width in widths]
    return draw_wide(times, f"planned, roofline and α + β · bytes · {device} · {link} · {model} · "
                     f"{tokens_on_each} tokens on each · the fullest has {fullest_rank} × the mean")


WhatIf(wide, "How wide?", tokens_on_each=[16, 1, 4, 64, 256, 1024, 4096],
       device=["H100", "H200", "A100 80GB"], link=["400 Gbit/s", "NVLink 4", "100 Gbit/s"],
       model=list(MIXTURES), fullest_rank=[1, 1.25, 1.5, 2, 3])

# %% [markdown]
# Decoding reads weights: the wider, the fewer experts a device reads, for the tokens of all. A prompt's thousands of tokens compute, and send;
# wider sends more, and gains nothing. (So much is sent that DeepSeek sends to four hosts at most, and computes one half of a batch
# meanwhile.) And the fullest rank is the clock of hundreds. Why 32 and not 16, 144 and not 256? The chart cannot say: it leaves out
# the KV cache, the redundant experts, and whatever else costs more on more hosts.
#
# Is α + β · bytes good for that? DeepSeek published what its own kernels take, for 128 tokens on each of so many H800s:

# %%
published = {16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369)}  # µs; DeepEP, README, 2025
print("devices   dispatch: formula, measured   combine: formula, measured")
for width, (dispatch_us, combine_us) in published.items():
    time = experts_time(deepseek, find_device("H100"), find_link("400 Gbit/s"), width, 128, once=False)
    ours = [round(1e6 * seconds) for seconds in (time.dispatch_s, time.combine_s)]
    print(f"{width:7} {ours[0]:18} {dispatch_us:8} µs {ours[1]:17} {combine_us:8} µs")

# %% [markdown]
# Within a factor of 1.5, and wrong in one thing: by the formula width costs nothing, and on real wires it does: more pairs of devices,
# more that get in each other's way. (These kernels send a token once for every expert, even if two are on the same device.)
#
# ## Your turn
#
# A hint comes after the first failed try and after the third; `solution("10.pack")` shows a solution, any time.
#
# **Route** (about 5 minutes).

# %% tags=["exercise"]
# %%exercise 10.route

# %% [markdown]
# **A balanced packing** (about 10 minutes). The target is what one simple rule reaches; the second
# hint tells it.

# %% tags=["exercise"]
# %%exercise 10.pack

# %% [markdown]
# **Dispatch and combine** (about 25 minutes). The target: no token twice to the same rank.

# %% tags=["exercise"]
# %%exercise 10.dispatch

# %% [markdown]
# Your `pack` (or, until it is solved, the course's) on what the Shakespeare model's tokens asked above:

# %%
from minillm.lesson.desk import whose
from minillm.policy.experts import Placement

print("the fullest rank, in times the mean; pack is", whose(pack))
for layer, loads in enumerate(past.tolist()):
    yours = Placement(tuple(map(tuple, pack(loads, 4))), 16)
    before, after = (each.imbalance(loads) for each in (even(16, 4), yours))
    alone = 4 * max(loads) / sum(loads)
    print(f"layer {layer}: {before:.2f} in order, {after:.2f} packed; a rank with the busiest expert "
          f"and nothing else: {alone:.2f}")

# %% [markdown]
# ## Passport
#
# | mode | what is cut | what is sent | lesson |
# |---|---|---|---|
# | **experts** | the MLPs, by experts | tokens to their experts, and answers back | 10 (you are here) |
# | data | the list of requests | nothing | 08 |
# | tensor | every layer, by heads and columns | two sums a layer, to all ranks | 07 |
#
# > **Out there.** vLLM: `--enable-expert-parallel` with `--data-parallel-size`, `--enable-eplb`, `--all2all-backend deepep_low_latency`.
# > SGLang: `--ep-size`, `--moe-a2a-backend deepep`, `--enable-eplb`, `--ep-num-redundant-experts`, `--enable-two-batch-overlap`.
# >
# > **Your devices.** No GPU: processes, as here. Two GPUs or more: `layout="dp=2,ep=2"`, or `"tp=2,ep=2"` with attention cut by heads.
# >
# > **Papers.** Shazeer et al., *Outrageously large neural networks*, 2017 · Lepikhin et al., *GShard*, 2020 (section 3.2: the two all-to-alls) ·
# > Jiang et al., *Mixtral of Experts*, 2024 · DeepSeek-AI, *DeepSeek-V3 Technical Report*, 2024 (section 3.4) · DeepSeek's *DeepEP* and *EPLB*, 2025.

# %%
four.close()
two.close()
single.close()
ranks.close()  # `one` stays, for the river

# %% [markdown]
# **Next:** weights, layers, experts are all spread by now. What if the *context* of one request is too long for any device?
