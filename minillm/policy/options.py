"""How an engine serves: its limits, and one switch for each feature. The simulator takes the same."""

from __future__ import annotations

from dataclasses import dataclass, fields

from minillm.policy.admission import GATES, Predictor
from minillm.policy.queue import PROMPT_ORDERS

TRANSFERS = ("whole", "chunk", "layer")
WIRES = ("memory", "group")
DISPATCHES = ("roles", "pools")
DECODE_ROUTERS = ("least-tokens", "power-of-two")
CONTROL = ("dispatch", "decode_router", "gate", "predictor", "idle_s")  # of prefill and decode instances
WORDS = {
    "kv_transfer": TRANSFERS, "kv_wire": WIRES, "dispatch": DISPATCHES, "decode_router": DECODE_ROUTERS, "gate": tuple(GATES),
    "prompt_order": tuple(PROMPT_ORDERS),
}  # fmt: skip


@dataclass(frozen=True)
class EngineOptions:
    """Limits and switches of one engine.

    `block_size` tokens share a block of the KV cache, of which there are `num_blocks` (None: as many as `max_running`
    sequences of the longest context can use, within 1 GiB a rank on a CPU and most of the free memory on a GPU).
    A step takes at most `max_running` requests and `max_step_tokens` tokens. Prompts wait in the order in which they came (`prompt_order`
    "fcfs"), or `prompt_window` of them at a time are sorted by length, the shortest first ("sjf") or the longest ("ljf"; TetriInfer). In a pipeline `in_flight` batches are under
    way at once (None: as many as there are stages; 1: naive model parallelism). Between tensor parallel ranks the sums of a
    long prompt leave in `sum_chunks` parts, each while the next is computed (1: whole). Where experts are shared out,
    `micro_batches` 2 computes one half of a step's tokens while the other half's are under way; every `rebalance_steps` steps
    (None: never) they are placed anew by what was chosen, with `redundant_experts` copies in each layer of those chosen most.
    Between prefill and decode instances K and V move `kv_transfer` "whole" once the prompt is read, or early, "chunk" by chunk or
    "layer" by layer, while it is, through `kv_wire` "memory" that two ranks of a host share, or "group", a process group of the two
    (gloo, NCCL); links are slowed to `link_gbits` Gbit/s a rank (None: as fast as they are). Instances keep to their roles, or `dispatch`
    makes them "pools" between which any may be borrowed (Splitwise); `decode_router` says who goes on with a request, and a `gate` when it
    may start there: "greedy", "reserve-static" or "reserve-dynamic", by what a `predictor` says of its length (None: `max_tokens`;
    TetriInfer). An instance with nothing to do for `idle_s` seconds while the others have changes its role (None: never).
    Replicas that borrow lend at most `most_lent` blocks each (None: all that are free), and move `move_blocks` of a request in a step.

    Switches: `continuous` lets requests join while others run (off: a batch ends before the next one starts);
    `chunked_prefill` cuts prompts to the step's token budget (off: a prompt runs whole, even one above the budget);
    `preemption` lets a request start with the blocks of its prompt, and takes them back when the pool runs out (off: each
    request reserves the blocks of its longest length before it starts); `prefix_reuse` keeps the blocks of finished
    requests for prompts that begin alike; where ranks share the KV cache of a sequence, `ring_prefill` lets the keys of prompts
    travel round them (off: queries travel, as they do for single tokens); `borrowing` lets replicas borrow blocks of each other's KV
    caches, `on_demand` whenever their own run out (off: as a plan says, and for requests that outgrow one of them). Raises `ValueError` for values outside their ranges.
    """

    block_size: int = 16
    num_blocks: int | None = None
    max_running: int = 64
    max_step_tokens: int = 512
    prompt_order: str = "fcfs"
    prompt_window: int = 16
    in_flight: int | None = None
    sum_chunks: int = 1
    micro_batches: int = 1
    rebalance_steps: int | None = None
    redundant_experts: int = 0
    most_lent: int | None = None
    move_blocks: int = 1
    kv_transfer: str = "layer"
    kv_wire: str = "memory"
    link_gbits: float | None = None
    dispatch: str = "roles"
    decode_router: str = "least-tokens"
    gate: str = "greedy"
    predictor: Predictor | None = None
    idle_s: float | None = None
    continuous: bool = True
    chunked_prefill: bool = True
    preemption: bool = True
    prefix_reuse: bool = False
    ring_prefill: bool = False
    borrowing: bool = False
    on_demand: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name not in ("redundant_experts", "most_lent"))
            if field.name in WORDS:
                if value not in WORDS[field.name]:
                    raise ValueError(f"{field.name}={value!r}: give one of {', '.join(WORDS[field.name])}")
            elif field.name == "predictor":
                if not isinstance(value, Predictor | None):
                    raise ValueError(f"predictor={value!r}: give Predictor(width, accuracy), or None")
            elif field.name in ("link_gbits", "idle_s"):
                if value is not None and (
                    not isinstance(value, int | float) or isinstance(value, bool) or not value > 0
                ):
                    raise ValueError(f"{field.name}={value!r}: give a number above 0, or None")
            elif isinstance(field.default, bool):
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name}={value!r}: give True or False")
            elif value is None and field.name in ("num_blocks", "in_flight", "rebalance_steps", "most_lent"):
                continue
            elif not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field.name}={value!r}: give a whole number from {least}")
        if self.micro_batches > 2:
            raise ValueError(f"micro_batches={self.micro_batches}: give 1 or 2")
        if self.chunked_prefill and self.max_step_tokens < self.max_running:
            raise ValueError(
                f"max_step_tokens={self.max_step_tokens} is below max_running={self.max_running}: each running request "
                f"takes a token of every step; give at least {self.max_running}"
            )
