"""`LLM`: the one file that knows every mode. It puts checkpoint, model, engine and layout together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minillm.disagg.layout import SplitLayout, parse_layout
from minillm.disagg.split import Split, split_pools, start_split
from minillm.engine.engine import Engine
from minillm.engine.intake import Intake, Prompt
from minillm.engine.request import RequestOutput
from minillm.engine.runner import LocalRunner
from minillm.engine.session import Params, Session
from minillm.hardware.machine import usable_cores
from minillm.kv.paged import PagedCache
from minillm.model.checkpoint import find_checkpoint
from minillm.model.config_json import read_config
from minillm.model.decoder import Decoder
from minillm.model.linear import pack
from minillm.model.moe import Tally, count_choices
from minillm.model.placement import choose_device, choose_dtype, one_thread
from minillm.model.sampling import SamplingParams
from minillm.model.tokenizer import Tokenizer
from minillm.model.weights import check_names, load_weights
from minillm.parallel.data import Replicas
from minillm.parallel.errands import place_experts, score
from minillm.parallel.hybrid import fill
from minillm.parallel.instance import Instance, check_placements, start_pools, start_replicas, tallied
from minillm.parallel.layout import Layout
from minillm.parallel.remote import RemoteEngine
from minillm.policy.batch import Batch, Chunk
from minillm.policy.experts import Placement
from minillm.policy.options import CONTROL, EngineOptions
from minillm.policy.router import Router, make_router
from minillm.ranks.launch import Launch
from minillm.ranks.pool import Ranks
from minillm.trace.recorder import Recorder
from minillm.trace.trace import Kind, Trace


class LLM(Session):
    """A language model ready to answer.

    `checkpoint` is a Hugging Face folder, a hub name, or None for the embedded SmolLM2-135M-Instruct. `layout` "" runs in this
    process; "pp=2" (stages), "tp=2" (slices of every layer), "dp=2" (replicas), "dp=2,ep=2" (replicas that share experts) and all
    of them together, or "prefill=1xtp=1,decode=1xtp=1" (instances that read prompts, and others that decode), run on ranks that it starts, or on the `ranks` given: with several instances a list, one `Ranks` for each; under a
    launcher, what `lead` gives. `device` is "cpu", "cuda" or None for a GPU if there is one; `dtype` is "float32", "bfloat16", "float16" or None for float32 on a CPU and the checkpoint's
    own on a GPU. `options` are the engine's limits and switches; `router` says which replica gets a request: "round-robin",
    "least-tokens", "prefix-aware", or a class of your own. Raises `ValueError` in one line for whatever cannot be.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        layout: str | Layout | SplitLayout = "",
        device: str | None = None,
        dtype: str | None = None,
        options: EngineOptions | None = None,
        ranks: Ranks | Sequence[Ranks] | Launch | None = None,
        router: str | type[Router] = "least-tokens",
    ) -> None:
        super().__init__()
        self.options = _options(options)
        self.layout = parse_layout(layout)
        _check_borrowing(self.options, self.layout)
        _check_control(self.options, self.layout, router)
        self.folder = find_checkpoint(checkpoint)
        self.config = read_config(self.folder)
        self.layout.check(self.config)
        self.router = router
        make_router(router, self.layout.routed)
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device, self.config.dtype)
        self.tokenizer = Tokenizer(self.folder)
        self.intake = Intake(self.config, self.tokenizer)
        self._started: list[Ranks] = []  # by this LLM, which ends them
        self._owns = True  # the weights; its twins of other options do not
        if isinstance(ranks, Launch) and isinstance(self.layout, SplitLayout):
            raise ValueError(f"layout {str(self.layout)!r} starts its own ranks, on this host: leave the launcher out")
        if isinstance(ranks, Launch):
            assert isinstance(self.layout, Layout)
            ranks = self._started = fill(ranks, self.layout, self.device.type)
        if self.layout.world_size == 1:
            _refuse_ranks(ranks)
            self.model = Decoder(self.config)
            load_weights(self.model, self.folder, self.device, self.dtype)
            pack(self.model)
            self.tally = count_choices(self.model)
        else:
            check_names(self.config, self.folder)
            self.instances = self._on_ranks(ranks)

    def chat(self, message: str | list[dict[str, str]], params: SamplingParams | None = None) -> RequestOutput:
        """Answer a question, or continue a conversation [{"role": "user", "content": "…"}, …], by the chat template."""
        messages = [{"role": "user", "content": message}] if isinstance(message, str) else message
        if not isinstance(messages, list) or not messages or not all(_is_message(each) for each in messages):
            raise ValueError('give a text, or a list of messages [{"role": "user", "content": "…"}, …]')
        return self.generate([self.tokenizer.chat(messages)], params)[0]

    def score(self, token_ids: list[int]) -> torch.Tensor:
        """The model's logits after each token of a text: [tokens, vocab], in the model's dtype."""
        if not isinstance(token_ids, list):
            raise ValueError(
                f"score takes a list of token ids, not a {type(token_ids).__name__}: use tokenizer.encode(text)"
            )
        self._check_open()
        self.intake.check(token_ids)
        if self.layout.world_size > 1:
            return self._score_on_ranks(token_ids)
        cache = PagedCache(self.config, 1, len(token_ids), self.model.device, self.model.dtype)
        recorder = self._new_recorder(on_span=self.on_span)
        self.trace = recorder.trace
        with one_thread(), recorder.span(Kind.PREFILL, "score", tokens=len(token_ids)):
            return self.model(Batch((Chunk(0, 0, tuple(token_ids), (0,)),)), cache, every_row=True)

    def expert_choices(self, clear: bool = False) -> Tally:
        """What tokens have chosen in each layer that has experts, since the last time that it was asked for with `clear`, or since
        the experts were placed anew. Raises `ValueError` for a dense model, and while requests run.
        """
        self._check_idle()
        if self.config.moe is None:
            raise ValueError(f"this {self.config.family} model is dense: it has no experts")
        if self.layout.world_size > 1:
            return tallied(self.instances, clear)
        told = copy.deepcopy(self.tally)
        if clear:
            self.tally.clear()
        return told

    def place_experts(
        self, placements: Sequence[Placement] = (), redundant: int = 0
    ) -> tuple[tuple[Placement, ...], list[int]]:
        """Move experts between ranks, as `placements` say for each layer that has some or, without them, by what tokens have chosen,
        with so many `redundant` copies of the most chosen. Returns the placements, and the bytes that left each rank.

        Raises `ValueError` for placements that do not fit model and layout, and while requests run.
        """
        self._check_idle()
        if not isinstance(redundant, int) or redundant < 0:
            raise ValueError(f"redundant={redundant!r}: give a whole number from 0")
        if isinstance(self.layout, SplitLayout):
            raise ValueError(f"layout {str(self.layout)!r}: experts are placed only where all instances are alike")
        check_placements(placements, self.config, self.layout)
        self.instance.ready()
        told = self.instance.ranks.run(place_experts, self.instance.name, placements, redundant)
        stages = [
            told[self.layout.leaders[0] + stage * self.layout.cp * self.layout.tp] for stage in range(self.layout.pp)
        ]
        return tuple(each for placed, _ in stages for each in placed), [sent for _, sent in told]

    def with_options(self, options: EngineOptions | None = None, router: str | type[Router] | None = None) -> LLM:
        """The same weights under an engine of its own, with other limits and switches, or another router."""
        twin = copy.copy(self)
        twin.__dict__.pop("engine", None)
        twin.options, twin.trace, twin._started, twin._owns = _options(options or self.options), Trace(), [], False
        twin.router = router or self.router
        make_router(twin.router, twin.layout.routed)
        _check_borrowing(twin.options, twin.layout)
        _check_control(twin.options, twin.layout, twin.router)
        twin._check_open()
        return twin

    def record_for_replay(self, prompts: Sequence[Prompt], params: Params = None) -> Trace:
        """As every session's. Raises `ValueError` where caches move between instances: `replay` does not follow them."""
        if isinstance(self.layout, SplitLayout):
            raise ValueError(
                f"layout {str(self.layout)!r}: caches that move between instances are not replayed; use .trace"
            )
        return super().record_for_replay(prompts, params)

    def close(self) -> None:
        """Let go of the weights and the KV cache, and end the ranks that it started."""
        engine = self.__dict__.pop("engine", None)
        self.__dict__.pop("model", None)
        instances = self.__dict__.pop("instances", [])
        try:
            if isinstance(engine, Replicas) or (isinstance(engine, RemoteEngine) and not self._started):
                engine.close()
        finally:
            for ranks in self._started:
                ranks.close()
        for instance in instances if self._owns else []:
            instance.close()

    def __repr__(self) -> str:
        return f"LLM({self.folder.name}, layout={str(self.layout)!r}, {self.device.type})"

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @cached_property
    def engine(self) -> Engine | RemoteEngine | Replicas:
        """What serves the requests; it and its KV cache stay between calls."""
        self._check_open()
        recorder = self._new_recorder(on_span=self.on_span)
        self.trace = recorder.trace
        router = make_router(self.router, self.layout.routed)
        if isinstance(self.layout, SplitLayout):
            return Split(self.instances, self.layout.roles, self.options, recorder, router)
        if self.layout.instances > 1:
            return Replicas(self.instances, self.options, recorder, router)
        if self.layout.world_size > 1:
            return RemoteEngine(self.instance, self.options, recorder, router=router)
        return Engine(LocalRunner(self.model, self.options), self.options, recorder)

    @property
    def instance(self) -> Instance:
        """The weights on ranks; with replicas, the first one's."""
        return self.instances[0]

    def _on_ranks(self, ranks: Ranks | Sequence[Ranks] | None) -> list[Instance]:
        """The weights on the ranks given, or on ranks of its own, which end with it."""
        if ranks is None:
            ranks = self._started = self._new_pools()
        pools = [ranks] if isinstance(ranks, Ranks) else list(ranks)
        try:
            if isinstance(self.layout, SplitLayout):
                return start_split(self.folder, self.layout, self.device, self.dtype, pools)
            return start_replicas(self.folder, self.layout, self.device, self.dtype, pools)
        except BaseException:
            for pool in self._started:
                pool.close()
            raise

    def _new_pools(self) -> list[Ranks]:
        if isinstance(self.layout, SplitLayout):
            return split_pools(self.layout, self.device.type)
        return start_pools(self.layout, self.device.type)

    def _score_on_ranks(self, token_ids: list[int]) -> torch.Tensor:
        if self.engine.has_work:
            raise ValueError("other requests are running: let them end first")
        self.instance.ready()
        recorder = self._new_recorder(on_span=self.on_span)
        self.trace = recorder.trace
        with recorder.span(Kind.PREFILL, "score", tokens=len(token_ids)):
            told = self.instance.ranks.run(score, self.instance.name, token_ids)
            return next(logits for logits in told if logits is not None)

    def _new_recorder(self, **options: Any) -> Recorder:
        """A recorder that says what runs here, and on what."""
        dtype = str(self.dtype).removeprefix("torch.")
        about: dict[str, Any] = {
            "model": self.folder.name,
            "dtype": dtype,
            "layout": str(self.layout),
            "device": self.device.type,
        }
        if self.layout.world_size > 1 and self.device.type == "cpu":
            about |= {"ranks": f"{self.layout.world_size} ranks", "cores": usable_cores()}
        return Recorder(timing=self.timing, **about, **options)

    def _check_idle(self) -> None:
        self._check_open()
        if "engine" in self.__dict__ and self.engine.has_work:
            raise ValueError("requests are running: let them end first")

    def _check_open(self) -> None:
        if ("model" if self.layout.world_size == 1 else "instances") not in self.__dict__:
            raise ValueError("this LLM is closed: make a new one with LLM(…)")


