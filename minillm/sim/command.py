"""`python -m minillm simulate`: a system, a cluster and a load in words, and the figures of a run. It loads no torch."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minillm.policy.admission import GATES
from minillm.policy.router import ROUTERS, LeastTokens, ShortestQueue
from minillm.sim import distserve, own, splitwise, tetri
from minillm.sim.cluster import Cluster, Kind, Together
from minillm.sim.costs import Measured
from minillm.sim.machine import Limits
from minillm.sim.report import SimReport
from minillm.trace.metrics import SLO
from minillm.trace.workload import PUBLISHED, TRACES, Arrival, Lengths, find_trace, read_trace

MACHINES = {"A100": splitwise.A100, "H100": splitwise.H100, "H100cap": splitwise.H100_CAPPED}
CHOICES = {**ROUTERS, "shortest-queue": ShortestQueue}
FORM = "write both=40xH100, or prefill=25xH100,decode=15xH100"


@dataclass(frozen=True)
class Part:
    """So many machines of a kind, in words."""

    count: int
    kind: str


def parse(text: str) -> dict[str, Part]:
    """Read "both=40xH100" or "prefill=25xH100,decode=15xA100"; DistServe's kinds are layouts, such as "tp=2,pp=2". Raises `ValueError`."""
    parts = {}
    for piece in re.split(r",\s*(?=(?:prefill|decode|both)\s*=)", text):
        found = re.fullmatch(r"\s*(prefill|decode|both)\s*=\s*(\d+)\s*x(\S+)\s*", piece)
        if not found:
            raise ValueError(f"--cluster {text!r} is not understood; {FORM}")
        if int(found[2]) < 1:
            raise ValueError(f"--cluster {text!r}: a cluster of no machines serves nobody; {FORM}")
        parts[found[1]] = Part(int(found[2]), found[3])
    if set(parts) not in ({"both"}, {"prefill", "decode"}):
        raise ValueError(f"--cluster {text!r} needs either both=…, or prefill=… and decode=…; {FORM}")
    return parts


def _machine(part: Part) -> splitwise.MachineType:
    if part.kind not in MACHINES:
        raise ValueError(f"--cluster: there is no machine {part.kind!r}; choose one of {', '.join(MACHINES)}")
    return MACHINES[part.kind]


def _parallelism(part: Part) -> distserve.Parallelism:
    sizes = dict(re.findall(r"(tp|pp)=(\d+)", part.kind))
    if not re.fullmatch(r"(tp|pp)=\d+(,(tp|pp)=\d+)*", part.kind):
        raise ValueError(f"--cluster: {part.kind!r} is not understood; write prefill=1xtp=2,decode=1xtp=1")
    return distserve.Parallelism(int(sizes.get("tp", 1)), int(sizes.get("pp", 1)))


def _own(options: argparse.Namespace) -> own.Own | None:
    """Step times that are asked for instead of published ones."""
    if options.costs == "published":
        return None
    if options.costs == "roofline":
        return own.by_roofline(options.model or "Llama-3.1-8B", options.device, options.link, chunk=options.chunk)
    if options.model is not None:
        raise ValueError(
            f"--model {options.model!r}: {options.costs} is of the model that was calibrated: leave it out"
        )
    return own.by_calibration(options.costs, options.chunk)


def _of_ranks(part: Part) -> tuple[int, int]:
    """(tensor parallel ranks, how many instances)."""
    parallelism = _parallelism(part)
    if parallelism.pp > 1:
        raise ValueError(f"--cluster: pp={parallelism.pp}: stages are simulated with published step times alone")
    return parallelism.tp, part.count


def _colocated(options: argparse.Namespace, parts: dict[str, Part]) -> Cluster:
    if "both" not in parts:
        raise ValueError("--system colocated has machines that do both: write --cluster both=40xH100")
    if (mine := _own(options)) is not None:
        return own.together(mine, *_of_ranks(parts["both"]), CHOICES[options.router])
    machine, served = _machine(parts["both"]), _served(options)
    costs = Measured.published(served.name, machine.gpu, machine.capped)
    chunk = splitwise.MAX_TOKENS if options.chunk is None else options.chunk
    limits = Limits(served.cache_tokens, splitwise.MAX_BATCH, chunk, chunked=options.chunk is not None)
    count = parts["both"].count
    return Together([Kind(costs, limits, 8)] * count, CHOICES[options.router](count))


