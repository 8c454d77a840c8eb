"""Files are UTF-8 wherever they are written, and a terminal that knows ASCII alone ends nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.cli import run
from helpers.launch import environment

ROOT = Path(__file__).resolve().parents[2]
ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": ""}


def unnamed(call: ast.Call) -> bool:
    """Whether a call opens a text file, or a text pipe, in the encoding of the locale."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if "encoding" in given or None in given or (owner, name) in (("os", "open"), ("Image", "open")):
        return False
    if name in ("read_text", "write_text", "FileHandler"):
        return len(call.args) == (name != "read_text")  # a file of a package's metadata is read by name
    if name in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
        binary = owner == "gzip" or "Temporary" in name  # unless the mode says otherwise
        first = (isinstance(call.func, ast.Attribute) and owner not in ("gzip", "io", "os")) or "Temporary" in name
        mode = given.get("mode") or next(iter(call.args[0 if first else 1 :]), ast.Constant("b" if binary else "r"))
        text = mode.value if isinstance(mode, ast.Constant) else "b"
        return "t" in text if owner == "gzip" else "b" not in text
    return any(isinstance(given.get(k), ast.Constant) and given[k].value for k in ("text", "universal_newlines"))


@pytest.mark.parametrize("folder", ["stable_rlhf", "bench", "kernels", "tests"])
def test_every_text_file_names_its_encoding(folder):
    """What ruff's PLW1514 finds, and where it cannot tell that something is a path."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and unnamed(node)
    ]
    assert not found


def test_the_check_of_encodings_finds_what_it_should():
    bad = ["open(p)", "p.open('w')", "open(p, mode='a')", "gzip.open(p, 'rt')", "p.read_text()", "p.write_text('a')",
           "run(c, text=True)", "os.fdopen(1, 'w')", "NamedTemporaryFile('w')"]  # fmt: skip
    good = ["open(p, 'rb')", "p.open('wb')", "gzip.open(p)", "NamedTemporaryFile()", "p.read_bytes()", "run(c)",
            "open(p, encoding='utf-8')", "os.open(p, 1)"]  # fmt: skip
    assert [unnamed(ast.parse(code, mode="eval").body) for code in bad + good] == [True] * 9 + [False] * 8


SAMPLES = """
import sys
from pathlib import Path
from stable_rlhf.show.progress import say, tolerant_output
from stable_rlhf.engine.tracking import Tracker
assert sys.getfilesystemencoding() != "utf-8" and sys.stdout.encoding.lower() != "utf-8"
tolerant_output()
folder = Path(sys.argv[1])
for after in (0, 1):
    tracker = Tracker(folder, (), after=after)
    if not after:
        tracker.sample(0, [{"prompt": "ä\\u2026", "response": "日本"}])
        tracker.log(1, {"loss": 0.5})
    tracker.close()
assert tracker.samples == [{"step": 0, "prompt": "ä\\u2026", "response": "日本"}], tracker.samples
say("  ä\\u2026")
print("日本")
"""


def test_samples_and_words_in_an_ascii_locale(tmp_path):
    """A resumed stage reads the samples that it wrote, and words that the terminal cannot show become marks."""
    program = tmp_path / "program.py"
    program.write_text(SAMPLES, encoding="utf-8")
    command = [sys.executable, program, str(tmp_path / "stage")]
    done = subprocess.run(command, env=environment(**ASCII), capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("??\n", "  ??\n")
    assert "日本" in (tmp_path / "stage" / "samples.jsonl").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_recipe_in_an_ascii_locale(tmp_path):
    """It is read, up to the setting that is wrong in it."""
    text = 'title: "réponse …"\nmodel_name_or_path: m\ndata: {pairs: [p], prompts: [q]}\n'
    (tmp_path / "é.yaml").write_text(text, encoding="utf-8")
    run("run", "é.yaml", cwd=tmp_path, **ASCII).refused("data.judge_fraction")


@pytest.mark.slow
def test_select_in_an_ascii_locale(tmp_path):
    rows = [{"prompt": f"rivière … {i}", "response": "日本", "score": i, "skill": "é"} for i in range(12)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "c.jsonl").write_text(text, encoding="utf-8")
    run("select", "--candidates", "c.jsonl", "--output-dir", "o", "--select.embedding_model", "minilm",
        "--select.num_clusters", "2", "--select.top_k", "2", cwd=tmp_path, **ASCII).worked()  # fmt: skip
    assert "rivière …" in (tmp_path / "o" / "selection" / "report.html").read_text(encoding="utf-8")


def test_a_name_that_the_locale_cannot_read(tmp_path):
    (tmp_path / "r.yaml").write_text("model_name_or_path: m\ndata: {pairs: [p], prompts: [q]}\n", encoding="utf-8")
    run("run", "r.yaml", "--output-dir", "ö", cwd=tmp_path, **ASCII).refused("output_dir", "LC_ALL=C.UTF-8")
    run("evaluate", "--policies", "é=x", "--model-name-or-path", "m", cwd=tmp_path, **ASCII).refused(
        "--policies: '", "cannot be read in this locale; set LC_ALL=C.UTF-8"
    )
