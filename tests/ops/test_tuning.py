"""The table of tuned choices: who is in it, who is not, and what a mistake in it says."""

from __future__ import annotations

import json

import pytest
import torch

tuning = pytest.importorskip("stable_rlhf.kernels.tuning")

CARD = torch.device("cuda", 0)
LAUNCH = {"dtype": "bfloat16", "vocabulary": 131_072, "block": 8192, "warps": 16, "residency": 2}


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Writes a table and lets it be the one in force, on a machine whose only device is called CARD 3000."""
    monkeypatch.setattr(tuning, "_name", lambda index: "CARD 3000")
    numbers = iter(range(100))

    def write(content):
        path = tmp_path / f"{next(numbers)}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        monkeypatch.setenv(tuning.VARIABLE, str(path))

    return write


def test_a_device_that_was_not_measured_keeps_the_default(table):
    table({"OTHER CARD": {"chunk_rows": 4096, "row_launches": [LAUNCH]}})
    assert tuning.chunk_rows(CARD) is None and tuning.row_launch(CARD, 131_072, torch.bfloat16) is None
    assert tuning.chunk_rows(torch.device("cpu")) is None


def test_a_measured_device_gets_its_choices_near_what_was_measured(table):
    far = {**LAUNCH, "vocabulary": 8192, "block": 1024, "warps": 4}
    table({"CARD 3000": {"chunk_rows": 4096, "row_launches": [LAUNCH, far]}})
    assert tuning.chunk_rows(CARD) == 4096
    assert tuning.row_launch(CARD, 250_880, torch.bfloat16) == (8192, 16, 2)
    assert tuning.row_launch(CARD, 12_000, torch.bfloat16) == (1024, 4, 2)
    assert tuning.row_launch(CARD, 30_000, torch.bfloat16) is None, "nobody measured near 30,000"
    assert tuning.row_launch(CARD, 131_072, torch.float32) is None
    table({"CARD 3000": {"chunk_rows": None}})
    assert tuning.chunk_rows(CARD) is None and tuning.row_launch(CARD, 131_072, torch.bfloat16) is None


def test_statistics_are_made_in_the_product_as_far_as_it_paid(table):
    def widths():
        return [width for width in (0, 1024, 4096) if tuning.statistics_in_product(CARD, width)]

    table({"OTHER CARD": {"product_width": 0}})
    assert widths() == [0, 1024, 4096], "nobody measured"
    table({"CARD 3000": {"product_width": 1024}})
    assert widths() == [0, 1024]
    table({"CARD 3000": {"product_width": None}})
    assert widths() == [0, 1024, 4096]


@pytest.mark.parametrize(
    "entry, told",
    [
        ({"chunk_rows": 100}, "multiple of 128"),
        ({"row_launches": [{**LAUNCH, "block": 3000}]}, "powers of 2"),
        ({"row_launches": [{**LAUNCH, "residency": 0}]}, "residency"),
        ({"product_width": -1}, "product_width"),
        ({"product_width": "all"}, "product_width"),
    ],
)
def test_a_mistake_in_the_table_is_told(entry, told, table):
    table({"CARD 3000": entry})
    with pytest.raises(ValueError, match=f"CARD 3000.*{told}"):
        tuning.chunk_rows(CARD)


def test_the_table_of_the_package_can_be_read():
    for name, entry in tuning._read(str(tuning.TABLE)).items():
        assert name and set(entry) <= {"chunk_rows", "row_launches", "product_width", "measured"}
