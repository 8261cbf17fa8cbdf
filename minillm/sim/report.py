"""What users of a simulated cluster feel, and how busy it was: percentiles, SLO attainment, and the objectives that are missed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minillm.sim.cluster import Cluster
from minillm.sim.task import Task
from minillm.trace.metrics import SLO, Estimate, percentile, proportion

KINDS = (("ttft", "TTFT"), ("tpot", "TPOT"), ("longest_gap", "longest gap"), ("e2e", "E2E"), ("queue", "queue"))


@dataclass(frozen=True)
class SimReport:
    """The figures of a simulation of so many machines: of all its requests."""

    tasks: tuple[Task, ...]
    machines: int
    gpus: int
    busy: float
    slo: SLO | None = None

    @classmethod
    def of(cls, cluster: Cluster, tasks: Sequence[Task], slo: SLO | None = None) -> SimReport:
        """Raises `ValueError` without requests."""
        if not tasks:
            raise ValueError("no request was simulated: raise the rate, or simulate more seconds")
        report = cls(tuple(tasks), len(cluster.machines), cluster.gpus, 0.0, slo)
        busy = (
            sum(machine.busy_s for machine in cluster.machines) / len(cluster.machines) / max(report.duration_s, 1e-9)
        )
        return cls(report.tasks, report.machines, report.gpus, min(1.0, busy), slo)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last token."""
        return max(task.finished_s for task in self.tasks) - min(task.arrival_s for task in self.tasks)

    def latency(self, kind: str, percent: float) -> Estimate:
        """A percentile over requests, in seconds, of "ttft", "tpot", "longest_gap", "e2e" or "queue"."""
        some = [task for task in self.tasks if kind not in ("tpot", "longest_gap") or task.new > 1] or list(self.tasks)
        return percentile([getattr(task, f"{kind}_s") for task in some], percent)

    @property
    def attainment(self) -> Estimate | None:
        """Share of requests that met the SLO, if there is one."""
        slo = self.slo
        if slo is None:
            return None
        met = sum(task.ttft_s <= slo.ttft_s and task.tpot_s <= slo.tpot_s for task in self.tasks)
        return proportion(met, len(self.tasks))

    def as_dict(self) -> dict[str, object]:
        """All figures, for JSON."""
        output = sum(task.new for task in self.tasks)
        figures: dict[str, object] = {
            "machines": self.machines, "gpus": self.gpus, "requests": len(self.tasks), "duration_s": self.duration_s,
            "requests_per_s": len(self.tasks) / self.duration_s, "tokens_per_s": output / self.duration_s,
            "busy": self.busy, "preemptions": sum(task.preemptions for task in self.tasks),
        }  # fmt: skip
        for kind, _ in KINDS:
            figures[f"{kind}_s"] = {f"p{percent}": vars(self.latency(kind, percent)) for percent in (50, 90, 99)}
        if self.attainment is not None:
            figures |= {"slo": vars(self.slo), "attainment": vars(self.attainment)}
        return figures

    def as_text(self) -> str:
        """A table with units; in brackets the 95 % interval."""
        output = sum(task.new for task in self.tasks)
        lines = [
            f"{len(self.tasks):,} requests in {self.duration_s:.1f} s on {self.machines} machines, {self.gpus} GPUs: "
            f"{len(self.tasks) / self.duration_s:.2f} requests/s, {output / self.duration_s:,.0f} output tokens/s, "
            f"machines busy {self.busy:.0%}",
            f"{'ms':12}" + "".join(f"{f'P{percent}':>24}" for percent in (50, 90, 99)),
        ]
        for kind, name in KINDS:
            cells = [self.latency(kind, percent).text(1e3) for percent in (50, 90, 99)]
            lines.append(f"{name:12}" + "".join(f"{cell:>24}" for cell in cells))
        if self.slo is not None and self.attainment is not None:
            lines.append(
                f"SLO TTFT ≤ {self.slo.ttft_s:g} s and TPOT ≤ {self.slo.tpot_s:g} s: met by {self.attainment.text(100)} %"
            )
        return "\n".join(lines)
