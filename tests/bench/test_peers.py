"""The other projects' functions in the benchmarks: each gives what ours gives, and would be told if it did not.

What is not installed is skipped; `make bench-peers` installs it.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from bench import common
from bench.case import OURS, Case, Settings
from bench.ops import peers, sequence, verl_peer
from bench.ops.accuracy import check, check_logprob
from bench.ops.problem import POLICY, make_problem, own_loss, random_inputs, with_gradients
from bench.run import is_absent, run_case

CPU = torch.device("cpu")
COMPILED = ("torch.compile", "cut-cross-entropy")  # on a CPU: tens of seconds each


def named(contenders: list) -> list:
    return [
        pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.name.startswith(COMPILED) else [])
        for c in contenders
        if c.role == "peer"
    ]


def of(report: dict, name: str) -> str:
    """The verdict on a contender that is there."""
    failure = report[name].get("failure")
    if failure is not None and is_absent(failure):
        pytest.skip(f"absent: {failure}")
    assert failure is None
    return report[name]["verdict"]


@pytest.mark.parametrize("contender", named(peers.policy_peers(CPU, all_rows=True)))
def test_a_policy_loss_is_the_common_one(contender):
    """Negative control: with every advantage turned around it is wrong."""
    turned = replace(
        contender, name="turned", build=lambda p: contender.build(replace(p, advantage=-p.advantage))
    )  # fmt: skip
    report = check([contender, turned], torch.float32, CPU)
    assert of(report, contender.name) == "right" and of(report, "turned") == "WRONG"


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("contender", named(peers.logprob_contenders(True)))
def test_logprobs_are_the_common_ones(contender, gradient):
    """Negative control: of the next token they are wrong."""
    wanted = next(c for c in peers.logprob_contenders(gradient) if c.name == contender.name)
    turned = replace(wanted, name="turned", build=lambda p: wanted.build(replace(p, target=p.target.roll(1))))
    report = check_logprob([wanted, turned], gradient, torch.float32, CPU)
    assert of(report, wanted.name) == "right" and of(report, "turned") == "WRONG"


@pytest.mark.parametrize("contender", named(sequence.gae_work({"sequences": 3, "length": 7}, CPU).peers))
def test_advantages_and_returns_are_ours(contender):
    """Negative control: as verl gives them, whitened, or with the returns in their place, they are wrong."""
    work = sequence.gae_work({"sequences": 3, "length": 7}, CPU)
    want = [x.double() for x in work.ours()]
    try:
        step = contender.make()
    except ImportError as error:
        pytest.skip(f"absent: {error}")
    assert sequence.errors_of(step, want, work.tolerance)["verdict"] == "right"
    whitened = (want[0] - want[0].mean()) / want[0].std()
    for wrong in ([whitened, want[1]], [want[1], want[1]]):
        assert sequence.errors_of(step, wrong, work.tolerance)["verdict"] == "WRONG"


def test_verls_second_clip_is_out_of_reach():
    """Where a ratio is 55 and the advantage negative, its usual bound of 3 would hold the row."""
    inputs = random_inputs(8, 16, 50, torch.float32, CPU)
    problem = make_problem(*inputs, active=1.0, clipped=0.0, rehearsal=0.0, workspace_bytes=None)
    assert bool((problem.kind == POLICY).all())
    problem = replace(problem, old_logprob=problem.old_logprob - 4.0, advantage=-problem.advantage.abs())
    try:
        got = verl_peer.policy(problem)()
    except ImportError as error:
        pytest.skip(f"absent: {error}")
    for x, y in zip(got, own_step(problem)(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    dual = replace(problem, config=replace(problem.config, dual_clip=3.0))
    assert not torch.allclose(got[0], own_step(dual)()[0], rtol=0.1)


def own_step(problem):
    return with_gradients(lambda hidden, weight: own_loss(problem, hidden, weight), problem.hidden, problem.weight)


@pytest.mark.parametrize(
    ("missing", "case", "names"),
    [
        ("trl", Case("policy", {"rows": 16, "width": 8, "vocabulary": 32, "active": 0.5}),
         ["TRL chunked log-prob", "TRL selective_log_softmax", "TRL fused head, all rows"]),
        pytest.param("verl", Case("policy", {"rows": 16, "width": 8, "vocabulary": 32, "active": 0.5}),
         ["verl fused head and PPO loss", "verl fused head and PPO loss, all rows"], marks=pytest.mark.slow),
        ("liger_kernel", Case("logprob", {"rows": 16, "width": 8, "vocabulary": 32}), ["Liger scaled cross-entropy"]),
        pytest.param("trl", Case("logprob", {"rows": 16, "width": 8, "vocabulary": 32}), ["TRL fused head"],
                     marks=pytest.mark.slow),
        ("verl", Case("gae", {"sequences": 2, "length": 4}), ["verl GAE"]),
        ("pandas", Case("topk", {"rows": 64, "clusters": 2, "keep": 4}), ["pandas groupby-nlargest"]),
    ],
)  # fmt: skip
def test_who_is_not_here_is_listed_as_absent(missing, case, names, monkeypatch):
    """And nothing is timed under its name."""
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    few = Settings(rounds=3, limit=5.0, budget=1.0, memory=False, peers=tuple(names))
    found = {line["peer"]: line for line in run_case(case, few, lambda text: None)}
    assert found[OURS]["status"] == "ok"
    for name in names:
        assert (found[name]["status"], found[name]["median_s"]) == ("absent", None)
        assert missing in found[name]["failure"]


def test_peers_in_folders_of_their_own_come_last(tmp_path, monkeypatch):
    """A folder of build/peers is found, and its copy of something installed, or its `tests`, is not."""
    for name in ("only_a_peer_has_this.py", "torch.py", "bench.py"):
        (tmp_path / "one").mkdir(exist_ok=True)
        (tmp_path / "one" / name).write_text("", encoding="utf-8")
    monkeypatch.setattr(common, "PEERS", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    common.find_peers()
    common.find_peers()
    assert sys.path == [*before, str(tmp_path / "one")]
    import only_a_peer_has_this

    assert only_a_peer_has_this.__file__.startswith(str(tmp_path))
    monkeypatch.delitem(sys.modules, "only_a_peer_has_this")
