"""Exercises: frames fail, solutions pass, wrong ones get one screen that names place, expected and got; nothing hangs."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell

from minillm import Ranks, context
from minillm.lesson.compare import first_difference
from minillm.lesson.desk import Desk, solution
from minillm.lesson.grading import all_exercises, judge
from minillm.ranks.toy import run_toy
from minillm.viz.style import png

EXERCISES = all_exercises()
SCREEN_LINES, SCREEN_COLUMNS = 12, 200

(
    TOTAL,
    TELL,
    SHIFT,
    CACHE,
    KV,
    BATCH,
    STEPS,
    SEATS,
    SCHEDULE,
    WASTE,
    KNOWN,
    WRITE,
    EVEN,
    FULLEST,
    CUT,
    ENDS,
    SIZES,
    GROUPS,
    TREE,
    EXCHANGE,
    RING,
    ARGMAX,
    MLP,
    HEADS,
    WAITS,
    REPLICAS,
    ROUTER,
    PLACE,
    TOKEN,
    FEWEST,
    ROUTE,
    PACK,
    DISPATCH,
    MERGE,
    TRAVEL,
    ASK,
    WIRE,
    GRANT,
    BORROW,
    SHARE,
    PULL,
    PLAN,
    FILL,
    MEANS,
    PAIR,
    WATTS,
    MISSED,
    SOONEST,
    ROOM,
    ORDER,
    ADMIT,
) = (
    EXERCISES[name].solution
    for name in (
        "00.total",
        "00.tell",
        "00.shift",
        "01.kv_cache",
        "01.kv_bytes",
        "01.enough_batch",
        "02.static_steps",
        "02.seats_taken",
        "02.schedule",
        "03.waste",
        "03.known_tokens",
        "03.write",
        "04.even_stages",
        "04.fullest",
        "04.cut",
        "05.ends",
        "05.sizes",
        "05.groups",
        "06.tree",
        "06.exchange",
        "06.ring",
        "07.argmax",
        "07.mlp",
        "07.heads",
        "08.waits",
        "08.replicas",
        "08.router",
        "09.place",
        "09.token",
        "09.fewest",
        "10.route",
        "10.pack",
        "10.dispatch",
        "11.merge",
        "11.travel",
        "11.ask",
        "12.wire",
        "12.grant",
        "12.borrow",
        "13.share",
        "13.pull",
        "13.plan",
        "14.batch",
        "14.means",
        "14.place",
        "15.provision",
        "15.missed",
        "15.router",
        "16.room",
        "16.order",
        "16.reserve",
    )  # fmt: skip
)


def thrice(source: str) -> str:
    """The same messages, each of three numbers where one would do."""
    longer = source.replace("torch.zeros(1)", "torch.zeros(3)").replace(
        "torch.tensor([number])", "torch.tensor([number] * 3)"
    )
    return longer.replace(".item()", "[0].item()")


STAR = """
def ring(comm, numbers):
    total = torch.tensor(numbers)
    received = torch.empty_like(total)
    if comm.rank > 0:
        comm.send(total, to=0)
        return comm.recv(total, source=0)
    for other in range(1, comm.size):
        total += comm.recv(received, source=other)
    for other in range(1, comm.size):
        comm.send(total, to=other)
    return total
