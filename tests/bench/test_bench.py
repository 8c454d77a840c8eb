"""The benchmark suite: what a line says, who is listed how, what counts as slower, and what the pages tell."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from bench import __main__ as command
from bench import pages, plots, render, run
from bench.case import COPY, OURS, RESULTS, Case, Contender, Line, Prepared, Settings, read_lines, write_lines
from bench.common import measure, quantile
from bench.compare import FASTER, GONE, NOISE, SAME, SLOWER, compare, slug
from bench.ops import OPERATIONS
from bench.presets import PRESETS
from bench.run import run_case

SETTINGS = Settings(rounds=7, limit=5.0, budget=5.0, memory=False)
FAKE = Case("fake", {"rows": 3, "vocabulary": 7}, study="test")


class Clock:
    """Time that passes when a step says so, and a microsecond at every look: no verdict here hangs on the machine."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-6
        return self.now


CLOCK = Clock()


def busy(milliseconds: float):
    def step():
        CLOCK.now += milliseconds / 1e3

    return step


def fake(case: Case, settings: Settings) -> Prepared:
    def missing():
        raise ModuleNotFoundError("No module named 'nobody'")

    def fails():
        def step():
            raise RuntimeError("out of luck")

        return step

    contenders = [
        Contender(OURS, lambda: busy(3.0), "ours"),
        Contender("other", lambda: busy(6.0)),
        Contender("missing", missing),
        Contender("fails", fails),
        Contender("wrong", lambda: busy(0.1)),
        Contender("floor", lambda: busy(1.0), "floor", scale=2.0),
    ]
    report = {
        OURS: {"errors": {"loss": 1e-7}, "verdict": "right"},
        "wrong": {"errors": {"loss": 1.0}, "verdict": "WRONG"},
    }
    return Prepared(contenders, lambda wanted: report, flops=1e6, moved=1e3, absent={"pandas": "not installed: pandas"})


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", CLOCK)


@pytest.fixture
def lines(clock, monkeypatch):
    monkeypatch.setitem(OPERATIONS, "fake", fake)
    found = run_case(FAKE, SETTINGS, lambda text: None)
    environment = {"time": "2030-01-01T00:00:00+00:00", "cpu": "X", "threads": 2, "cpu_features": ["avx2"],
                   "versions": {"torch": "2"}, "commit": "0123456789", "tree_is_dirty": False}  # fmt: skip
    return [line | {"environment": environment} for line in found]


def by_peer(lines):
    return {line["peer"]: line for line in lines}


def test_everyone_is_listed_with_status_and_reason(lines):
    found = by_peer(lines)
    assert {name: line["status"] for name, line in found.items()} == {
        OURS: "ok", "other": "ok", "missing": "absent", "fails": "failed", "wrong": "failed", "floor": "ok",
        "pandas": "absent",
    }  # fmt: skip
    assert "nobody" in found["missing"]["failure"] and "out of luck" in found["fails"]["failure"]
    assert found["wrong"]["median_s"] is None and "wrong" in found["wrong"]["failure"]
    for line in lines:
        assert {"op", "peer", "status", "median_s", "floor_share", "shape", "dtype", "study"} <= set(line)


def test_a_line_holds_time_rate_and_share_of_the_floor(lines):
    own = by_peer(lines)[OURS]
    assert own["p20_s"] <= own["median_s"] <= own["p80_s"] and own["rounds"] == 7
    assert own["flops_per_s"] == pytest.approx(1e6 / own["median_s"])
    assert own["times_floor"] == pytest.approx(1.5, rel=0.01)  # 3 ms beside a floor of 1 ms that counts twice
    assert own["floor_share"] == pytest.approx(1 / own["times_floor"])


def test_lines_survive_the_file_and_a_second_run_replaces_them(lines, tmp_path):
    path = tmp_path / "deep" / "x.jsonl"
    write_lines(lines, path)
    other = [line | {"case": "another"} for line in lines[:1]]
    write_lines(other, path)
    write_lines(lines[:2], path)
    assert read_lines(path) == other + lines[:2]


