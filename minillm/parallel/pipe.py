"""What connects a rank with the others of its instance."""

from __future__ import annotations

from dataclasses import dataclass, field

from minillm.parallel.context import ContextGroup
from minillm.parallel.expert import ExpertGroup
from minillm.parallel.tensor import TensorGroup
from minillm.parallel.wire import Wire
from minillm.ranks.comm import Comm


@dataclass
class Pipe:
    """What connects a rank with the others of its instance. Along the line of stages `hidden` carries hidden states from
    device to device, and `notes` what the hosts tell each other; ranks within it are stages. `tensor` are the ranks that
    share this stage's layers, if there are others, and `context` those that share its KV cache; `orders` is how the first of all
    these tells them what to do. `experts` are the ranks that share this stage's experts, if they are shared out; then the
    `leaders` of all replicas step together.
    """

    hidden: Comm
    notes: Comm
    orders: Comm
    tensor: TensorGroup | None = None
    context: ContextGroup | None = None
    experts: ExpertGroup | None = None
    leaders: Comm | None = None
    wire: Wire = field(default_factory=Wire)

    @property
    def stage(self) -> int:
        """Which one this rank is in."""
        return self.hidden.rank

    @property
    def last(self) -> int:
        """The number of the last one."""
        return self.hidden.size - 1

    @property
    def spread(self) -> int:
        """How many ranks share its KV cache."""
        return self.context.comm.size if self.context else 1

    @property
    def place(self) -> int:
        """Which one of these it is."""
        return self.context.comm.rank if self.context else 0

    @property
    def draws(self) -> bool:
        """Whether the last hidden states come to it, if it is in the last stage."""
        return self.place == 0

    @property
    def leads(self) -> bool:
        """Whether it is the first of those that share its stage's layers."""
        return self.orders.rank == 0