def _options(options: EngineOptions | None) -> EngineOptions:
    if not isinstance(options, EngineOptions | None):
        raise ValueError(f"options={options!r}: write options=EngineOptions(max_running=…)")
    return options or EngineOptions()


def _check_borrowing(options: EngineOptions, layout: Layout | SplitLayout) -> None:
    """Raise `ValueError` for instances that cannot borrow of each other."""
    if isinstance(layout, SplitLayout):
        if options.borrowing:
            raise ValueError(f"borrowing=True: layout {str(layout)!r} hands caches over, and lends none: leave it out")
        return
    if options.borrowing and (layout.instances == 1 or layout.cp > 1):
        why = "shares its KV cache by cp already" if layout.cp > 1 else "has one instance"
        raise ValueError(
            f"borrowing=True: layout {str(layout)!r} {why}; give one with several instances, such as 'dp=2'"
        )


def _check_control(options: EngineOptions, layout: Layout | SplitLayout, router: str | type[Router]) -> None:
    """Raise `ValueError` for options of the control plane that would do nothing."""
    if not isinstance(layout, SplitLayout):
        for name in CONTROL:
            value = getattr(options, name)
            if value != getattr(EngineOptions, name):
                raise ValueError(
                    f"{name}={value!r}: layout {str(layout)!r} has no prefill and decode instances: leave it out, or give one "
                    "such as 'prefill=1xtp=1,decode=1xtp=1'"
                )
    elif options.dispatch == "pools" and (options.decode_router, router) != ("least-tokens", "least-tokens"):
        raise ValueError("dispatch='pools' settles who reads and who decodes: leave router and decode_router out")


def _refuse_ranks(ranks: Ranks | Sequence[Ranks] | None) -> None:
    if ranks is not None:
        raise ValueError(
            "layout '' runs in this process: leave ranks= out, or say how to use them, such as layout='pp=2'"
        )


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
