"""What the papers claim, measured by simulation: fast ones always, all in `make claims`, which prints them and keeps the figures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from minillm.sim.claims import CLAIMS, KEPT, Claim, Outcome, check, recorded

ALL = "MINILLM_ALL_CLAIMS" in os.environ
RESULTS = Path(__file__).parents[2] / "bench" / "results" / "claims.json"
measured: list[Outcome] = []


@pytest.mark.parametrize("claim", [each for each in CLAIMS if each.fast or ALL], ids=lambda claim: claim.name)
def test_claim(claim: Claim) -> None:
    outcome = check(claim, None if ALL else 3)
    measured.append(outcome)
    print(outcome.as_text())
    assert outcome.holds, outcome.as_text()


@pytest.mark.skipif(not ALL, reason="figures are kept by make claims")
def test_figures_are_kept() -> None:
    rows = [
        {
            "name": each.claim.name, "claim": each.claim.text, "tier": each.claim.tier, "printed": each.claim.printed,
            "bounds": [each.claim.low, each.claim.high], "mean": each.mean, "deviation": each.deviation,
            "values": each.values, "holds": each.holds, "why": each.claim.why,
        }
        for each in measured
    ]  # fmt: skip
    for file in (RESULTS, KEPT):
        file.write_text(json.dumps(rows, indent=1) + "\n")
    assert len(rows) == len(CLAIMS)


def test_what_is_kept_is_of_these_claims() -> None:
    kept = recorded()
    assert list(kept) == [claim.name for claim in CLAIMS]
    assert all(outcome.holds for outcome in kept.values())
