"""The page of a training run: what it shows, that it needs no other file, and that it is written whole."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image

from stable_rlhf.engine.tracking import Tracker
from stable_rlhf.policy.guard import StabilityGuard
from stable_rlhf.policy.page import PAGE, Page, render_page, training_curves, write_page
from stable_rlhf.settings.recipe import GuardArguments

HISTORY = [
    {"step": s, "score": 0.1 * s, "kl": 0.2 * s, "length": 10.0 + s, "entropy": 2 - 0.01 * s, "clip_fraction": 0.1,
     "policy_loss": -0.1, "value_loss": 0.5, "gradient_norm": 1.0 / s, "logprob_gap": 1e-6, "logprob_gap_max": 1e-5,
     "finished": 0.9, "kl_coef": 0.05}
    for s in range(1, 9)
]  # fmt: skip
SAMPLES = [
    {"step": s, "prompt": "Is 1 < 2?", "task": "math", "response": f"<b>yes {s}</b>", "score": s / 10, "length": 3,
     "finished": s % 2 == 0}
    for s in range(0, 60, 2)
] + [
    {"step": 0, "prompt": [{"role": "user", "content": "Hello"}], "task": None, "response": "x" * 2000, "score": 0.0,
     "length": 9, "finished": False}
]  # fmt: skip
WARNINGS = [(3, "entropy", "it is <collapsing>"), (5, "kl", "it is far")]
SETTINGS = {"ppo": {"kl_coef": 0.05, "stop": ["<end>"]}, "seed": 3}


@pytest.fixture(scope="module")
def page() -> str:
    return render_page("PPO am-sr", SETTINGS, HISTORY, SAMPLES, WARNINGS, 100)


def test_the_page_says_what_happened(page):
    assert "Step 8 of 100." in page and "score 0.8" in page
    assert page.index("it is far") < page.index("it is &lt;collapsing&gt;")  # the newest warning first
    assert "Step 3, entropy." in page
    assert "&lt;b&gt;yes 0&lt;/b&gt;" in page and "&lt;b&gt;yes 58&lt;/b&gt;" in page  # the first and the last answer
    assert len(re.findall("&lt;b&gt;yes", page)) == 12  # and not all of those between
    assert "user: Hello" in page and "x" * 600 not in page and "(cut off)" in page
    assert "ppo.kl_coef" in page and "&lt;end&gt;" in page


def test_the_page_needs_no_other_file(page):
    assert "<script" not in page and "http" not in page.replace('charset="utf-8"', "")
    assert [src[:22] for src in re.findall(r'src="([^"]*)"', page)] == ["data:image/png;base64,"]
    for text in ("<b>", "<end>", "<collapsing>"):
        assert text not in page


def test_the_curves_are_a_picture_of_the_panels_that_have_values(page):
    (data,) = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    whole = Image.open(io.BytesIO(base64.b64decode(data)))
    few = Image.open(io.BytesIO(training_curves([{"step": 1.0, "score": 1.0, "kl": float("nan")}])))
    assert whole.width == few.width and whole.height > 3 * few.height


def test_without_warnings_and_samples_it_says_so():
    page = render_page("PPO", {}, HISTORY[:1], [], [], 1)
    assert "None so far." in page and "--rollout.sample_steps" in page


@pytest.fixture(scope="module", autouse=True)
def with_curves():
    """Elsewhere in the tests they are left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stable_rlhf.policy.page.training_curves", training_curves)
        yield


def test_pages_take_a_twentieth_of_the_time(monkeypatch):
    now, written = [100.0], []

    def write(*given, total_steps):
        assert (given, total_steps) == (("folder",), 3)
        written.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr("stable_rlhf.policy.page.time.monotonic", lambda: now[0])
    monkeypatch.setattr("stable_rlhf.policy.page.write_page", write)
    page = Page("folder", total_steps=3)
    for _ in range(100):  # a step a second, a snapshot after each
        page.keep_up()
        now[0] += 1.0
    assert written == [100.0, 140.0, 180.0]
    page.write()  # the end is always shown
    assert written[-1] > 200


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    tracker, guard = Tracker(tmp_path, ()), StabilityGuard(GuardArguments())
    write_page(tmp_path, "PPO", {}, tracker, guard, total_steps=3)
    assert not (tmp_path / PAGE).exists()  # nothing to show yet
    tracker.log(1, {"score": 1.0})
    write_page(tmp_path, "PPO", {}, tracker, guard, total_steps=3)
    first = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert first.endswith("</html>") and not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    tracker.log(2, {"score": 2.0})
    write_page(tmp_path, "PPO", {}, tracker, guard, total_steps=3)
    assert (tmp_path / PAGE).read_text(
        encoding="utf-8"
    ) == first and "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "1")
    (tmp_path / PAGE).unlink()
    write_page(tmp_path, "PPO", {}, tracker, guard, total_steps=3)
    assert not (tmp_path / PAGE).exists()
    tracker.close()
