"""Training pages without their curves, which take longer to draw than a small run to train.

tests/policy/test_page.py draws them, and so do the runs of the command line.
"""

from __future__ import annotations

import base64
import sys
from typing import Any

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def leave_out_curves() -> None:
    """For the rest of this process, which has imported the trainer if it is going to train."""
    page: Any = sys.modules.get("stable_rlhf.policy.page")
    if page is not None:
        page.training_curves = lambda *_: PIXEL
