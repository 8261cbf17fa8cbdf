"""What ranks printed, shown here with the rank's number before each line."""

from __future__ import annotations

import sys
from itertools import groupby


def print_lines(lines: list[tuple[int, str, str]]) -> None:
    """Print (rank, "stdout" or "stderr", text) lines, in as few writes as the streams allow."""
    for stream, group in groupby(lines, key=lambda line: line[1]):
        text = "".join(f"rank {rank}: {line}\n" for rank, _, line in group)
        print(text, end="", file=sys.stderr if stream == "stderr" else sys.stdout, flush=True)