def _served(options: argparse.Namespace) -> splitwise.Hosted:
    known = {"bloom-176b": splitwise.BLOOM, "llama-2-70b": splitwise.LLAMA}
    name = (options.model or "bloom-176b").lower()
    if name not in known:
        raise ValueError(f"--model {options.model!r}: measured are {', '.join(known)}")
    return known[name]


def _splitwise(options: argparse.Namespace, parts: dict[str, Part]) -> Cluster:
    if "both" in parts:
        design = splitwise.Design("baseline", _machine(parts["both"]), parts["both"].count)
    else:
        prefill, decode = parts["prefill"], parts["decode"]
        design = splitwise.Design("splitwise", _machine(prefill), prefill.count, _machine(decode), decode.count)
    return splitwise.build(design, _served(options), as_released=options.as_released)


def _distserve(options: argparse.Namespace, parts: dict[str, Part]) -> Cluster:
    if (mine := _own(options)) is not None:
        if "both" in parts:
            return own.together(mine, *_of_ranks(parts["both"]), LeastTokens)
        return own.apart(mine, _of_ranks(parts["prefill"]), _of_ranks(parts["decode"]))
    model = {"opt-13b": "OPT-13B", "opt-66b": "OPT-66B"}.get((options.model or "opt-13b").lower())
    if model is None:
        raise ValueError(f"--model {options.model!r}: fitted are OPT-13B, OPT-66B")
    setting = distserve.Setting(model)
    if "both" in parts:
        whole = _parallelism(parts["both"])
        if whole.pp > 1:
            raise ValueError(
                f"--cluster: machines that do both have no stages here, but pp={whole.pp} was asked: leave it out"
            )
        return distserve.colocated(setting, whole.tp, parts["both"].count, options.chunk)
    prefill, decode = parts["prefill"], parts["decode"]
    return distserve.build(
        distserve.Placement(_parallelism(prefill), _parallelism(decode), prefill.count, decode.count), setting
    )


def _tetriinfer(options: argparse.Namespace, parts: dict[str, Part]) -> Cluster:
    if options.model is not None or any(part.kind != "V100" for part in parts.values()):
        raise ValueError(
            "--system tetriinfer has OPT-13B on pairs of V100: write --cluster prefill=1xV100,decode=1xV100"
        )
    if "both" in parts:
        if parts["both"].count > 1:
            raise ValueError("--system tetriinfer compares with one pair that does both: write --cluster both=1xV100")
        return tetri.baseline(tetri.v100_pair())
    setup = tetri.Setup(parts["prefill"].count, parts["decode"].count, gate=options.gate)
    return tetri.Tetri(setup, tetri.v100_pair(), options.seed)


SYSTEMS: dict[str, Callable[[argparse.Namespace, dict[str, Part]], Cluster]] = {
    "colocated": _colocated,
    "splitwise": _splitwise,
    "distserve": _distserve,
    "tetriinfer": _tetriinfer,
}
CLUSTERS = {
    "colocated": "both=40xH100",
    "splitwise": "prefill=25xH100,decode=15xH100",
    "distserve": "prefill=1xtp=2,decode=1xtp=1",
    "tetriinfer": "prefill=1xV100,decode=1xV100",
}
OWN = {"colocated": "both=4xtp=1", "distserve": "prefill=1xtp=1,decode=1xtp=1"}  # with step times of one's own


