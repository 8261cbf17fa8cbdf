"""The lines of a mesh are groups of their own."""

from __future__ import annotations

from minillm.parallel.layout import Layout
from minillm.parallel.mesh import DeviceMesh
from minillm.ranks.membership import context
from minillm.ranks.pool import Ranks


def test_sums_along_each_axis(ranks4: Ranks) -> None:
    def sums() -> tuple[int, ...]:
        import torch

        mesh = DeviceMesh(Layout(pp=2, tp=2), context())
        assert (mesh.size("dp"), mesh.size("pp"), mesh.size("tp")) == (1, 2, 2)
        assert mesh.rank == 2 * mesh.place("pp") + mesh.place("tp")
        ten = torch.tensor([10**mesh.rank])
        return tuple(int(mesh.comm(axis).all_reduce(ten.clone())) for axis in ("dp", "pp", "tp"))

    assert ranks4.run(sums) == [(1, 101, 11), (10, 1010, 11), (100, 101, 1100), (1000, 1010, 1100)]
