"""Who is to blame when a job on several ranks does not go on: from the boards and the ranks' states to a verdict.

Pure functions: no processes, no clock. `job` collects what they need and acts on what they say.
"""

from __future__ import annotations

import math
import re
from collections import Counter

from minillm.ranks.board import Notice, State
from minillm.ranks.errors import Fault, Verdict
from minillm.ranks.places import describe, describe_source
from minillm.ranks.state import Life, Rank, describe_notice, describe_operation
from minillm.ranks.watch import FROM_ANYONE


def awaited(rank: Rank, ranks: list[Rank]) -> list[int]:
    """The ranks that have not yet entered what `rank` waits in."""
    notice = rank.waits
    if notice is None:
        return []
    channel = notice.partner or notice.channel
    others = [number for number in notice.members if number != rank.number]
    if notice.name == FROM_ANYONE:
        return others
    return [n for n in others if not ranks[n].view.entered(channel, notice.index)]


def blockers(rank: Rank, ranks: list[Rank]) -> set[int]:
    """The ranks at the end of the chain of waiting that starts at `rank`: awaited, and waiting for nobody."""
    seen, ahead = {rank.number}, awaited(rank, ranks)
    while ahead:
        number = ahead.pop()
        if number not in seen:
            seen.add(number)
            ahead += awaited(ranks[number], ranks)
    return {number for number in seen if ranks[number].waits is None}


def stuck_ranks(ranks: list[Rank]) -> list[int]:
    """The ranks that wait for ever: for one that is gone, or for each other.

    A rank gets on if it is not waiting, or if all ranks it awaits get on; the rest, found as a fixed point, is stuck.
    """
    moving = {rank.number for rank in ranks if rank.life is Life.RUNNING and rank.waits is None}
    while True:
        more = {r.number for r in ranks if r.waits is not None and _gets_on(r, ranks, moving)} - moving
        if not more:
            return [rank.number for rank in ranks if rank.waits is not None and rank.number not in moving]
        moving |= more


def _gets_on(rank: Rank, ranks: list[Rank], moving: set[int]) -> bool:
    """Whether all that a waiting rank awaits get on. Who takes a message from anyone may find one on its way."""
    assert rank.waits is not None
    return rank.waits.name == FROM_ANYONE or set(awaited(rank, ranks)) <= moving


def find_fault(ranks: list[Rank]) -> Verdict | None:
    """The fault that the boards and states show now, if any. Waiting too long is `find_late`'s business."""
    return find_disagreement(ranks) or _dead_or_raised(ranks) or _absent_or_deadlocked(ranks)


def _verdict(fault: Fault, culprits: list[int], headline: str, ranks: list[Rank], notice: Notice | None) -> Verdict:
    verdict = Verdict(fault, culprits, headline)
    verdict.places = {rank.number: rank.describe() for rank in ranks}
    verdict.waits_for = {rank.number: awaited(rank, ranks) for rank in ranks if awaited(rank, ranks)}
    if notice is not None:
        verdict.collective = notice.name
        verdict.line = describe_source(notice.source)
    return verdict


def _dead_or_raised(ranks: list[Rank]) -> Verdict | None:
    dead = [rank for rank in ranks if rank.life is Life.DIED]
    if dead:
        text = f"{_names(dead)} died: {dead[0].exit_text}"
        return _verdict(Fault.DIED, [rank.number for rank in dead], text, ranks, dead[0].view.current)
    raised = [rank for rank in ranks if rank.life is Life.RAISED and not rank.is_consequence]
    raised.sort(key=lambda rank: rank.raised_at_s)
    if not raised:
        return None
    first = raised[0]
    assert first.failure is not None
    same = [rank for rank in raised if rank.failure and rank.failure.headline == first.failure.headline]
    same.sort(key=lambda rank: rank.number)
    raised = same + [rank for rank in raised if rank not in same]
    verdict = _verdict(
        Fault.RAISED, [r.number for r in raised], f"{_names(same)} raised {first.failure.headline}", ranks, None
    )
    if first.failure.spots:
        verdict.line = describe(*first.failure.spots[-1])
    if len(first.failure.spots) > 1 or first.failure.library:
        verdict.details = _stack(first)
    return verdict


