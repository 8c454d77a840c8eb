"""JSON that the package wrote itself and that is damaged since: one error, which names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.engine import snapshots, tracking
from stable_rlhf.rehearsal import store
from stable_rlhf.run import seeds as study
from stable_rlhf.run import strength


def manifest(folder: Path) -> None:
    raise ValueError(snapshots._read(folder / "step-1"))  # it says what is wrong: the snapshot before is used


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a scorer's votes": ("differences.json", lambda folder: strength._read_votes(folder / "differences.json")),
    "a validation": ("validation/results.json", lambda folder: study._validation(folder, "x", {})),
    "a service's run": ("tracking.json", lambda folder: tracking._identity(folder, 3)),
    "a snapshot": ("step-1/manifest.json", manifest),
    "embeddings": ("manifest.json", store.open_embeddings),
    "embeddings to finish": ("job.json", lambda folder: store._begin(folder, {"key": "x"})),
}


@pytest.mark.parametrize("text", ["", "{", "null", '"x"', "{}", '{"key": "x"}', "[[1]]", "\x00", "[" * 10**5])
@pytest.mark.parametrize("what", READERS)
def test_one_error_that_names_the_file(what, text, tmp_path):
    name, read = READERS[what]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=Path(name).name.replace(".", r"\.")) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and str((tmp_path / name).parent) in str(caught.value)
