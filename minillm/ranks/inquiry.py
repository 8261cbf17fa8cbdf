"""Asks running ranks where they stand. A rank that is stopped, or deep in a library, does not answer."""

from __future__ import annotations

import time
from contextlib import suppress

from minillm.ranks.places import describe
from minillm.ranks.process import RankProcess
from minillm.ranks.state import Rank

ANSWER_S = 0.5  # how long ranks may take to say where they stand
MOST_OPEN = 50  # questions to a rank that does not answer: more would fill its pipe, and we would wait for it


class Inquiry:
    """Numbers its questions, so that a late answer to an earlier one is not taken for the present one."""

    def __init__(self, processes: list[RankProcess]) -> None:
        self.processes = processes
        self.question = 0
        self.open = [0] * len(processes)  # questions that a rank has not answered

    def ask(self, ranks: list[Rank]) -> list[int]:
        """Fill in where the main thread of each of these ranks stands; returns those that do not answer."""
        self.question += 1
        for rank in ranks:
            if self.open[rank.number] < MOST_OPEN:
                with suppress(ConnectionError):
                    self.processes[rank.number].control.send(self.question)
                    self.open[rank.number] += 1
        end = time.monotonic() + ANSWER_S
        return [rank.number for rank in ranks if not self._answers(rank, end)]

    def _answers(self, rank: Rank, end: float) -> bool:
        """Take a rank's answer to the present question, until `end`."""
        process = self.processes[rank.number]
        try:
            while process.control.poll(max(0.0, end - time.monotonic())):
                question, rank.spots, rank.inside_torch = process.control.recv()
                self.open[rank.number] -= 1
                if question == self.question:
                    rank.place = f"runs {describe(*rank.spots[-1])}" if rank.spots else "runs"
                    return True
        except (EOFError, ConnectionError):
            pass  # it died meanwhile; the next look will see it
        rank.place = "does not answer: its process is stopped" if process.stopped else "does not answer"
        return False