"""
PER_PAIR = """
def mixture(comm, given):
    rows, choices, w = given
    x = torch.tensor(rows)
    def pairs(source, to):
        return [(token, e) for token, experts in enumerate(choices[source]) for e in experts if e // 2 == to]
    going = [pairs(comm.rank, other) for other in range(comm.size)]
    coming = [pairs(other, comm.rank) for other in range(comm.size)]
    send, recv = [len(each) for each in going], [len(each) for each in coming]
    tokens = torch.tensor([token for each in going for token, _ in each])
    factors = torch.tensor([w[e] for each in coming for _, e in each])
    back = comm.all_to_all(comm.all_to_all(x[tokens], send, recv) * factors[:, None], recv, send)
    return torch.zeros_like(x).index_add_(0, tokens, back)
"""
WRONG = {
    # a missing message, off by one, three times the target's bytes
    "00.shift, missing": ("00.shift", SHIFT.replace("if comm.rank != 0:", "if comm.rank > 1:"), ["2 ranks with 10, 20", "rank 0 waits for", "rank 1 has returned"]),
    "00.shift, off by one": ("00.shift", SHIFT.replace("[number]", "[number + 1]"), ["rank 0: expected 20, got 21"]),
    "00.shift, 3 x": ("00.shift", thrice(SHIFT), ["took 24 bytes of messages; the target is 8, 3.0× as much"]),
    "00.tell, missing": ("00.tell", TELL.replace("if comm.rank > 0:", "if comm.rank > 1:"), ["rank 0 waits for rank 1 to receive", "rank 1 has returned"]),
    "00.tell, off by one": ("00.tell", TELL.replace("return held.item()", "return held.item() + comm.rank"), ["rank 1: expected 10, got 11"]),
    "00.tell, 3 x": ("00.tell", thrice(TELL), ["took 12 bytes of messages; the target is 4, 3.0× as much"]),
    "00.tell, collective": ("00.tell", "def tell(comm, number):\n    return comm.broadcast(torch.tensor([number])).item()", ["with send and recv alone; broadcast was called"]),
    "00.tell, known numbers": ("00.tell", "def tell(comm, number):\n    return 10.0", ["3 ranks with 7, 1, 30: rank 0: expected 7, got 10"]),
    "00.total, missing": ("00.total", TOTAL.replace("if comm.rank != last - 1:", "if False:"), ["rank 0 waits to receive from rank 1", "rank 1 has returned"]),
    "00.total, off by one": ("00.total", TOTAL.replace("held += number", "held += number + 1"), ["rank 0: expected 30, got 32"]),
    "00.total, 3 x": ("00.total", thrice(TOTAL), ["took 24 bytes of messages; the target is 8, 3.0× as much"]),
    "00.total, collective": ("00.total", "def total(comm, number):\n    return comm.all_reduce(torch.tensor([number])).item()", ["all_reduce was called"]),
    "00.total, a tensor": ("00.total", TOTAL.replace("return held.item()", "return torch.cat((held, held))"), ["rank 0: expected 30, got [30, 30]"]),
    "00.total, a generator": ("00.total", TOTAL.replace("return held.item()", "yield held"), ["rank 0: expected 30, got <generator"]),
    "00.total, another dtype": ("00.total", TOTAL.replace("torch.zeros(1)", "torch.zeros(1, dtype=torch.float16 if comm.rank else torch.float32)"), ["rank 1 failed: ValueError: rank 0 sent [1] float32, but rank 1 receives into [1] float16"]),
    "01.kv_bytes, V forgotten": ("01.kv_bytes", KV.replace("return 2 *", "return"), ["expected 16, got 8"]),
    "01.kv_bytes, all heads": ("01.kv_bytes", KV.replace("* kv_heads", "* 3 * kv_heads"), ["expected 16, got 48"]),
    "01.kv_bytes, off by one": ("01.kv_bytes", KV.replace("* tokens", "* (tokens + 1)"), ["expected 16, got 32"]),
    "01.kv_bytes, a byte": ("01.kv_bytes", KV.replace("* number_bytes", "* number_bytes + (tokens > 1)"), ["SmolLM2", "expected 4,608,000, got 4,608,001"]),
    "01.enough_batch, factor": ("01.enough_batch", BATCH.replace("(2 *", "(1 *"), ["expected 6, got 12"]),
    "01.enough_batch, off by one": ("01.enough_batch", BATCH.replace(")\n", ") - 1\n"), ["expected 6, got 5"]),
    "01.enough_batch, down": ("01.enough_batch", BATCH.replace("ceil", "floor"), ["an A100", "expected 154, got 153"]),
    "01.kv_cache, nothing kept": ("01.kv_cache", CACHE.replace('torch.cat((cache["k"], k)) if cache else k', "k").replace('torch.cat((cache["v"], v)) if "v" in cache else v', "v"), ["call 1 at [0]: expected -0.874", "got"]),
    "01.kv_cache, off by one": ("01.kv_cache", CACHE.replace('cache["k"].T /', 'cache["k"].roll(1, 0).T /'), ["call 1 at [0]: expected -0.874", "got"]),
    "01.kv_cache, 3 x": ("01.kv_cache", CACHE.replace("q, k, v = project(new)", "project(new); project(new)\n    q, k, v = project(new)"), ["took 6 projected rows; the target is 2, 3.0× as much"]),
    "01.kv_cache, remembered": ("01.kv_cache", "seen = {}\n" + EXERCISES["01.kv_cache"].starter.replace("q, k, v = project(x)", "q, k, v = seen.setdefault((len(x), x.sum().item()), None) or seen.update(a=project(x)) or seen['a']"), ["projected rows; the target is 2"]),
    "02.static_steps, off by one": ("02.static_steps", STEPS.replace("max(answers[i:i + seats])", "max(answers[i:i + seats]) + 1"), ["2 seats: expected 5, got 6"]),
    "02.static_steps, the last batch lost": ("02.static_steps", STEPS.replace("range(0, len(answers), seats)", "range(0, len(answers) - 1, seats)"), ["seven answers, 3 seats: expected 16, got 10"]),
    "02.seats_taken, overload": ("02.seats_taken", SEATS.replace("grows >= 1", "grows > 99"), ["10 requests/s", "expected -1, got -15"]),
    "02.schedule, above the budget": ("02.schedule", SCHEDULE.replace("budget -= tokens", "pass"), ["a prompt above the budget", "the plan has 13 tokens, but the budget of a step is 8"]),
    "02.schedule, too many seats": ("02.schedule", SCHEDULE.replace("waiting[:seats - len(running)]", "waiting"), ["the plan would seat 3 requests, but there are 2 seats"]),
    "02.schedule, prompts first": ("02.schedule", SCHEDULE.replace("each.left > 1", "-each.left"), ["request 0: longest wait for a token, in steps: expected 1, got 4"]),
    "02.schedule, one at a time": ("02.schedule", SCHEDULE.replace("return plan", "return plan[:1]"), ["took 5 steps; the target is 3, 1.7× as much"]),
    "02.schedule, nothing": ("02.schedule", SCHEDULE.replace("return plan", "return []"), ["the plan is empty, though requests wait or run"]),
    "02.schedule, twice": ("02.schedule", SCHEDULE.replace("return plan", "return plan + plan"), ["request 0 stands in the plan twice"]),
    "02.schedule, no pairs": ("02.schedule", SCHEDULE.replace("plan.append((request, tokens))", "plan.append(request)"), ["a plan is a list of pairs (request, tokens)"]),
    "02.schedule, too many tokens": ("02.schedule", SCHEDULE.replace("min(request.left, budget)", "budget"), ["16 tokens for request 0 (4 left): give it 1 … 4"]),
    "03.waste, the other rest": ("03.waste", WASTE.replace("-length %", "length %"), ["one sequence of 5 tokens, blocks of 4: expected 3, got 1"]),
    "03.known_tokens, the last token too": ("03.known_tokens", KNOWN.replace("block_size < len", "block_size <= len"), ["the same four tokens again", "expected 2, got 4"]),
    "03.known_tokens, blocks by themselves": ("03.known_tokens", KNOWN.replace("tokens[:end] == prompt[:end]", "tokens[known:end] == prompt[known:end]"), ["the second block of another prompt: expected 2, got 4"]),
    "03.write, never copied": ("03.write", WRITE.replace("> 1", "> 9"), ["token 3 read back: expected 21, got 31"]),
    "03.write, copied, not told": ("03.write", WRITE.replace("return copies", "return []"), ["token 0 read back: expected 11, got -1"]),
    "03.write, not released": ("03.write", WRITE.replace("        release(old)\n", ""), ["blocks still held when all have ended: expected 0, got 1"]),
    "03.write, always copied": ("03.write", WRITE.replace("> 1", ">= 1"), ["took 3 blocks taken from the pool; the target is 2, 1.5× as much"]),
    "03.write, off by one": ("03.write", WRITE.replace("< length:", "<= length:"), ["8 tokens need 2 blocks, but the table has 3"]),
    "04.even_stages, the last ones take more": ("04.even_stages", EVEN.replace("stage < rest", "stage >= stages - rest"), ["5 layers, 2 stages: stage 0: expected 3, got 2"]),
    "04.fullest, no head": ("04.fullest", FULLEST.replace("held[-1] += head", ""), ["a head of 5: expected 35, got 30"]),
    "04.fullest, the head everywhere": ("04.fullest", FULLEST.replace("return max(held)", "return max(held) + head"), ["stages of 1 and 3 layers, a head of 5: expected 35, got 40"]),
    "04.cut, even": ("04.cut", EVEN.replace("even_stages(layers, stages)", "cut(layers, stages, first, last)").replace("divmod(layers", "divmod(len(layers)"), ["a head as heavy as 2 layers: weight of the heaviest stage: expected 30, got 40"]),
    "04.cut, one stage too few": ("04.cut", CUT.replace("return next(", "return [*next(").replace("is not None)\n", "is not None)][1:]\n"), ["2 stages were asked for, but the list has 1"]),
    "04.cut, an empty stage": ("04.cut", "def cut(layers, stages, first, last):\n    return [len(layers)] + [0] * (stages - 1)\n", ["[4, 0] leaves stage 1 without a layer"]),
    "04.cut, a layer lost": ("04.cut", "def cut(layers, stages, first, last):\n    return [1] * stages\n", ["[1, 1] are 2 layers, but there are 4"]),
    "05.ends, the stage before is forgotten": ("05.ends", ENDS.replace("max(now, arrived[batch])", "now"), ["2 stages, 1 micro-batch: stage 1: expected 5, got 3"]),
    "05.ends, one after the other": ("05.ends", ENDS.replace("        now = 0\n", "        now = max(arrived)\n"), ["2 equal stages, 3 micro-batches: stage 1: expected 8, got 12"]),
    "05.ends, one number": ("05.ends", ENDS.replace("return result", "return result[-1]"), ["return a list with one number for each stage, here 1"]),
    "05.sizes, the head in front": ("05.sizes", SIZES.replace("return best[1]", "return best[1][::-1]"), ["the slowest stage takes: expected 40, got 60"]),
    "05.sizes, a layer lost": ("05.sizes", SIZES.replace("return best[1]", "return best[1][:-1] + [1]"), ["every stage takes a layer at least, and all together 6"]),
    "05.groups, in order": ("05.groups", GROUPS.replace("sorted(contexts, reverse=True)", "sorted(contexts)"), ["It took", "µs; the target is"]),
    "05.groups, as they come": ("05.groups", GROUPS.replace("sorted(contexts, reverse=True)", "contexts"), ["It took 3,805 µs; the target is 3,340"]),
    "05.groups, one lost": ("05.groups", GROUPS.replace("return result", "result[0].pop()\n    return result"), ["the groups hold 3 requests that are not the 4 given"]),
    "05.groups, too few": ("05.groups", GROUPS.replace("range(stages)", "range(stages - 1)"), ["2 groups are in flight, but there are 1"]),
    "06.tree, a rank too far": ("06.tree", TREE.replace("comm.rank + know < comm.size", "True"), ["rank 1 failed: ValueError: to=3: there are ranks 0 to 2"]),
    "06.tree, down the line": ("06.tree", EXERCISES["06.tree"].starter.replace("# MEND", "# mine"), ["It took 3 rounds; the target is 2, 1.5× as much"]),
    "06.tree, nobody begins": ("06.tree", TREE.replace("if comm.rank < know", "if comm.rank > know"), ["nobody can go on"]),
    "06.exchange, 3x the bytes": ("06.exchange", EXCHANGE.replace("comm.send(row[other : other + 1], to=other)", "for _ in range(3): comm.send(row[other : other + 1], to=other)").replace("comm.recv(result[other : other + 1], source=other)", "for _ in range(3): comm.recv(result[other : other + 1], source=other)"), ["It took 24 bytes of messages; the target is 8, 3.0× as much"]),
    "06.exchange, all send first": ("06.exchange", EXCHANGE.replace("if comm.rank < other", "if True"), ["nobody can go on"]),
    "06.exchange, the own one forgotten": ("06.exchange", EXCHANGE.replace("result[comm.rank] = row[comm.rank]", "result.zero_()"), ["2 ranks: rank 1 at [1]: expected 11, got 0"]),
    "06.ring, a chunk off": ("06.ring", RING.replace("shift(chunks[(comm.rank - step + 1)", "shift(chunks[(comm.rank - step)"), ["2 ranks with 2 numbers each: rank 1 at [1]: expected 4, got 1"]),
    "06.ring, a step too few": ("06.ring", RING.replace("range(comm.size - 1)", "range(comm.size - 2)"), ["2 ranks with 2 numbers each: rank 0 at [0]: expected"]),
    "06.ring, all the way round": ("06.ring", EXERCISES["06.ring"].starter.replace("# MEND", "# mine"), ["It took 24 bytes from the busiest rank; the target is 16, 1.5× as much"]),
    "07.argmax, all logits": ("07.argmax", EXERCISES["07.argmax"].starter.replace("# MEND", "# mine"), ["It took 20 bytes from each rank; the target is 8, 2.5× as much"]),
    "07.argmax, each its own": ("07.argmax", "def argmax(comm, logits):\n    return int(torch.tensor(logits).argmax()) + 5 * comm.rank", ["2 ranks with 5 words each: rank", "expected"]),
    "07.argmax, a place and no word": ("07.argmax", ARGMAX.replace("len(logits) * comm.rank + place", "place"), ["expected", "got"]),
    "07.mlp, no sum": ("07.mlp", MLP.replace("comm.all_reduce(middle @ down.rows(start, stop))", "middle @ down.rows(start, stop)"), ["2 ranks, wide = 4: rank 0 at [0]: expected -12, got 3"]),
    "07.mlp, a column off": ("07.mlp", MLP.replace("up.columns(start, stop)", "up.columns(start + 1, stop + 1)"), ["2 ranks, wide = 4: rank 1 failed"]),
    "07.mlp, all read": ("07.mlp", EXERCISES["07.mlp"].starter.replace("# MEND", "# mine"), ["rank 0 failed: MemoryError: up: 16 numbers read; this rank has room for 8 (line "]),
    "07.mlp, rows first": ("07.mlp", MLP.replace("torch.relu(x @ up.columns(start, stop))", "torch.relu(comm.all_reduce(x.chunk(comm.size)[comm.rank] @ up.rows(4 // comm.size * comm.rank, 4 // comm.size * (comm.rank + 1))))[start:stop]"), ["It took 32 bytes from each rank; the target is 16, 2.0× as much"]),
    "07.mlp, 3x the bytes": ("07.mlp", MLP.replace("return comm.all_reduce(middle @ down.rows(start, stop))", "for _ in range(2): comm.all_reduce(torch.zeros(4))\n    return comm.all_reduce(middle @ down.rows(start, stop))"), ["It took 48 bytes from each rank; the target is 16, 3.0× as much"]),
    "07.heads, all on one": ("07.heads", EXERCISES["07.heads"].starter.replace("# MEND", "# mine"), ["4 query and 4 KV heads on 2 ranks: rank 1 computes no query head"]),
    "07.heads, without its KV head": ("07.heads", HEADS.replace("range(group * head, group * (head + 1))", "range(group * head + 1, group * (head + 1) + 1)"), ["4 query and 2 KV heads on 1 rank: rank 0 computes query head 4, which needs KV head 2; it caches [0, 1]"]),
    "07.heads, one too few": ("07.heads", HEADS.replace("range(group * head, group * (head + 1))", "range(group * head, group * (head + 1) - 1)"), ["4 query and 2 KV heads on 1 rank: query head 1 is computed 0 times; once is right"]),
    "06.ring, all to rank 0 and back": ("06.ring", STAR, ["It took 24 bytes from the busiest rank; the target is 16, 1.5× as much"]),
    "08.waits, the server is always busy": ("08.waits", WAITS.replace("max(time, free)", "free"), ["one request: request 0 waits: expected 0, got -3"]),
    "08.waits, no service": ("08.waits", WAITS.replace("free = begin + service", "free = begin"), ["two at once: request 1 waits: expected 2, got 0"]),
    "08.waits, one too few": ("08.waits", WAITS.replace("return result", "return result[1:]"), ["one request: request 0 waits: expected 0"]),
    "08.replicas, as many as are busy": ("08.replicas", "def replicas(rate, service_s, limit_s):\n    return math.ceil(rate * service_s)", ["10 requests/s of 0.5 s, 1 s: expected 7, got 5"]),
    "08.replicas, one too many": ("08.replicas", REPLICAS.replace("return count", "return count + 1"), ["expected 1, got 2, in replicas(1.0, 0.5, 0.3)"]),
    "08.replicas, half the formula": ("08.replicas", REPLICAS.replace("(2 * (1 - busy))", "(1 - busy)"), ["expected 1, got 2, in replicas(1.0, 0.5, 0.3)"]),
    "08.router, requests counted": ("08.router", ROUTER.replace("+= tokens", "+= 1").replace("-= tokens", "-= 1"), ["a long request, then three short ones, 2 replicas: the results are right. It took 98 ms of waiting", "the target is 20, 4.9× as much"]),
    "08.router, nowhere": ("08.router", ROUTER.replace("return replica", "return None"), ["request 0: arrived returned None; return a replica, 0 … 1"]),
    "08.router, a replica too far": ("08.router", ROUTER.replace("return replica", "return replica + 1"), ["arrived returned 2; return a replica, 0 … 1"]),
    "08.router, ends not heard": ("08.router", ROUTER.replace("self.outstanding[replica] -= tokens", "pass"), ["a long request of long ago, then three at once, 2 replicas: the results are right. It took 80 ms"]),
    "08.router, all to one": ("08.router", ROUTER.replace("replica = self.outstanding.index(min(self.outstanding))", "replica = 0"), ["It took 117 ms of waiting"]),
    "09.place, stages count fastest": ("09.place", PLACE.replace("divmod(rank, tp)", "divmod(rank, pp)").replace("divmod(rest, pp)", "divmod(rest, tp)"), ["rank 1 of tp=2"]),
    "09.place, replicas forgotten": ("09.place", PLACE.replace("replica, stage = divmod(rest, pp)", "replica, stage = 0, rest"), ["rank 5 of dp=2,pp=2,tp=2: replica: expected 1, got 0"]),
    "09.place, backwards": ("09.place", PLACE.replace("return replica, stage, slice", "return slice, stage, replica"), ["rank 1 of tp=2"]),
    "09.token, no sum": ("09.token", TOKEN.replace("result = mine + theirs", "result = mine"), ["pp=1,tp=2: rank 0"]),
    "09.token, both send first": ("09.token", TOKEN.replace("if slice == 0:", "if True:").replace("comm.rank + 1)", "comm.rank ^ 1)"), ["rank 0", "waits for rank 1 to receive"]),
    "09.token, to the wrong slice": ("09.token", TOKEN.replace("comm.send(result, comm.rank + 2)", "comm.send(result, (comm.rank + 2) ^ 1)"), ["rank 0"]),
    "09.token, one stage too far": ("09.token", TOKEN.replace("if comm.rank + 2 < comm.size:", "if True:"), ["ranks 0 to 1"]),
    "09.token, sent three times": ("09.token", TOKEN.replace("comm.send(mine, comm.rank + 1)", "comm.send(mine.repeat(3), comm.rank + 1)").replace("comm.recv(theirs, comm.rank - 1)", "theirs = comm.recv(torch.zeros(12), comm.rank - 1)[:4]"), ["the results are right. It took 64 bytes sent", "target is 32"]),
    "09.fewest, one goal": ("09.fewest", FEWEST.replace("first_s <= ttft_s and ", ""), ["70B on H100s", "first tokens take"]),
    "09.fewest, memory forgotten": ("09.fewest", FEWEST.replace("if fits and ", "if "), ["8B on T4s, 1 request: 900 and 60 ms: one device does not fit into memory"]),
    "09.fewest, more than needed": ("09.fewest", FEWEST.replace("in counts:", "in counts[1:]:"), ["8B on H100s, 1 request: 100 and 20 ms: devices (0: none): expected 1, got 2"]),
    "09.fewest, everything planned": ("09.fewest", FEWEST.replace("for count in counts:", "for count in counts:\n        [plan(n, 1, 1) for n in counts]"), ["layouts planned"]),
    "09.place, a fourth number": ("09.place", PLACE.replace("return replica, stage, slice", "return replica, stage, slice, 7"), ["return (replica, stage, slice); got (0, 0, 1, 7)"]),
    "09.fewest, not quite the goal": ("09.fewest", FEWEST.replace("first_s <= ttft_s", "first_s < ttft_s"), ["goals that tp=4 meets to the dot"]),
    "09.fewest, any of the fewest": ("09.fewest", FEWEST.replace("first_s < best[0]", "first_s > best[0]"), ["takes as many devices"]),
    "09.fewest, no replica": ("09.fewest", FEWEST.replace("best = first_s, (dp, pp, tp)", "best = first_s, (0, pp, tp)"), ["layout: dp=0"]),
    "09.fewest, a layout as text": ("09.fewest", FEWEST.replace("best = first_s, (dp, pp, tp)", "best = first_s, 'tp=2'"), ["return (dp, pp, tp), or None"]),
    "03.write, nothing returned": ("03.write", WRITE.replace("return copies", "return None"), ["return a list of pairs (from, to)"]),
    "10.route, all experts": ("10.route", EXERCISES["10.route"].starter.replace("# MEND", "# mine"), ["two experts, top 1: expert 0: expected 1, got 0.731059"]),
    "10.route, one too many": ("10.route", ROUTE.replace("[:k]", "[: k + 1]"), ["two experts, top 1: expert 0: expected 1, got 0.731059"]),
    "10.route, shares of the sum of all": ("10.route", ROUTE.replace("power / sum(powers)", "power / sum(math.exp(score - max(scores)) for score in scores)"), ["two experts, top 1: expert 0: expected 1, got 0.731059"]),
    "10.route, powers too large": ("10.route", ROUTE.replace("score - max(scores)", "score"), ["high scores, top 2: OverflowError", "math.exp(score)"]),
    "10.route, the lowest": ("10.route", ROUTE.replace("-scores[expert]", "scores[expert]"), ["two experts, top 1: expert 0: expected 1, got 0"]),
    "10.route, all that reach the k-th best": ("10.route", "def route(scores, k):\n    least = sorted(scores)[-k]\n    powers = [math.exp(score - max(scores)) * (score >= least) for score in scores]\n    return [power / sum(powers) for power in powers]", ["three are alike, top 2: expert 1: expected 0.5, got 0.333333"]),
    "10.route, nothing": ("10.route", "def route(scores, k):\n    ...", ["two experts, top 1: return a list of 2 weights, one for each expert, not None"]),
    "10.pack, consecutive": ("10.pack", EXERCISES["10.pack"].starter.replace("# MEND", "# mine"), ["4 experts on 2 ranks: the results are right. It took 16 tokens on the fullest rank; the target is 9, 1.8× as much"]),
    "10.pack, lightest first": ("10.pack", PACK.replace("-loads[expert]", "loads[expert]"), ["the target is 9"]),
    "10.pack, dealt like cards": ("10.pack", "def pack(loads, ranks):\n    order = sorted(range(len(loads)), key=lambda expert: -loads[expert])\n    return [order[rank::ranks] for rank in range(ranks)]", ["It took 11 tokens on the fullest rank; the target is 9, 1.2× as much"]),
    "10.pack, no limit": ("10.pack", PACK.replace("if len(share) < each", ""), ["6 experts on 2 ranks: rank 0 has 1 experts; expected 3, as many on each rank"]),
    "10.pack, one forgotten": ("10.pack", PACK.replace("range(len(loads)), key", "range(1, len(loads)), key"), ["2 experts on 2 ranks: rank 1 has 0 experts; expected 1"]),
    "10.pack, one twice": ("10.pack", PACK.replace("return shares", "return [shares[0]] * ranks"), ["2 experts on 2 ranks: expert 0 is there 2 times; expected once"]),
    "10.pack, sums for experts": ("10.pack", PACK.replace("return shares", "return [sum(share) for share in shares]"), ["return a list with the experts of each of the 2 ranks, not [0, 1]"]),
    "10.pack, counted from one": ("10.pack", PACK.replace("return shares", "return [[held + 1 for held in share] for share in shares]"), ["rank 1 has 2; there are experts 0 to 1"]),
    "11.merge, the mean": ("11.merge", EXERCISES["11.merge"].starter.replace("# MEND", "# mine"), ["one has more keys: number 0: expected 0.75, got 0.5"]),
    "11.merge, no common scale": ("11.merge", MERGE.replace("weight * ", ""), ["one has the better key: number 0: expected"]),
    "11.merge, powers too large": ("11.merge", MERGE.replace("m - most", "m"), ["high scores: OverflowError", "math.exp(m)"]),
    "11.merge, on the scale of the first": ("11.merge", MERGE.replace("max(m for m, l, o in parts)", "parts[0][0]"), ["the first is empty: "]),
    "11.merge, one number": ("11.merge", "def merge(parts):\n    return sum(o[0] for m, l, o in parts)", ["two ranks alike: return a list of 2 numbers, as o has, not 1.0"]),
    "11.travel, nothing back": ("11.travel", EXERCISES["11.travel"].starter.replace("# MEND", "# mine"), ["one token decodes: bytes: expected 4,680, got 2,304"]),
    "11.travel, without m and l": ("11.travel", TRAVEL.replace(" + 2)", ")"), ["one token decodes: bytes: expected 4,680, got 4,608"]),
    "11.travel, a key for each head": ("11.travel", TRAVEL.replace("kv_heads * 2", "heads * 2"), ["a prompt asks one block: bytes: expected 24,576, got 73,728"]),
    "11.travel, a query alone asks": ("11.travel", TRAVEL.replace("return min(asking, moving)", "return asking if queries == 1 else moving"), ["a few tokens, a long document: bytes: expected"]),
    "11.ask, all keys": ("11.ask", EXERCISES["11.ask"].starter.replace("# MEND", "# mine"), ["2 ranks, 3 keys each: the results are right. It took 48 bytes of messages; the target is 24, 2.0× as much"]),
    "11.ask, empty ranks too": ("11.ask", ASK.replace(" if lengths[rank]]", "]").replace("        if keys:\n            comm.send", "        if True:\n            comm.send"), ["4 ranks, none on rank 2: the results are right. It took 72 bytes of messages; the target is 48, 1.5× as much"]),
    "11.ask, no answer": ("11.ask", ASK.replace("comm.send(part(comm.recv(torch.empty(2), source=0)), to=0)", "comm.recv(torch.empty(2), source=0)"), ["nobody can go on:", "rank 0 waits"]),
    "11.ask, its own keys forgotten": ("11.ask", ASK.replace("[part(q), *[comm", "[*[comm"), ["2 ranks, 3 keys each: rank 0 at [0]: expected"]),
    "11.ask, no maximum": ("11.ask", ASK.replace("torch.exp(scores - scores.max())", "torch.exp(scores)").replace("torch.stack((scores.max(), powers.sum()))", "torch.stack((torch.zeros(()), powers.sum()))"), ["2 ranks, scores of hundreds: rank 0 at [0]: expected"]),
    "12.wire, the keys": ("12.wire", EXERCISES["12.wire"].starter.replace("# MEND", "# mine"), ["one creditor: bytes: expected 140,400, got 2,211,840"]),
    "12.wire, whoever is there": ("12.wire", WIRE.replace("sum(blocks > 0 for blocks in borrowed)", "len(borrowed)"), ["nothing of one of them: bytes: expected"]),
    "12.grant, no cap": ("12.grant", EXERCISES["12.grant"].starter.replace("# MEND", "# mine"), ["the cap comes first: blocks granted: expected 3, got 6"]),
    "12.grant, below nothing": ("12.grant", GRANT.replace("max(0, min(asked, free, cap - lent))", "min(asked, free, cap - lent)"), ["more lent than the cap is now: blocks granted: expected 0, got -1"]),
    "12.grant, a part of a firm ask": ("12.grant", GRANT.replace("asked if room == asked else 0", "room"), ["firm, and only a part is free: blocks granted: expected 0, got 4"]),
    "12.grant, firm ones wait too": ("12.grant", GRANT.replace("return asked if room == asked else 0", "return asked if room == asked and not waiting else 0"), ["firm, and somebody waits: blocks granted: expected 2, got 0"]),
    "12.grant, firm asks lend what is lent": ("12.grant", GRANT.replace("    if firm:\n        return asked if room == asked else 0", "    if firm:\n        return asked if asked <= min(free, cap) else 0"), ["firm, and the cap leaves a part: blocks granted: expected 0, got 2"]),
    "12.grant, one waits": ("12.grant", GRANT.replace("if waiting else", "if waiting == 1 else"), ["three wait here: blocks granted: expected 0, got 2"]),
    "12.borrow, all that is said": ("12.borrow", EXERCISES["12.borrow"].starter.replace("# MEND", "# mine"), ["one has enough (need 3, said [2, 5]): blocks held at the end: expected 3, got 7"]),
    "12.borrow, the view believed": ("12.borrow", BORROW.replace("if blocks and ask(creditor, blocks):", "if blocks and (ask(creditor, blocks) or True):"), ["one has less than it is said to have (need 5, said [6, 3, 2], really [1, 3, 2]): blocks held at the end: expected 5, got 0"]),
    "12.borrow, nothing given back": ("12.borrow", BORROW.replace("            give_back(creditor, blocks)", "            pass"), ["nobody has enough (need 9, said [4, 2]): blocks held at the end: expected 0, got 6"]),
    "12.borrow, in order": ("12.borrow", BORROW.replace("sorted(range(len(said)), key=lambda each: -said[each])", "range(len(said))"), ["one has enough (need 3, said [2, 5]): the results are right. It took 2 asks; the target is 1"]),
    "12.borrow, one of two that are equal": ("12.borrow", BORROW.replace("sorted(range(len(said)), key=lambda each: -said[each])", "[said.index(each) for each in sorted(said, reverse=True)]"), ["all alike (need 6, said [3, 3]): "]),
    "12.borrow, no such instance": ("12.borrow", "def borrow(need, said, ask, give_back):\n    return ask(len(said), need)", ["one has enough (need 3, said [2, 5]): there is no instance 2"]),
    "13.share, half of them": ("13.share", EXERCISES["13.share"].starter.replace("# MEND", "# mine"), ["prefill is faster: instances that read prompts: expected 2, got 4, in readers(8, 30, 10)"]),
    "13.share, all may read": ("13.share", SHARE.replace("range(1, instances)", "range(instances + 1)").replace("min(n * prefill_rate, (instances - n) * decode_rate)", "n * prefill_rate"), ["expected 4, got 8"]),
    "13.share, the last of equals": ("13.share", SHARE.replace("range(1, instances)", "range(instances - 1, 0, -1)"), ["two ratios serve as many: instances that read prompts: expected 1, got 2"]),
    "13.share, by proportion": ("13.share", "def readers(instances, prefill_rate, decode_rate):\n    return max(1, min(instances - 1, round(instances * decode_rate / (prefill_rate + decode_rate))))", ["expected"]),
    "13.share, rounded down": ("13.share", "def readers(instances, prefill_rate, decode_rate):\n    return max(1, int(instances * decode_rate / (prefill_rate + decode_rate)))", ["expected"]),
    "13.share, never the last": ("13.share", SHARE.replace("range(1, instances)", "range(1, max(2, instances - 1))"), ["one decoder suffices: instances that read prompts: expected 7, got 6"]),
    "13.pull, two tokens more": ("13.pull", PULL.replace("tokens // 16 + 1  #", "(tokens + 1) // 16 + 1  #"), ["one token more fills the block: caches to pull: expected 1, got 0"]),
    "13.pull, one block for all that run": ("13.pull", PULL.replace("sum(tokens % 16 == 0 for tokens in running)", "any(tokens % 16 == 0 for tokens in running)"), ["two that run want one each: caches to pull: expected 1, got 2"]),
    "13.pull, whoever fits": ("13.pull", PULL.replace("            break", "            room += tokens // 16 + 1\n            continue"), ["nobody overtakes: caches to pull: expected 0, got 1"]),
    "13.pull, the next token forgotten": ("13.pull", PULL.replace("tokens // 16 + 1  #", "-(-tokens // 16)  #"), ["full blocks need one more: caches to pull: expected 0, got 1"]),
    "13.pull, those that run forgotten": ("13.pull", PULL.replace("free - sum(tokens % 16 == 0 for tokens in running)", "free"), ["no block is left for them: caches to pull: expected 0, got 1"]),
    "13.pull, a block for each that runs": ("13.pull", PULL.replace("sum(tokens % 16 == 0 for tokens in running)", "len(running)"), ["expected 1, got 0"]),
    "13.plan, all of the first": ("13.plan", EXERCISES["13.plan"].starter.replace("# MEND", "# mine"), ["tp=2 to one rank: (0, 0, (0, 4), (0, 2)): source 0 does not hold head 1 of layer 0"]),
    "13.plan, copies twice": ("13.plan", PLAN.replace("held not in sources[:s] and ", ""), ["two ranks hold the same head: head 0 of layer 0 comes to target 0 2 times, from sources 0 and 1: expected once"]),
    "13.plan, layer by layer": ("13.plan", PLAN.replace("sends.append((s, t, *both))", "sends += [(s, t, (layer, layer + 1), both[1]) for layer in range(*both[0])]"), ["one rank to one: the results are right. It took 4 messages; the target is 1, 4.0× as much"]),
    "13.plan, the first target only": ("13.plan", PLAN.replace("enumerate(targets)", "enumerate(targets[:1])"), ["one rank to pp=2: head 0 of layer 2 comes to target 1 never: expected once"]),
    "13.plan, no list": ("13.plan", "def plan(sources, targets):\n    ...", ["one rank to one: return a list of sends, not None"]),
    "13.plan, half a send": ("13.plan", "def plan(sources, targets):\n    return [(0, 0)]", ["one rank to one: a send is (source, target, (layer, layer), (head, head)), not (0, 0)"]),
    "14.batch, a long one with others": ("14.batch", FILL.replace("if count and total + tokens > saturating", "if total > saturating"), ["the second is too much: prompts in the step: expected 1, got 2"]),
    "14.batch, a long one never": ("14.batch", FILL.replace("if count and total", "if total"), ["a long one goes alone: prompts in the step: expected 1, got 0"]),
    "14.batch, whoever fits": ("14.batch", FILL.replace("            break", "            continue"), ["a long one waits its turn: prompts in the step: expected 1, got 2"]),
    "14.batch, one less": ("14.batch", FILL.replace("> saturating", ">= saturating"), ["exactly L_m: prompts in the step: expected 2, got 1"]),
    "14.means, negative waits": ("14.means", MEANS.replace("if load < 2:", "if True:").replace("if load < gain:", "if load != gain:"), ["only the pipeline keeps up: tensor parallel ranks: expected inf, got"]),
    "14.means, divided by nothing": ("14.means", MEANS.replace("if load < gain:", "if load <= gain:"), ["at the limit of tensor parallel ranks: ZeroDivisionError"]),
    "14.means, a rate for a load": ("14.means", MEANS.replace("load = rate * service_s", "load = rate"), ["short prompts, as busy: the pipeline: expected"]),
    "14.means, M/D/1": ("14.means", MEANS.replace("(4 * (2 - load))", "(2 * (1 - load))"), ["hardly anybody there: the pipeline: expected 1.01316, got"]),
    "14.place, always two and one": ("14.place", "def place(simulate):\n    return 2, 1", ["serves", "requests/s for each GPU within the goals; another pair serves"]),
    "14.place, every goodput": ("14.place", "def place(simulate):\n    pairs = [(p, d) for p in (1, 2, 4) for d in (1, 2, 4)]\n    def goodput(pair):\n        low, high = 0.2, 12.0\n        while high > 1.08 * low:\n            rate = (low * high) ** 0.5\n            low, high = (rate, high) if simulate(*pair, rate) >= 0.9 else (low, rate)\n        return low\n    return max(pairs, key=goodput)", ["the results are right. It took", "simulations; the target is 50"]),
    "14.place, to three digits": ("14.place", "def place(simulate):\n    pairs = [(p, d) for p in (1, 2, 4) for d in (1, 2, 4)]\n    def goodput(pair):\n        rate = 0.2\n        while simulate(*pair, rate) >= 0.9:\n            rate *= 1.05\n        return rate\n    return max(pairs, key=goodput)", ["250 simulations, and no end: the target is 50"]),
    "14.place, at one rate": ("14.place", EXERCISES["14.place"].starter.replace("1.0)", "3)"), ["requests/s for each GPU within the goals; another pair serves"]),
    "14.place, overloaded": ("14.place", EXERCISES["14.place"].starter.replace("1.0)", "16)"), ["requests/s for each GPU within the goals; another pair serves"]),
    "14.place, no pair": ("14.place", "def place(simulate):\n    return 3", ["return (prefill ranks, decode ranks), each 1, 2 or 4, not 3"]),
    "14.place, three ranks": ("14.place", "def place(simulate):\n    simulate(3, 1, 1.0)", ["instances have 1, 2 or 4 ranks"]),
    "14.place, no rate": ("14.place", "def place(simulate):\n    simulate(1, 1, 0)", ["give requests/s for each GPU, above 0 and up to 24"]),
    "15.provision, rounded": ("15.provision", WATTS.replace("math.ceil", "round"), ["whole machines: machines that read: expected 3, got 2"]),
    "15.provision, fewest machines": ("15.provision", WATTS.replace("counts[n] * kinds[n][1]", "counts[n]"), ["the slower kind draws less: kind of those that decode: expected 1, got 0"]),
    "15.provision, watts of one": ("15.provision", WATTS.replace("counts[n] * kinds[n][1]", "kinds[n][1]"), ["the faster kind draws less: kind of those that decode: expected 0, got 1"]),
    "15.provision, not whole": ("15.provision", WATTS.replace("key=lambda n: counts[n] *", "key=lambda n: rate / kinds[n][0] *"), ["rounding decides: "]),
    "15.missed, of the sorted times": ("15.missed", MISSED.replace("sorted(time / one for time, one in zip(times, alone))", "[t / a for t, a in zip(sorted(times), sorted(alone))]"), ["expected"]),
    "15.missed, sorted apart": ("15.missed", MISSED.replace("zip(times, alone)", "zip(sorted(times), sorted(alone))"), ["the long one is quick, the short one is not: entry 1 of your list: expected 90, got"]),
    "15.missed, rounded": ("15.missed", MISSED.replace("math.ceil(p / 100 * len(slow))", "max(1, round(p / 100 * len(slow)))"), ["expected"]),
    "15.missed, none": ("15.missed", MISSED.replace("> limit]", "> 99 * limit]"), ["one request, late: entry 1 of your list: expected 50, got nothing"]),
    "15.missed, the last one": ("15.missed", MISSED.replace("slow[math.ceil(p / 100 * len(slow)) - 1]", "(slow[-1] if p == 99 else slow[math.ceil(p / 100 * len(slow)) - 1])"), ["one in 200 is late: "]),
    "15.missed, in order": ("15.missed", MISSED.replace("return [p for", "return sorted(p for").replace("> limit]", "> limit)"), ["limits in another order: entry 1 of your list: expected 99, got 50"]),
    "15.provision, two kinds": ("15.provision", WATTS.replace("range(len(kinds))", "range(min(2, len(kinds)))"), ["the third kind draws least: kind of those that decode: expected 2, got 0"]),
    "15.provision, fewest of equals": ("15.provision", WATTS.replace("key=lambda n: counts[n] * kinds[n][1]", "key=lambda n: (counts[n] * kinds[n][1], counts[n])"), ["as many watts, fewer machines: kind of those that decode: expected 0, got 1"]),
    "15.missed, unsorted": ("15.missed", MISSED.replace("sorted(time / one for time, one in zip(times, alone))", "[time / one for time, one in zip(times, alone)]"), ["unsorted: "]),
    "15.missed, a rank off": ("15.missed", MISSED.replace("len(slow)) - 1]", "len(slow)) - 2]"), ["expected"]),
    "15.missed, seconds": ("15.missed", MISSED.replace("time / one", "time"), ["long prompts may take long: entry 1 of your list: expected nothing more, got 90"]),
    "15.missed, at the limit": ("15.missed", MISSED.replace("> limit", ">= limit"), ["at the limit is kept: "]),
    "15.router, the shortest queue": ("15.router", EXERCISES["15.router"].starter.replace("# MEND", "# mine"), ["ms until the first token (90 of 100 requests); the target is"]),
    "15.router, always the fast one": ("15.router", SOONEST.replace("machine = soon.index(min(soon))", "machine = self.speeds.index(max(self.speeds))"), ["ms until the first token (90 of 100 requests); the target is"]),
    "15.router, tokens less speed": ("15.router", SOONEST.replace("(waits + prompt) / speed", "waits - 1000 * speed"), ["a crowd at once, A100 and H100: the results are right. It took"]),
    "15.router, nothing forgotten": ("15.router", SOONEST.replace("        self.pending[machine] -= prompt", "        pass"), ["ms until the first token (90 of 100 requests); the target is"]),
    "15.router, a machine too many": ("15.router", SOONEST.replace("        return machine", "        return 2"), ["request 0: arrived returned 2; return a machine, 0 … 1"]),
    "16.room, the upper end": ("16.room", ROOM.replace("* width)", "* width + width)"), ["surely short: tokens: expected 101, got 300"]),
    "16.room, without the prompt": ("16.room", ROOM.replace("prompt + max", "max"), ["surely short: tokens: expected 101, got 1"]),
    "16.room, the last of equals": ("16.room", ROOM.replace("chances.index(max(chances))", "max(range(len(chances)), key=lambda i: (chances[i], i))"), ["as likely: tokens: expected 11, got 110"]),
    "16.room, on average": ("16.room", "def room(prompt, chances, width):\n    return prompt + max(1, int(sum(i * chance for i, chance in enumerate(chances)) * width))", ["the second bucket: tokens: expected 300, got 320"]),
    "16.order, the longest first": ("16.order", ORDER.replace("key=lambda number: prompts[number])", "key=lambda number: -prompts[number])"), ["two, the short one came later: place 0: expected 1, got 0"]),
    "16.order, all at once": ("16.order", EXERCISES["16.order"].starter.replace("# MEND", "# mine"), ["two windows: place 0: expected 1, got 3"]),
    "16.order, tokens": ("16.order", "def order(prompts, size):\n    return sorted(prompts)", ["one: place 0: expected 0, got 300"]),
    "16.order, equals turned": ("16.order", ORDER.replace("key=lambda number: prompts[number])", "key=lambda number: (prompts[number], -number))"), ["equals stay in order: place 0: expected 1, got 3"]),
    "16.reserve, greedy": ("16.reserve", EXERCISES["16.reserve"].starter.replace("# MEND", "# mine"), ["the others grow until then: admit(30, 60, 60, [(40, 50), (100, 90), (100, 90)]): the answer: expected False, got True"]),
    "16.reserve, static": ("16.reserve", "def admit(tokens, to_come, free, running):\n    return tokens + (to_come if running else 1) <= free", ["it fits when the first has ended: admit(30, 50, 60, [(100, 5)]): the answer: expected True, got False"]),
    "16.reserve, no room now": ("16.reserve", ADMIT.replace("tokens + 1 > free or not running", "not running"), ["it has no room now: admit(60, 5, 60, [(100, 5)]): the answer: expected False, got True"]),
    "16.reserve, who has most": ("16.reserve", ADMIT.replace("min(running, key=lambda each: each[1])", "max(running)"), ["who ends first is not who has most: admit(20, 90, 50, [(10, 2), (300, 50)]): the answer: expected False, got True"]),
    "16.reserve, who has least": ("16.reserve", ADMIT.replace("min(running, key=lambda each: each[1])", "min(running)"), ["who ends first has most: admit(20, 90, 50, [(10, 50), (300, 2)]): the answer: expected True, got False"]),
    "16.reserve, less than": ("16.reserve", ADMIT.replace("<= then", "< then"), ["just enough: admit(30, 70, 60, [(40, 20)]): the answer: expected True, got False"]),
    "16.reserve, the first three": ("16.reserve", ADMIT.replace("min(running, key", "min(running[:3], key"), ["that was drawn: the answer: expected"]),
    "16.reserve, too careful": ("16.reserve", ADMIT.replace("    has, steps", "    if len(running) > 40:\n        return False\n    has, steps"), ["that was drawn: the answer: expected True, got False"]),
    "16.reserve, nobody grows": ("16.reserve", ADMIT.replace("free - steps * len(running) + has + steps", "free + has"), ["the others grow until then: admit(30, 60, 60, [(40, 50), (100, 90), (100, 90)]): the answer: expected False, got True"]),
    "16.reserve, what it takes meanwhile": ("16.reserve", ADMIT.replace("+ has + steps", "+ has"), ["expected True, got False"]),
    "16.reserve, never alone": ("16.reserve", ADMIT.replace("return tokens + 1 <= free", "return False"), ["nobody runs, and it fits: admit(30, 50, 40, []): the answer: expected True, got False"]),
    "16.reserve, no answer": ("16.reserve", "def admit(tokens, to_come, free, running):\n    ...", ["return True or False, not None"]),
    "12.borrow, nothing said": ("12.borrow", "def borrow(need, said, ask, give_back):\n    ask(0, need)", ["one has enough (need 3, said [2, 5]): "]),
    "10.dispatch, all to all ranks": ("10.dispatch", EXERCISES["10.dispatch"].starter.replace("# MEND", "# mine"), ["2 ranks, each token with one expert: the results are right. It took 112 bytes of messages; the target is 32, 3.5× as much"]),
    "10.dispatch, for each expert": ("10.dispatch", PER_PAIR, ["2 ranks, both experts on one of them: the results are right. It took 48 bytes of messages; the target is 32, 1.5× as much"]),
    "10.dispatch, no answer": ("10.dispatch", DISPATCH.replace("back = comm.all_to_all(came * factors[:, None], recv, send)", "back = came * factors[:, None]"), ["2 ranks, each token with one expert: rank 0 at [1, 0]: expected 4, got 55"]),
    "10.dispatch, the lists not exchanged": ("10.dispatch", DISPATCH.replace("None], recv, send)", "None], send, recv)"), ["3 ranks, nobody asks rank 2: rank 0 failed: ValueError: all_to_all: send_rows=[2, 1, 0] for 5 rows"]),
    "10.dispatch, one expert off": ("10.dispatch", DISPATCH.replace("sum(w[e] for e in held)", "w[held[0]]"), ["2 ranks, both experts on one of them: rank 0 at [0, 0]: expected 9, got 2"]),
    "10.dispatch, computed at home": ("10.dispatch", "def mixture(comm, given):\n    rows, choices, w = given\n    sums = [sum(w[e] for e in experts) for experts in choices[comm.rank]]\n    return torch.tensor(sums)[:, None] * torch.tensor(rows)", ["2 ranks, each token with one expert: rank 0 failed: KeyError: 2"]),
    "10.dispatch, answers to the first tokens": ("10.dispatch", DISPATCH.replace("index_add_(0, tokens, back)", "index_add_(0, tokens.sort().values, back)"), ["at [0, 0]: expected"]),
}  # fmt: skip


def attempt(name: str, source: str) -> str:
    """What a learner sees, and that it takes one screen and less than 10 s."""
    desk, began = Desk({}), time.monotonic()
    said, figure = desk.submit(name, source)
    assert time.monotonic() - began < 10
    assert len(said.splitlines()) <= SCREEN_LINES
    assert all(len(line) <= SCREEN_COLUMNS for line in said.splitlines())
    if figure is not None:
        assert png(figure).startswith(b"\x89PNG")
    assert callable(desk.namespace[EXERCISES[name].function])  # the lesson goes on
    return said


@pytest.mark.parametrize("name", EXERCISES)
def test_the_frame_is_not_solved_and_the_solution_is(name: str) -> None:
    assert attempt(name, EXERCISES[name].starter).startswith("not solved yet. ")
    assert "hint" not in attempt(name, EXERCISES[name].starter)  # nothing was tried
    assert attempt(name, EXERCISES[name].solution).startswith("solved: right in ")


OTHER_WAYS = {  # that are as right as ours
    "09.fewest, all at once": ("09.fewest", """
def fewest(plan, counts, ttft_s, tpot_s):
    for count in counts:
        layouts = [(d, p, count // (d * p)) for d in range(1, count + 1) for p in range(1, count + 1) if count % (d * p) == 0]
        good = [each for each in layouts if plan(*each)[2] and plan(*each)[0] <= ttft_s and plan(*each)[1] <= tpot_s]
        if good:
            return min(good, key=lambda each: plan(*each)[0])
"""),
    "10.dispatch, by send and recv": ("10.dispatch", """
def mixture(comm, given):
    rows, choices, w = given
    x = torch.tensor(rows)
    def asked(source, to):
        return [t for t, experts in enumerate(choices[source]) if any(e // 2 == to for e in experts)]
    def said(row, experts):
        return sum(w[e] * row for e in experts if e in w)
    mine = choices[comm.rank]
    total = torch.stack([said(row, experts) + torch.zeros_like(row) for row, experts in zip(x, mine)])
    for asker in range(comm.size):
        for expert_rank in range(comm.size):
            if asker != expert_rank and comm.rank == asker:
                for token in asked(asker, expert_rank):
                    comm.send(x[token], to=expert_rank)
                    total[token] += comm.recv(torch.empty_like(x[0]), source=expert_rank)
            if asker != expert_rank and comm.rank == expert_rank:
                for token in asked(asker, expert_rank):
                    row = comm.recv(torch.empty_like(x[0]), source=asker)
                    comm.send(said(row, choices[asker][token]), to=asker)
    return total
"""),
    "10.route, sorted": ("10.route", "def route(scores, k):\n    kept = torch.full((len(scores),), -math.inf)\n    best = torch.tensor(scores).sort(descending=True, stable=True)\n    kept[best.indices[:k]] = best.values[:k]\n    return kept.softmax(0).tolist()"),
    "10.pack, tuples": ("10.pack", PACK.replace("return shares", "return tuple(tuple(reversed(share)) for share in shares)")),
    "09.place, divisions": ("09.place", "def place(rank, dp, pp, tp):\n    return [rank // (pp * tp), rank // tp % pp, rank % tp]"),
    "09.token, slices crossed": ("09.token", TOKEN.replace("comm.recv(torch.zeros(4), comm.rank - 2)", "comm.recv(torch.zeros(4), (comm.rank - 2) ^ 1)").replace("comm.send(result, comm.rank + 2)", "comm.send(result, (comm.rank + 2) ^ 1)")),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_WAYS)
def test_other_ways_are_right_too(case: str) -> None:
    name, source = OTHER_WAYS[case]
    assert source != EXERCISES[name].solution
    assert attempt(name, source).startswith("solved: right in ")


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_attempt_is_told_one_fact(case: str) -> None:
    name, source, texts = WRONG[case]
    assert source != EXERCISES[name].solution
    said = attempt(name, source)
    assert said.startswith("not solved yet. ")
    for text in texts:
        assert text in said, said


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("def total(comm, number)\n    return 1", "line 1: expected ':': def total(comm, number)"),
        ("", "does not define total"),
        ("x = 1", "does not define total"),
        ("def total(comm, number):\n    while True:\n        pass", "rank 0 did not come to an end and was stopped; it stood at line "),
        ("def total(comm, number):\n    if comm.rank == 1:\n        while True:\n            pass\n    return 30.0", "rank 1 did not come to an end"),
        ("while True:\n    print", "did not come to an end within 8 s and was stopped; it stood at line "),
        ("def total(comm, number):\n    return missing", "NameError: name 'missing' is not defined (line 2: return missing); the cell runs by itself"),
        ("def total(comm, number):\n    comm.send(torch.zeros(1), to=comm.rank)", "to=0: rank 0 cannot exchange messages with itself"),
        ("def total(comm, number):\n    comm.send(torch.zeros(1), to=9)", "to=9: there are ranks 0 to 1"),
        ("import os\ndef total(comm, number):\n    os._exit(3)", "the cell's process ended: rank 0 died: exited with status 3"),
        ("raise RuntimeError('oh')", "the cell fails: RuntimeError: oh (line 1"),
        ("int('x')", "the cell fails: ValueError: invalid literal for int()"),
        ("import sys\nsys.exit(3)", "the cell fails: SystemExit: 3"),
        ("import sys\ndef total(comm, number):\n    sys.exit(3)", "rank 0 failed: SystemExit: 3 (line 3: sys.exit(3))"),
        ("def total(comm, number):\n    raise ValueError('long\\n' * 500)", "rank 0 failed: ValueError: long long long"),
        ("def total(comm, number: Missing):\n    return 1", "NameError: name 'Missing' is not defined"),
        ("x = 'a\0b'", "null bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_graded_says_why(source: str, text: str) -> None:
    assert text in attempt("00.total", source)


def test_hints_come_after_the_first_and_the_third_failure() -> None:
    desk, exercise = Desk({}), EXERCISES["01.kv_bytes"]
    wrong = exercise.solution.replace("2 *", "3 *")
    told = [desk.submit(exercise.name, wrong)[0].count("hint: ") for _ in range(3)]
    assert told == [1, 1, 2]
    assert exercise.solution in solution(exercise.name).data


def test_hints_are_for_what_ran() -> None:
    """A syntax error or an endless loop is no attempt at the idea."""
    said = Desk({}).submit("01.kv_bytes", "def kv_bytes(:")[0]
    assert "hint" not in said
    assert "line 1: invalid syntax" in said


def test_the_reference_steps_in_and_ones_own_solution_stays() -> None:
    desk = Desk({})
    desk.submit("01.kv_bytes", EXERCISES["01.kv_bytes"].starter)
    assert desk.namespace["kv_bytes"](1, 1, 1, 1, 1, 1) == 2
    own = "def kv_bytes(*numbers):\n    return 2 * math.prod(numbers)"
    assert desk.submit("01.kv_bytes", own)[0].startswith("solved")
    assert desk.namespace["kv_bytes"].__code__.co_varnames == ("numbers",)


def test_the_magic(capsys: pytest.CaptureFixture[str]) -> None:
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "minillm")
    shell.run_cell_magic("exercise", "01.kv_bytes", EXERCISES["01.kv_bytes"].solution)
    shell.run_cell_magic("exercise", "00.tell --here", EXERCISES["00.tell"].solution)
    shell.run_cell_magic("exercise", "00.tell", "def tell(comm, number:\n")
    shown = capsys.readouterr().out
    assert shown.count("solved: ") == 2
    assert "not solved yet. line 2: '(' was never closed" in shown  # as the notebook counts, with the magic's line
    with pytest.raises(ValueError, match="there is no exercise '00.nothing'; there are 00.shift"):
        shell.run_cell_magic("exercise", "00.nothing", "x")
    with pytest.raises(ValueError, match="name one exercise"):
        shell.run_cell_magic("exercise", "", "x")


def test_here_a_debugger_can_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --here the learner's code runs in this process: a breakpoint is reached, in every rank in turn."""
    stops: list[str] = []
    monkeypatch.setattr("pdb.Pdb.set_trace", lambda self, frame: stops.append(frame.f_code.co_name))
    hook = sys.breakpointhook
    source = EXERCISES["00.tell"].solution.replace("held = ", "breakpoint(); held = ")
    assert Desk({}).submit("00.tell", source, here=True)[0].startswith("solved")
    assert stops == ["tell"] * (2 + 3 + 4)
    assert sys.breakpointhook is hook


def test_right_on_the_toy_alone_is_not_solved() -> None:
    """A function that works only on toy ranks is caught by the real ones."""
    source = "def tell(comm, number):\n    toy = type(comm).__name__ == 'ToyComm'\n" + TELL.split("\n", 1)[1].replace(
        "return held.item()", "return held.item() if toy else 0.0"
    )
    assert (
        "right on the toy, but on 4 ranks with 23, 6, 17, 5, real ones, rank 0: expected 23, got 0"
        in judge(EXERCISES["00.tell"], source).text
    )


def test_what_an_attempt_prints_is_kept_and_cut() -> None:
    source = TELL.replace("held = ", "print('here is', comm.rank); held = ")
    said = Desk({}).submit("00.tell", source)[0].splitlines()
    assert said[:3] == ["rank 0: here is 0", "rank 1: here is 1", "rank 0: here is 0"]
    assert said[-1].startswith("solved")
    flood = "for line in range(100_000):\n    print(line)\n" + TELL
    said = Desk({}).submit("00.tell", flood)[0].splitlines()
    assert said[40] == "… and 99,960 lines more"
    assert len(said) == 42


def test_here_errors_are_told_too() -> None:
    desk = Desk({})
    assert (
        "the cell fails: NameError: name 'oh' is not defined (line 1: oh)" in desk.submit("00.tell", "oh", here=True)[0]
    )
    assert "line 1: comm.nothing()" in desk.submit("00.tell", "def tell(comm, n): comm.nothing()", here=True)[
        0
    ].replace("def tell(comm, n): ", "")


def test_a_picture_never_hides_a_verdict() -> None:
    """Results that no axis can show: a text with a dollar sign, a tensor."""
    for value in ("r'$\\x$'", "torch.ones(2)", "comm"):
        said, figure = Desk({}).submit("00.tell", f"def tell(comm, n):\n    return {value}")
        assert "expected 10, got" in said
        assert figure is not None
        assert png(figure).startswith(b"\x89PNG")


def test_real_ranks_refuse_what_toy_ranks_refuse(ranks2: Ranks) -> None:
    def to_nobody(comm, to: int) -> str:
        try:
            comm.send(torch.zeros(1), to=to)
        except ValueError as error:
            return str(error).replace("this group has", "there are")
        return "sent"

    for to in (-1, 0, 2):
        toy = run_toy(lambda comm, _, to=to: to_nobody(comm, to) if comm.rank == 0 else None, [None, None])
        real = ranks2.run(
            lambda to=to: [to_nobody(comm, to) if comm.rank == 0 else None for comm in [context().comm()]][0]
        )
        assert toy.results[0] == real[0] != "sent"


def program(comm, script: list[tuple[int, int]]) -> list[float]:
    """Send and receive along a script of (source, target), the same on the toy and on real ranks."""
    seen = []
    for number, (source, target) in enumerate(script):
        if comm.rank == source:
            comm.send(torch.tensor([float(number)]), to=target)
        elif comm.rank == target:
            held = torch.zeros(1)
            comm.recv(held, source=source)
            seen.append(held.item())
    comm.barrier()
    return [
        *seen,
        comm.all_reduce(torch.tensor([float(comm.rank)])).item(),
        *comm.all_gather(torch.tensor([comm.rank])).tolist(),
    ]


pairs = st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(lambda pair: pair[0] != pair[1])


@settings(max_examples=20, deadline=None)
@given(script=st.lists(pairs, max_size=12))
def test_toy_ranks_do_what_real_ranks_do(ranks4, script: list[tuple[int, int]]) -> None:
    toy = run_toy(program, [script] * 4)
    assert toy.ended
    assert toy.results == ranks4.run(lambda: program(context().comm(), script))


@settings(max_examples=200, deadline=None)
@given(script=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["send", "recv"]), st.integers(0, 2)), max_size=8))
def test_a_toy_run_always_ends(script: list[tuple[int, str, int]]) -> None:
    """Whatever ranks do, the run ends by itself: with results, or with who waits for whom."""

    def job(comm, _) -> None:
        for rank, what, other in script:
            if rank == comm.rank and other != rank:
                tensor = torch.zeros(1)
                comm.send(tensor, to=other) if what == "send" else comm.recv(tensor, source=other)

    toy = run_toy(job, [None] * 3, limit_s=5.0)
    assert not toy.endless
    assert not toy.errors
    assert set(toy.waits) == set(toy.waits_for)
    again = run_toy(job, [None] * 3, limit_s=5.0)
    assert (again.messages, again.waits) == (toy.messages, toy.waits)


def test_a_toy_all_to_all_of_uneven_parts() -> None:
    """Rank r sends r + i rows to rank i; what a rank expects and is not sent is told."""

    def job(comm, _):
        send = [comm.rank + other for other in range(comm.size)]
        rows = torch.cat([torch.full((count, 2), 10.0 * comm.rank + other) for other, count in enumerate(send)])
        return comm.all_to_all(rows, send, send)[:, 0].tolist()

    toy = run_toy(job, [None] * 3)
    assert toy.results[1] == [1.0, 11.0, 11.0, 21.0, 21.0, 21.0] and not toy.errors
    assert sum(message.bytes for message in toy.messages) == 8 * 2 * (1 + 2 + 3)
    wrong = run_toy(lambda comm, _: comm.all_to_all(torch.zeros(2, 3), [1, 1], [1, 2 - comm.rank]), [None] * 2)
    assert "rank 1 sent [1, 3] float32, but rank 0 receives into [2, 3] float32" in wrong.errors[0]
    short = run_toy(lambda comm, _: comm.all_to_all(torch.zeros(2, 3), [1, 2], [1, 1]), [None] * 2)
    assert "send_rows=[1, 2] for 2 rows" in short.errors[0]


def test_first_difference() -> None:
    assert first_difference([1, 2.0], [1.0, 2]) is None
    assert first_difference([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 3.0])]) == (0, (1,), 2.0, 3.0)
    assert first_difference([torch.zeros(2)], [None]) == (0, (), "a tensor [2]", "None")
    assert first_difference([1, 2], [1]) == (1, (), 2, "nothing")
