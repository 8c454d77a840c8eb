"""The nightly of faults: what is malformed, corrupted, slow, lying or killed, drawn for HOSTILE_BUDGET seconds.

Each time one clear error, and nothing lost: inputs untouched, what was finished intact, and the same command goes on.
"""

from __future__ import annotations

import pytest

from helpers.hostile import cheap, costly
from helpers.hostile.drawn import BUDGET, KINDS, drawn

pytestmark = pytest.mark.hostile


@pytest.mark.parametrize("kind", ["rows", "recipes", "run_folders", "embeddings", "servers"])
def test_what_is_tried_in_this_process(kind, tmp_path, tokenizer):
    check = getattr(cheap, f"check_{kind}")(tokenizer if kind == "servers" else tmp_path)
    drawn(kind, getattr(cheap, kind)(), check, seconds=BUDGET / KINDS)


@pytest.mark.parametrize("kind", ["models", "snapshots", "signals"])
def test_what_takes_a_call_of_the_command_line(kind, tmp_path, server):
    check = getattr(costly, f"check_{kind}")(tmp_path, server)
    drawn(kind, getattr(costly, kind)(), check, seconds=BUDGET / KINDS, shrink=False)