def test_a_slowed_kernel_is_flagged_and_an_equal_one_is_not(lines, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(run.SLOW, f"{OURS}=1.0")
    slowed = run_case(FAKE, SETTINGS, lambda text: None)
    verdicts = {change.peer: change.verdict for change in compare(lines, slowed)}
    assert verdicts[OURS] == SLOWER and verdicts["other"] == SAME
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    write_lines(lines, before)
    write_lines(slowed, after)
    assert command.main(["compare", str(before), str(after)]) == 1
    assert SLOWER in capsys.readouterr().out
    assert command.main(["compare", str(before), str(before)]) == 0


PRODUCTS = "floor, all rows"


def synthetic(middle: float, spread: float, status: str = "ok", floor: str = PRODUCTS, peer: str = OURS) -> Line:
    return {
        "case": "c", "peer": peer, "role": "ours", "status": status, "median_s": middle, "times_floor": middle,
        "times_floor_p20": middle * (1 - spread), "times_floor_p80": middle * (1 + spread), "floor": floor,
    }  # fmt: skip


@pytest.mark.parametrize(
    "after, verdict",
    [
        (synthetic(1.04, 0.01), SAME),
        (synthetic(1.25, 0.03), SLOWER),
        (synthetic(0.75, 0.03), FASTER),
        (synthetic(1.25, 0.30), NOISE),  # the ranges overlap
        (synthetic(1.02, 0.30), NOISE),  # alike in the middle, and anywhere
        (synthetic(1.0, 0.01, status="failed"), GONE),
    ],
)
def test_verdicts(after, verdict):
    assert [change.verdict for change in compare([synthetic(1.0, 0.02)], [after])] == [verdict]


def test_a_floor_of_copies_leaves_more_to_chance():
    """From process to process such ratios move by a tenth and more, however well the rounds of one agree."""
    before = synthetic(1.0, 0.02, floor=COPY)
    for middle, verdict in ((1.15, NOISE), (0.85, NOISE), (1.4, SLOWER), (0.7, FASTER)):
        assert [c.verdict for c in compare([before], [synthetic(middle, 0.02, floor=COPY)])] == [verdict]


def test_ratios_are_taken_round_by_round():
    """A burst that hits neighbours alike is no noise of their ratio; a burst on one of them is."""

    def line(role, samples):
        return {"peer": role, "role": role, "status": "ok", "median_s": sorted(samples)[2], "samples_s": samples}

    floor, own = line("floor", [1.0, 1.0, 3.0, 1.0, 5.0]), line("ours", [1.1, 1.1, 3.3, 1.1, 5.5])
    run.against_floor([floor, own])
    assert own["times_floor"] == pytest.approx(1.1) and not own["noisy"]
    other = line("peer", [1.1, 1.9, 3.3, 1.1, 9.0])
    run.against_floor([floor, other])
    assert other["noisy"] and render.ratio(other) == f"{other['times_floor_p20']:.2f}–{other['times_floor_p80']:.2f}"


def test_short_calls_are_timed_in_bunches(clock):
    calls = []
    timings = measure(
        {"it": lambda: calls.append(busy(0.01)())},
        torch.device("cpu"),
        rounds=3,
        warmup=1,
        limit=1,
        budget=1,
        shortest=1e-3,
    )
    assert 3 * 80 < len(calls) < 3 * 110 and timings["it"].median == pytest.approx(0.01, rel=0.2)
    assert quantile([1.0, 2.0, 3.0], 0.25) == 1.5


def test_a_real_case_and_its_peers(tmp_path):
    case = Case("policy", {"rows": 48, "width": 16, "vocabulary": 97, "active": 0.5, "rehearsal": 0.25})
    found = by_peer(run_case(case, replace(SETTINGS, rounds=3, peers=("plain", "nobody")), lambda text: None))
    assert found[OURS]["status"] == "ok" and found[OURS]["verdict"] == "right" and found[OURS]["floor_share"] > 0
    assert {"plain PyTorch", "plain PyTorch, all rows"} <= set(found)
    assert found["plain PyTorch, all rows"]["verdict"] == "right"


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_name_operations_that_exist(preset):
    cases = PRESETS[preset]()
    assert cases and all(case.op in OPERATIONS for case in cases)
    assert len({(case.key, case.study) for case in cases}) == len(cases)


def lines_of_pages():
    return [line for path in command.PAGE_LINES for line in read_lines(path)]


def test_pages_show_what_the_results_hold():
    marked = {}
    for path in render.PAGES:
        page = path.read_text(encoding="utf-8")
        marked[path.name] = [match["name"] for match in pages.marked("bench").finditer(page)]
        assert render.rendered(page, lines_of_pages()) == page, "run: python -m bench report --readme"
    assert marked["README.md"] == ["speed"]
    assert marked["benchmarks.md"] == [
        "policy-loss",
        "large-vocabulary",
        "cpu",
        "policy-loss-native",
        "large-vocabulary-native",
        "advantage-loss",
        "contrastive",
        "small-operations",
        "updates",
    ]
    studies = {case.study for preset in ("readme", "cpu", "native") for case in PRESETS[preset]()}
    assert studies == set(marked["benchmarks.md"])


def test_results_name_no_place_on_anybodys_disk():
    for path in RESULTS.glob("*.json*"):
        text = path.read_text(encoding="utf-8")
        assert not any(part in text for part in ("/home/", "/tmp/", "/root/", "/work/", "/Users/")), path.name


def test_tables_and_plots_of_whatever_there_is(lines, tmp_path):
    for sweep, axis in (("sweep:rows", "rows"), ("sweep:vocabulary", "vocabulary"), ("sweep:memory", "vocabulary")):
        for factor in (1, 2):
            lines = lines + [
                x | {"study": sweep, "shape": {**x["shape"], axis: factor * 64}, "peak_mib": 3.0}
                for x in lines[:2] if x["study"] == "test"
            ]  # fmt: skip
    lines[0]["parts_s"] = {"forward": 1.0, "backward": 2.0}
    lines[0]["shape"] = {**lines[0]["shape"], "model": "llama", "batch": 1, "length": 2, "width": 3, "layers": 4}
    lines[0]["environment"] |= {"rates": {"float32_flops_per_s": 1e11, "copy_bytes_per_s": 1e10}}
    assert render.table(lines).row_count > 3 and render.summary(lines).row_count
    drawn = plots.draw(lines, tmp_path)
    assert sorted(path.stem for path in drawn) == ["bench-memory", "bench-parts", "bench-roofline", "bench-sweeps"]


def test_who_is_only_given_all_rows_has_a_row_in_the_table():
    def line(peer, times, **shape):
        return {"op": "policy", "peer": peer, "status": "ok", "times_floor": times, "noisy": False, "shape": shape}

    lines = [line(OURS, 1.0, active=0.5), line(OURS, 1.0), line("other", 3.0), line("floor, all rows", 1.0),
             line("other, all rows", 4.0, active=0.5), line("masked, all rows", 2.0, active=0.5)]  # fmt: skip
    assert [row.split("|")[1:5] for row in render.policy_loss(lines).splitlines()[2:5]] == [
        [f" **{OURS}** ", " 1.00 ", " 1.00 ", " 1.00 "],
        [" masked ", "  ", " 2.00 ", "  "],
        [" other ", "  ", " 4.00 ", " 3.00 "],
    ]


def test_the_command_line_teaches(capsys):
    for words in (["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            command.main(words)
        assert stopped.value.code == 0 and "python -m bench --quick" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unknown operation 'gaee'"):
        command.main(["--quick", "--ops", "gaee"])
    with pytest.raises(SystemExit, match="add --preset"):
        command.main(["--ops", "gae"])


@pytest.mark.slow
def test_guard_wants_accepted_ratios_first_and_then_flags_a_slower_kernel(clock, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(OPERATIONS, "fake", fake)
    monkeypatch.setitem(command.PRESETS, "guard", lambda: [FAKE])
    monkeypatch.setattr(command, "machine", lambda device: {"commit": None})
    words = ["guard", "--folder", str(tmp_path), "--device", "cpu"]
    assert command.main(words) == 2
    assert command.main([*words, "--update"]) == 0
    assert list(tmp_path.glob("guard-*.jsonl"))
    monkeypatch.setenv(run.SLOW, f"{OURS}=1.0")
    assert command.main(words) == 1
    monkeypatch.setenv(run.SLOW, f"{OURS}=0.25")
    assert command.main(words) == 1
    monkeypatch.delenv(run.SLOW)
    assert command.main(words) == 0
    assert SLOWER in capsys.readouterr().out


@pytest.mark.parametrize("slope, largest", [(10.0, 48), (11.0, 44), (400.0, 0), (0.0, 256)])
def test_the_largest_batch_is_one_that_was_measured_to_fit(slope, largest, monkeypatch):
    monkeypatch.setattr(run, "peak_of", lambda case, settings, name: 500.0 + slope * case.shape["batch"])
    case = Case("ppo-update", {"batch": 4})
    found = run.largest_batch(case, replace(SETTINGS, budget_mib=990.0), OURS)
    assert found == largest and 500.0 + slope * found <= 990.0


@pytest.mark.parametrize(
    "features, kind",
    [
        ([], ""),
        (["avx2"], "avx2-"),
        (["avx2", "avx512", "avx512_vnni"], "avx512-"),
        (["avx2", "avx512", "avx512_vnni", "avx512_bf16"], "avx512-bf16-"),
        (["avx2", "avx512", "avx512_bf16", "amx_tile"], "avx512-bf16-amx-"),
    ],
)
def test_a_kind_of_processor_has_one_name(features, kind):
    assert slug({"cpu": "AMD EPYC (x)", "cpu_features": features, "threads": 2}) == f"amd-epyc-x-{kind}2-threads"
    assert slug({"gpu": "NVIDIA H200", "cpu": "X", "cpu_features": features, "threads": 2}) == "nvidia-h200"


def test_accepted_ratios_are_named_by_the_processor_that_they_were_measured_on():
    paths = [path for path in RESULTS.glob("guard-*.jsonl") if path.stem != "guard-now"]
    assert paths
    for path in paths:
        assert {f"guard-{slug(line['environment'])}" for line in read_lines(path)} == {path.stem}


@pytest.mark.slow
def test_memory_is_the_resident_set_of_a_process():
    """Plain PyTorch holds logits of 64 MiB more than once; a call of ours its workspace and the gradients."""
    case = Case("policy", {"rows": 512, "width": 32, "vocabulary": 32_768}, memory=True)
    plain = run.resident_peak(case, SETTINGS, "plain PyTorch")
    assert 2 * 64 < plain < 8 * 64


def test_a_study_of_another_preset_is_told_where_it_is():
    with pytest.raises(SystemExit, match="--study small-operations; that study is in --preset readme"):
        command.main(["--quick", "--study", "small-operations"])
