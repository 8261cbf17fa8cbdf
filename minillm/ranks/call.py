"""A call that is under way on all ranks, while the launching process goes on with its own work."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

from minillm.ranks.job import Job
from minillm.ranks.signals import uninterrupted


class Call:
    """What `Ranks.begin` returns. Its ranks are busy until `poll` says that it is over.

    An interrupt while it polls leaves the call as it is.
    """

    def __init__(self, job: Job, ranks_held: ExitStack) -> None:
        self._job, self._ranks_held = job, ranks_held
        self.over = False
        self.error: BaseException | None = None

    def poll(self, timeout_s: float = 0.0) -> bool:
        """Take what the ranks have sent, waiting for at most `timeout_s` when there is nothing; returns `over`.

        Raises `RankError` when a rank fails or the ranks cannot go on, and the call is over.
        """
        if self.error is not None:
            raise self.error
        if self.over:
            return True
        try:
            self._job.turn(timeout_s)
            with uninterrupted():
                if self._job.over:
                    self.results = self._job.conclude()
                    self.over = True
                    self._ranks_held.close()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            with uninterrupted():
                self.over, self.error = True, error
                self._ranks_held.__exit__(*sys.exc_info())
            raise
        return self.over

    @property
    def sources(self) -> list[Any]:
        """What `multiprocessing.connection.wait` can wait for until there is something for `poll`."""
        return [] if self.over else list(self._job.sources())

    def result(self) -> list[Any]:
        """Wait for every rank; returns what each returned, in rank order. Raises as `poll` does."""
        while not self.poll(1.0):
            pass
        return self.results
