"""A session: prompts go in, texts and tokens come out, and a trace of how; what every `LLM` does with its engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from minillm.engine.intake import Checks, Intake, Prompt
from minillm.engine.request import Piece, Request, RequestOutput, number, with_twins
from minillm.model.placement import one_thread
from minillm.model.sampling import SamplingParams
from minillm.trace.recorder import Recorder
from minillm.trace.trace import Span, Trace

WAIT_S = 0.05
Params = SamplingParams | Sequence[SamplingParams] | None  # one for all prompts, or one for each


class Steps(Checks, Protocol):
    """What serves the requests of a session, step by step: an engine, here or on ranks."""

    @property
    def recorder(self) -> Recorder: ...

    @property
    def requests(self) -> Any: ...

    @property
    def has_work(self) -> bool: ...

    def add(self, requests: Sequence[Request], arrived_s: float | None = None) -> None: ...

    def step(self, wait_s: float = ...) -> list[Piece]: ...

    def cancel(self, requests: Sequence[Request]) -> None: ...

    def record(self, recorder: Recorder, baton: bool = False) -> None: ...


class Session(ABC):
    """Whoever has an engine and an intake. Its requests have numbers from 0 in every trace."""

    intake: Intake

    def __init__(self) -> None:
        self.next_id = 0  # of requests, from 0 in every trace
        self.trace = Trace()
        self.timing = True  # False leaves the clocks out of the spans of `trace`; counts stay
        self.on_span: Callable[[Span], None] | None = None  # called with each step's span as it ends

    @property
    @abstractmethod
    def engine(self) -> Steps:
        """What serves the requests."""

    @abstractmethod
    def _new_recorder(self, **options: Any) -> Recorder:
        """A recorder that says what runs here, and on what."""

    @abstractmethod
    def _check_open(self) -> None:
        """Raise `ValueError` where nothing can be served any more."""

    def generate(self, prompts: Sequence[Prompt], params: Params = None) -> list[RequestOutput]:
        """Continue every prompt (a text, or token ids); returns the outputs in the prompts' order.

        `params` is one `SamplingParams` for all, or one for each. `trace` then holds this run.
        """
        requests = self.prepare(prompts, params)
        for _ in self._pieces(requests):
            pass
        return [request.output() for request in requests]

    def measure_memory(self, prompts: Sequence[Prompt], params: Params = None) -> Trace:
        """Generate once more, slowly, and return the trace with the peak of every step's activations; `trace` stays."""
        return self._aside(prompts, params, self._new_recorder(activations=True))

    def record_for_replay(self, prompts: Sequence[Prompt], params: Params = None) -> Trace:
        """Generate once more, one rank computing at a time, and return the trace for `replay`; `trace` stays.

        Ranks that share cores slow each other down, even in their own CPU time; one at a time they do not.
        """
        return self._aside(prompts, params, self._new_recorder(details=True), baton=True)

    def measure_messages(self, prompts: Sequence[Prompt], params: Params = None) -> Trace:
        """Generate once more, and return the trace in which steps are cut where something is sent; `trace` stays."""
        return self._aside(prompts, params, self._new_recorder(details=True))

    def stream(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> Iterator[Piece]:
        """Continue a prompt, or several, and yield each token as it comes: `.index` of the prompt, `.token_id`, `.text`.

        Its requests join those that run already, such as another stream's; closing the iterator cancels them.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        return self._pieces(self.prepare([prompts] if single else prompts, params))  # type: ignore[arg-type, list-item]

    def prepare(self, prompts: Sequence[Prompt], params: Params = None) -> list[Request]:
        """Requests for `submit`, checked: raises `ValueError` for what `generate` refuses. Their `inbox` is shared."""
        self._check_open()
        return self.intake.requests(prompts, params, self.engine)

    def submit(self, requests: Sequence[Request], arrived_s: float | None = None) -> None:
        """Let prepared requests wait, and return at once; `step` then serves them, and their `inbox` gets what they give.

        `arrived_s` is when they came, on the monotonic clock; now by default.
        """
        self.next_id = number(requests, self.next_id)
        self.engine.add(requests, arrived_s)

    def new_trace(self) -> None:
        """What happens from now on goes into a new `trace`."""
        recorder = self._new_recorder(on_span=self.on_span)
        self.trace = recorder.trace
        if not self.engine.has_work:
            self.next_id = 0
        self.engine.record(recorder)

    def step(self, wait_s: float = WAIT_S) -> list[Piece]:
        """One step of the engine, for all requests that wait or run; none when there are none. On ranks it is what they have given since
        the last one, or give within `wait_s`.
        """
        with one_thread():
            return self.engine.step(wait_s) if self.engine.requests else []

    def cancel(self, requests: Sequence[Request]) -> None:
        """End requests; their blocks are free at once or, on ranks, when the batches under way are back. Those that have ended
        stay as they are.
        """
        if "engine" in self.__dict__:
            self.engine.cancel(requests)

    def _aside(
        self, prompts: Sequence[Prompt], params: Params, recorder: Recorder,
        **how: Any,
    ) -> Trace:  # fmt: skip
        """Generate with a recorder of its own; returns its trace. Raises `ValueError` while other requests run."""
        requests = self.prepare(prompts, params)
        if self.engine.has_work:
            raise ValueError("other requests are running: let them end first")
        before, self.next_id = self.engine.recorder, 0
        try:
            self.engine.record(recorder, **how)
            self.submit(requests)
            while any(each.finish_reason is None for each in with_twins(requests)):
                self.step()
        finally:
            self.cancel(requests)
            self.engine.record(before)
        return recorder.trace

    def _pieces(self, requests: list[Request]) -> Iterator[Piece]:
        """Yield what the requests give; the steps serve all others too."""
        inbox = requests[0].inbox
        try:
            if not self.engine.has_work:
                self.new_trace()
            self.submit(requests)
            while True:
                while inbox:
                    yield inbox.popleft()
                if all(each.finish_reason is not None for each in with_twins(requests)):
                    break
                self.step()
            if any(each.finish_reason == "failed" for each in requests):
                raise RuntimeError("the ranks that served this request were lost: ask again, they start anew")
        finally:
            self.cancel(requests)
