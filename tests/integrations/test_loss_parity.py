"""The losses of verl, OpenRLHF and TRL, by their own functions, beside `linear_policy_loss` from hidden states.

Loss to 1e-6, gradients of hidden states and head to 1e-5: ragged rows, an empty row, all masked. Each setting of ours
is left out once as a negative control. The variants are those of the page's table.
"""

from __future__ import annotations

import pytest

from helpers.frameworks import framework_python, openrlhf_python, run_in, verl_python
from helpers.launch import ROOT
from helpers.loss_variants import VARIANTS, table


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["verl", "openrlhf", "trl"])
def test_their_losses_are_ours(framework):
    trl = ("trl", "trl==1.16.0", "datasets==5.2.0")
    python = {"verl": verl_python, "openrlhf": openrlhf_python, "trl": lambda: framework_python(*trl)}[framework]()
    out = run_in(python, "loss_parity_worker", framework)
    print(out)
    assert f"{framework}: {len(VARIANTS[framework])} losses, worst" in out


def test_the_page_has_the_table():
    assert table() in (ROOT / "docs" / "guide" / "integrations.md").read_text(encoding="utf-8")
