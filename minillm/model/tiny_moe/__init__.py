"""A tiny mixture of experts whose router has learned to prefer some of them: 2.7 million numbers, 4 layers of 16 experts, top 2.

`train.py` made it, and `training.json` has its seed and loss curve. It writes lines that look like Shakespeare's, and no more.
"""

from __future__ import annotations

from pathlib import Path


def tiny_moe_folder() -> Path:
    """Its Hugging Face folder."""
    return Path(__file__).parent
