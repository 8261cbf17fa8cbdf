"""One rank of an instance: its part of the model, and what the launching process asks of it.

Functions here run on all ranks of an instance alike, by `Ranks.run`. Rank 0 leads: it has the engine, takes requests that
are posted to it, and reports what they give; where replicas share experts, so does the first rank of each. What a rank holds stays between calls, in its context.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from minillm.engine.engine import Engine
from minillm.engine.intake import Intake
from minillm.engine.request import Piece, Request, with_twins
from minillm.engine.runner import default_num_blocks, weight_bytes
from minillm.kv.paged import PagedCache
from minillm.model.config_json import read_config
from minillm.model.decoder import Decoder
from minillm.model.moe import Tally
from minillm.model.tokenizer import Tokenizer
from minillm.parallel.borrower import Borrower
from minillm.parallel.context import ContextGroup
from minillm.parallel.door import Door
from minillm.parallel.layout import Layout
from minillm.parallel.lending import Lending
from minillm.parallel.loading import check_alike, load_part
from minillm.parallel.mesh import DeviceMesh
from minillm.parallel.messages import Loaded, Message, Recording, Seen, Told, Turn
from minillm.parallel.pipe import Pipe
from minillm.parallel.pipeline import Stage
from minillm.parallel.runner import PipelineRunner
from minillm.parallel.sharing import SharedWeights
from minillm.policy.options import EngineOptions
from minillm.policy.request import Order
from minillm.ranks.baton import Baton
from minillm.ranks.comm import Comm
from minillm.ranks.membership import RankContext, context
from minillm.trace.recorder import Recorder

SHORT_S = 0.001
POST_S = 0.2  # how long rank 0 waits for what it was called for: posts take a way of their own
REPORT_SPANS = 256  # how many a rank keeps before it reports them


class Outfit(Protocol):
    """What a seat needs to work with other instances."""

    def close(self) -> None: ...


@dataclass
class Seat:
    """One engine of the instance, as far as it is on this rank: a stage, and on rank 0 the engine itself."""

    stage: Stage
    options: EngineOptions
    engine: Engine | None = None
    runner: PipelineRunner | None = None
    told: WeakKeyDictionary[Request, int] = field(default_factory=WeakKeyDictionary)  # moments of its life
    outfit: Outfit | None = None  # what it needs to work with other instances


@dataclass
class Member:
    """What a rank of an instance holds."""

    layout: Layout
    model: Decoder
    pipe: Pipe
    everyone: Comm  # all ranks of the instance
    intake: Intake
    tally: Tally
    seats: dict[int, Seat] = field(default_factory=dict)
    mail: dict[int, list[Message]] = field(default_factory=dict)  # for engines that have not been called yet


def load(
    instance: str, folder: Path, layout: Layout, dtype: torch.dtype, shared: SharedWeights | None = None
) -> Loaded:
    """Read this rank's part of the checkpoint. Ranks may hold several instances, each under a name of its own."""
    here = context()
    mesh = DeviceMesh(layout, here)
    check_alike(mesh.all(), folder, dtype)
    pipe = Pipe(
        mesh.comm("pp"), mesh.comm("pp", host=True), mesh.comm("stage", host=True)
    )  # while all are there: reading takes long
    if layout.ep > 1:
        pipe.leaders = mesh.comm("dp", host=True)
    cp = mesh.comm("cp") if layout.cp > 1 else None
    part = load_part(folder, mesh, pipe.wire, dtype, shared)
    pipe.tensor, pipe.experts = part.tensor, part.experts
    if cp is not None:
        pipe.context = ContextGroup(cp, part.tensor, pipe.wire)
    for layer in part.model.layers:  # a long prompt is no fault
        layer.register_forward_hook(lambda *_: here.tick())
    here.held[instance] = Member(
        layout, part.model, pipe, mesh.all(), Intake(read_config(folder), Tokenizer(folder)), part.tally
    )
    return Loaded(part.bytes_read, weight_bytes(part.model), part.shared_bytes)


def unload(instance: str) -> None:
    """Let go of an instance."""
    context().held.pop(instance, None)


def open_engine(instance: str, engine: int, options: EngineOptions, order: Order, door: Door | None = None) -> int:
    """Make an engine; returns how many blocks its KV cache has, which is what the rank with the least room has. With a door it works with
    other instances, equipped as the door says.
    """
    here, member = context(), member_of(instance)
    close_engine(instance, engine)
    member.mail.pop(engine, None)  # of one with this number that was lost
    here.posts[:] = [(to, message) for to, message in here.posts if to != engine]
    mine = options.num_blocks or default_num_blocks(member.model, options, here.backend.sharers)
    num_blocks = int(member.everyone.all_gather(torch.tensor([mine])).min())
    model = member.model
    cache = PagedCache(model.config, num_blocks, options.block_size, model.device, model.dtype)
    num_blocks *= member.pipe.spread
    seat = member.seats[engine] = Seat(Stage(model, cache, member.pipe), options)
    if member.pipe.stage == 0 and member.pipe.leads:
        runner = PipelineRunner(seat.stage, num_blocks, options.in_flight or member.pipe.hidden.size)
        seat.engine, seat.runner = Engine(runner, options, Recorder(), order), runner
    if door is not None:
        door.equip(seat, member, here.rank, door)
    return num_blocks