def _stack(rank: Rank) -> str:
    assert rank.failure is not None
    lines = [f"    {describe(*spot)}" for spot in rank.failure.spots]
    if rank.failure.library:
        lines.append(f"    in {rank.failure.library}")
    return "\n".join([f"rank {rank.number} got there by", *lines])


def find_disagreement(ranks: list[Rank]) -> Verdict | None:
    """The same call of a group, made differently by its members: another collective, shape, dtype or root."""
    calls: dict[tuple[int, int], dict[int, Notice]] = {}
    for rank in ranks:
        for notice in rank.view.notices.values():
            if notice.members and notice.name != FROM_ANYONE and notice.state is not State.REFUSED:
                channel = notice.partner if notice.name in ("recv", "irecv") else notice.channel
                calls.setdefault((channel, notice.index), {})[rank.number] = notice
    for notices in calls.values():
        found = _compare(notices, ranks)
        if found is not None:
            return found
    return None


def _compare(notices: dict[int, Notice], ranks: list[Rank]) -> Verdict | None:
    forms = {number: _form(notice) for number, notice in notices.items()}
    if len(set(forms.values())) < 2:
        return None
    usual = Counter(forms[number] for number in sorted(forms)).most_common(1)[0][0]
    odd = [number for number in sorted(forms) if forms[number] != usual]
    other = next(number for number in sorted(forms) if forms[number] == usual)
    mine, theirs = notices[odd[0]], notices[other]
    verb = "call" if len(odd) > 1 else "calls"
    text = (
        f"{_names([ranks[n] for n in odd])} {verb} {describe_operation(mine)} where rank {other} calls {describe_operation(theirs)}"
        f" (call {mine.index + 1} of the group)"
    )
    verdict = _verdict(Fault.DISAGREED, odd, text, ranks, mine)
    verdict.places.update({n: f"calls {describe_notice(notices[n])}" for n in notices})
    return verdict


def _form(notice: Notice) -> str:
    """What must be equal: name and signature of a collective, the number of elements and dtype of a message."""
    if not notice.partner:
        return f"{notice.name} {notice.signature}"
    shape, _, dtype = notice.signature.rpartition(" ")
    return f"{math.prod(int(n) for n in re.findall(r'[0-9]+', shape))} {dtype}"


def _absent_or_deadlocked(ranks: list[Rank]) -> Verdict | None:
    stuck = stuck_ranks(ranks)
    if not stuck:
        return None
    gone = sorted({n for s in stuck for n in awaited(ranks[s], ranks) if ranks[n].life is not Life.RUNNING})
    if gone:
        waiter = next(ranks[s] for s in stuck if set(awaited(ranks[s], ranks)) & set(gone))
        assert waiter.waits is not None
        text = f"{_names([ranks[n] for n in gone])} returned without {_counterpart(waiter)}, where rank {waiter.number} waits"
        return _verdict(Fault.ABSENT, gone, text, ranks, waiter.waits)
    circle = _circle(stuck, ranks)
    steps = [f"rank {a} for rank {b}" for a, b in zip(circle, [*circle[1:], circle[0]])]
    text = f"deadlock: {', '.join(steps).replace(' for ', ' waits for ', 1)}"
    return _verdict(Fault.DEADLOCK, sorted(circle), text, ranks, ranks[circle[0]].waits)


def _counterpart(waiter: Rank) -> str:
    """What the others should have called: the same collective, or the other side of a message."""
    notice = waiter.waits
    assert notice is not None
    if not notice.partner:
        return f"calling {describe_operation(notice)}"
    side, toward = ("recv", "from") if "send" in notice.name else ("send", "to")
    return f"calling {side} {toward} rank {waiter.number}"


