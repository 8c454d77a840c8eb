"""A few of every quick kind, in the ordinary tests: that the nightly of faults (``make test-hostile``) still runs."""

from __future__ import annotations

import pytest

from helpers.hostile import cheap
from helpers.hostile.drawn import drawn


@pytest.mark.parametrize("kind", ["rows", "recipes", "run_folders", "embeddings", "servers"])
def test_some_of_each_kind(kind, tmp_path, tokenizer):
    check = getattr(cheap, f"check_{kind}")(tokenizer if kind == "servers" else tmp_path)
    drawn(kind, getattr(cheap, kind)(), check, examples=4 if kind == "recipes" else 6)