def add_options(options: argparse.ArgumentParser) -> None:
    """What the command takes."""
    options.add_argument("--system", default="splitwise", choices=list(SYSTEMS), help="default: splitwise")
    options.add_argument("--cluster", metavar="TEXT", help="such as both=40xH100 or prefill=25xH100,decode=15xA100")
    options.add_argument(
        "--model", metavar="NAME", help="bloom-176b (default), llama-2-70b; distserve: opt-13b, opt-66b"
    )
    options.add_argument(
        "--costs",
        default="published",
        metavar="HOW",
        help="colocated, distserve: published step times (default), roofline, or a file of calibrate --json",
    )
    options.add_argument("--device", default="H100", metavar="NAME", help="with --costs roofline (default H100)")
    options.add_argument(
        "--link", default="NVLink 4", metavar="NAME", help="between its ranks and instances (default NVLink 4)"
    )
    options.add_argument(
        "--trace",
        default="azure-conversation",
        metavar="NAME",
        help="azure-conversation (default), azure-code or a CSV file",
    )
    options.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="Poisson arrivals, so many a second, with the trace's lengths (default: as in the file)",
    )
    options.add_argument("--seconds", type=float, default=60.0, metavar="S", help="of the load (default 60)")
    options.add_argument("--chunk", type=int, metavar="N", help="colocated: cut prompts to steps of N tokens")
    options.add_argument(
        "--router", default="shortest-queue", choices=list(CHOICES), help="colocated (default: shortest-queue)"
    )
    options.add_argument(
        "--gate", default="reserve-dynamic", choices=list(GATES), help="tetriinfer (default: reserve-dynamic)"
    )
    options.add_argument(
        "--as-released", action="store_true", help="splitwise: decode times as in the released simulator"
    )
    options.add_argument("--slo-ttft", type=float, metavar="S", help="seconds to the first token (with --slo-tpot)")
    options.add_argument("--slo-tpot", type=float, metavar="S", help="seconds per token after it")
    options.add_argument("--seed", type=int, default=0, metavar="S", help="of arrivals and lengths (default 0)")  # fmt: skip


def arrivals_of(options: argparse.Namespace) -> list[Arrival]:
    """The load that is asked for. Raises `ValueError` for what is not there."""
    if not options.seconds > 0:
        raise ValueError(f"--seconds {options.seconds:g}: give a number above 0")
    file = find_trace(options.trace) if options.trace in TRACES else options.trace
    known = read_trace(file) if file is not None else None
    if options.rate is None:
        if known is None:
            raise ValueError(f"{TRACES[options.trace]} is not here: give --rate, or set MINILLM_DATA to its folder")
        return [each for each in known if each.time_s < options.seconds]
    if not options.rate > 0:
        raise ValueError(f"--rate {options.rate:g}: give requests per second above 0")
    lengths: Sequence[tuple[int, int]] | Lengths
    lengths = PUBLISHED[options.trace] if known is None else [(each.prompt_tokens, each.new_tokens) for each in known]
    return splitwise.poisson_load(lengths, options.seconds)(options.rate, options.seed)


def simulate(options: argparse.Namespace) -> int:
    """Run it, and report."""
    if (options.slo_ttft is None) != (options.slo_tpot is None):
        raise ValueError("an SLO has two sides: give both --slo-ttft and --slo-tpot")
    slo = SLO(options.slo_ttft, options.slo_tpot) if options.slo_ttft is not None else None
    if options.costs != "published" and options.system not in OWN:
        raise ValueError(
            f"--costs {options.costs}: {options.system} has published step times alone; {', '.join(OWN)} take others"
        )
    text = options.cluster or (OWN[options.system] if options.costs != "published" else CLUSTERS[options.system])
    cluster = SYSTEMS[options.system](options, parse(text))
    arrivals, left_out = _that_fit(
        arrivals_of(options),
        cluster,
        distserve.LONGEST if (options.system, options.costs) == ("distserve", "published") else None,
    )
    report = SimReport.of(cluster, cluster.serve(arrivals), slo)
    missed = splitwise.misses(report.tasks, _served(options)) if options.system == "splitwise" else None
    if options.json:
        about: dict[str, Any] = {"system": options.system, "cluster": text, "left_out": left_out}
        about |= {"missed": missed} if missed is not None else {}
        print(json.dumps({**about, **report.as_dict()}, indent=1))
        return 0
    print(f"{options.system}, {text}, simulated")
    print(report.as_text())
    if left_out:
        print(f"{left_out} requests were left out: longer than the model takes")
    if missed is not None:
        print("Splitwise's nine objectives: " + ("all kept" if not missed else "missed " + "; ".join(missed)))
    return 0


def _that_fit(arrivals: Sequence[Arrival], cluster: Cluster, longest: int | None) -> tuple[list[Arrival], int]:
    """Requests that every machine has memory for and the model takes, and how many have to be left out."""
    most = min(kind.limits.cache_tokens for kind in cluster.kinds)
    most = most if longest is None else min(most, longest)
    fitting = [each for each in arrivals if each.prompt_tokens + each.new_tokens <= most]
    return fitting, len(arrivals) - len(fitting)