def _circle(stuck: list[int], ranks: list[Rank]) -> list[int]:
    """A circle of ranks, each of which waits for the next."""
    path = [stuck[0]]
    while True:
        step = next(n for n in awaited(ranks[path[-1]], ranks) if n in stuck)
        if step in path:
            return path[path.index(step) :]
        path.append(step)


def find_late(ranks: list[Rank], late: list[int], silent: list[int], timeout_s: float) -> Verdict:
    """The verdict when nothing moved for `timeout_s`: `late` ranks are awaited by others, `silent` ones do not answer."""
    culprits = [number for number in late if number in silent] or late or silent
    waiter = next(
        (rank for rank in ranks if rank.waits is not None and set(awaited(rank, ranks)) & set(culprits)), None
    )
    waiter = waiter or next(rank for rank in ranks if rank.waits is not None)
    assert waiter.waits is not None
    operation = describe_operation(waiter.waits)
    if culprits:
        why = "does not answer" if silent else "has not come"
        text = f"{_names([ranks[n] for n in culprits])} {why}: rank {waiter.number} waited {timeout_s:g} s for it in {operation}"
    else:
        text = f"all ranks are in {operation}, yet it did not end within {timeout_s:g} s"
    return _verdict(Fault.LATE, culprits, text, ranks, waiter.waits)


def find_halted(ranks: list[Rank], halted: list[int], timeout_s: float) -> Verdict:
    """The verdict when the processes of ranks were stopped, for `timeout_s` at least."""
    who = _names([ranks[n] for n in halted])
    return _verdict(Fault.LATE, halted, f"{who} did nothing for {timeout_s:g} s: stopped", ranks, None)


def find_unwatched(ranks: list[Rank], inside: list[int], timeout_s: float) -> Verdict:
    """The verdict when ranks wait in a communication of torch that no board shows, and nothing moved for `timeout_s`."""
    others = [rank.number for rank in ranks if rank.life is Life.RUNNING and rank.number not in inside]
    text = f"{_names([ranks[n] for n in inside])} waited {timeout_s:g} s inside torch.distributed"
    if others:
        text = f"{_names([ranks[n] for n in others])} did not come: {text}"
    return _verdict(Fault.LATE, others, text, ranks, None)


def find_leftover(ranks: list[Rank]) -> Verdict | None:
    """After a call that all ranks returned from: a collective that some members never entered."""
    for rank in ranks:
        for notice in rank.view.notices.values():
            if notice.partner or notice.name == FROM_ANYONE or notice.state is State.REFUSED:
                continue
            missing = [n for n in notice.members if not ranks[n].view.entered(notice.channel, notice.index)]
            if missing:
                text = f"{_names([ranks[n] for n in missing])} returned without calling {describe_operation(notice)}, which rank {rank.number} called"
                return _verdict(Fault.ABSENT, missing, text, ranks, notice)
    return None


def _names(ranks: list[Rank]) -> str:
    numbers = [str(rank.number) for rank in ranks]
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    return f"ranks {', '.join(numbers[:-1])} and {numbers[-1]}"


def has_open_messages(ranks: list[Rank]) -> bool:
    """Whether something sent, received or started in this call is not over: the next call would meet it."""
    notices = [(rank, notice) for rank in ranks for notice in rank.view.notices.values()]
    for _, notice in notices:
        if notice.partner and not all(ranks[n].view.entered(notice.partner, notice.index) for n in notice.members):
            return True
    return any(notice.state is State.FAILED and rank.is_consequence for rank, notice in notices)


def find_lost_connection(ranks: list[Rank]) -> Verdict | None:
    """Every failed rank lost a connection and none says why."""
    raised = sorted((rank for rank in ranks if rank.failure is not None), key=lambda rank: rank.raised_at_s)
    if not raised:
        return None
    text = f"rank {raised[0].number} raised {raised[0].failure.headline}"  # type: ignore[union-attr]
    places = {rank.number: rank.describe() for rank in ranks}
    return Verdict(Fault.RAISED, [rank.number for rank in raised], text, places=places)