def lend(seat: Seat, member: Member, rank: int, door: Door) -> None:
    """Let an engine of a rank lend and borrow."""
    seat.outfit = seat.stage.lending = Lending(door, rank, seat.stage.cache)
    if seat.engine is not None:
        borrower = Borrower(seat.stage.lending.links, seat.engine.scheduler, seat.options)
        seat.engine.borrowing = seat.stage.lending.borrower = borrower


def close_engine(instance: str, engine: int) -> None:
    """Let go of an engine and its KV cache."""
    seat = member_of(instance).seats.pop(engine, None)
    if seat is not None and seat.outfit is not None:
        seat.outfit.close()


def serve(instance: str, engine: int, recording: Recording) -> None:
    """Serve requests until there are none."""
    here, member = context(), member_of(instance)
    seat = member.seats[engine]
    if member.pipe.tensor is not None:
        member.pipe.tensor.chunks = seat.options.sum_chunks
    if member.pipe.experts is not None:
        member.pipe.experts.options = seat.options
    if member.pipe.context is not None:
        member.pipe.context.options = seat.options
    _record(seat, here, recording)
    baton: AbstractContextManager[Any] = Baton(recording.baton) if recording.baton else nullcontext()
    seat.stage.hold(baton)
    try:
        if seat.engine is None:
            seat.stage.run()
        else:
            _lead(member, engine, here)
    finally:
        seat.stage.hold(nullcontext())
        if isinstance(baton, Baton):
            baton.close()
        if seat.stage.handover is not None:
            seat.stage.handover.record(seat.stage.recorder)
        _report(here, seat.stage.recorder)


def _lead(member: Member, number: int, here: RankContext) -> None:
    """The first rank of a replica: take requests, step, tell what came of it, until nothing is left to do."""
    seat, until_s = member.seats[number], time.monotonic() + POST_S
    engine, runner = seat.engine, seat.runner
    assert engine is not None and runner is not None
    if engine.handing is not None:
        engine.handing.tell = lambda: here.emit(_turn(engine, []))
    while True:
        patience_s = max(0.0, until_s - time.monotonic())
        here_already = number in member.mail or engine.requests or engine.under_way
        _gather(member, here.posted(0.0 if here_already else min(patience_s, runner.patience_s)))
        for message in member.mail.pop(number, ()):
            message(engine, member.intake)
            until_s = patience_s = 0.0  # what it was called for is here
        busy, expecting = runner.any(bool(engine.requests or engine.under_way), patience_s > 0)
        if busy:
            until_s = 0.0
        elif expecting:
            continue
        else:
            break
        known = {each.request_id: each for each in with_twins(engine.requests.values())}
        before, pieces = engine.steps, engine.step()
        turn = _turn(engine, [_told(seat, known[piece.request_id], piece) for piece in pieces])
        if turn.told or turn.notes or engine.handing is None:
            here.emit(turn)
        if engine.handing is not None and engine.steps == before and not engine.under_way:
            here.tick()  # all requests wait for others, which is no fault
            _gather(member, here.posted(SHORT_S))
        if engine.borrowing is not None and engine.requests and not pieces and not engine.under_way:
            time.sleep(SHORT_S)  # they wait for blocks of others, or are in the middle of their prompts
    runner.end()
    here.emit(_turn(engine, []))


def _gather(member: Member, posts: list[tuple[int, Message]]) -> None:
    """Put what was posted where its engine finds it."""
    for to, message in posts:
        member.mail.setdefault(to, []).append(message)


def _turn(engine: Engine, told: list[Told]) -> Turn:
    """What is told after a step."""
    beat = engine.borrowing.heartbeat() if engine.borrowing is not None else None
    return Turn(told, engine.load, beat, engine.handing.taken() if engine.handing is not None else ())


def _told(seat: Seat, request: Request, piece: Piece) -> Told:
    """A piece, and the moments of its request that were not told yet."""
    life = request.life
    began, seat.told[request] = seat.told.get(request, 0), len(life.moments)
    return Told(request.epoch, piece, began, tuple(life.moments[began:]), life.reused_tokens)


def _record(seat: Seat, here: RankContext, recording: Recording) -> None:
    """Record this call as it is wanted; what was recorded before has been reported."""
    most = 1 if recording.live else REPORT_SPANS
    recorder = Recorder(
        here.rank, recording.timing, activations=recording.activations, details=recording.details
    )  # fmt: skip
    recorder.on_span = lambda span: _report(here, recorder) if len(recorder.trace.spans) >= most else None
    if seat.engine is not None and seat.runner is not None:
        seat.engine.record(recorder, fresh=recording.fresh)
        seat.runner.steps = 0 if recording.fresh else seat.runner.steps
    else:
        seat.stage.record(recorder)
    if not recording.fresh:
        recorder.trace.memory.clear()


def _report(here: RankContext, recorder: Recorder) -> None:
    """Hand over what was recorded since the last time."""
    trace = recorder.trace
    if trace.spans or trace.memory:
        here.emit(Seen(list(trace.spans), list(trace.memory)))
        trace.spans.clear()
        trace.memory.clear()


def member_of(instance: str) -> Member:
    """What this rank holds of an instance."""
    return context().held[instance]
