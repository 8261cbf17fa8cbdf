"""Splitwise's three pools as they are now: machines with what waits at each, in the pool that they are in."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from minillm.policy.handing import Role
from minillm.policy.pools import Pools
from minillm.viz.style import DECODE, FAINT, INK, PREFILL, frame, new_figure

NAMES = ("prompt pool", "mixed pool", "token pool")


def draw_pool_map(pools: Pools, finding: str, caption: str) -> Figure:
    """Three boxes; each machine is a square in the colour of its home, with the prompt tokens that it is to read and the requests that it is to decode."""
    members = [pools.pool(Role.PREFILL), sorted(pools.mixed), pools.pool(Role.DECODE)]
    figure, axes = new_figure(2.9, [1, 1, 1])
    unread = [0] * len(pools.homes)
    gives = [0] * len(pools.homes)
    for placed in pools.placed.values():
        unread[placed.prompt_at] += placed.unread
        gives[placed.token_at] += 1
    for axis, name, machines in zip(axes, NAMES, members):
        axis.add_patch(
            FancyBboxPatch(
                (0.03, 0.03), 3.9, 1.94, boxstyle="round,pad=0,rounding_size=0.12", facecolor="#f7f7f7", edgecolor=FAINT
            )
        )
        for place, machine in enumerate(machines):
            x, y = 0.14 + 1.26 * (place % 3), 1.06 - 0.95 * (place // 3)
            colour = PREFILL if pools.homes[machine] is Role.PREFILL else DECODE
            axis.add_patch(Rectangle((x, y), 1.15, 0.82, facecolor=colour, alpha=0.22, edgecolor=colour, linewidth=1.8))
            axis.text(
                x + 0.57,
                y + 0.62,
                f"machine {machine}",
                ha="center",
                va="center",
                fontsize=9.5,
                weight="bold",
                color=INK,
            )
            axis.text(x + 0.57, y + 0.38, f"reads {unread[machine]:,}", ha="center", va="center", fontsize=9, color=INK)
            axis.text(x + 0.57, y + 0.16, f"decodes {gives[machine]}", ha="center", va="center", fontsize=9, color=INK)
        if not machines:
            axis.text(1.98, 1.0, "nobody", ha="center", va="center", fontsize=10.5, color=FAINT)
        axis.set(xlim=(0, 3.96), ylim=(0, 2), xticks=[], yticks=[])
        axis.set_title(name, loc="left", fontsize=11, color=INK)
        for side in axis.spines.values():
            side.set_visible(False)
    return frame(figure, finding, caption)
