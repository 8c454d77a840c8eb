from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from stable_rlhf.data import DataError
from stable_rlhf.rehearsal import (
    embed_to_folder,
    open_embeddings,
    read_candidates,
    select_file,
    select_rehearsal,
    select_to_folder,
    skill_purity,
    sweep_clusters,
)

pytest.importorskip("sklearn")
pytest.importorskip("torch")


def encode(texts: list[str]) -> np.ndarray:
    """Three directions by the first letter, and a little noise that depends on the text."""
    rows = []
    for text in texts:
        row = 0.05 * np.random.default_rng(list(text.encode())).normal(size=8)
        row["abc".index(text[0])] += 1
        rows.append(row)
    return np.stack(rows).astype(np.float32)


def rows(n: int = 90) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {"prompt": f"{'abc'[i % 3]} <b>{i}</b> $x^2$", "response": "r" * (i % 7 + 1), "task": f"skill {i % 3}",
         "score": float(rng.normal())}
        for i in range(n)
    ]  # fmt: skip


def write(path, lines) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return str(path)


def make(folder, given, **settings):
    scores = [row["score"] for row in given]
    call = {"num_clusters": 3, "top_k": 4, "embedding_model": "fake", "embedding": {"encoder": encode}, **settings}
    return select_to_folder(given, scores, folder, **call)


def test_everything_is_written(tmp_path):
    given = rows()
    outside = [{"prompt": "q", "response": "a"}]
    chosen = make(tmp_path / "o", given, outside=outside, sweep=[2, 3, 5], near_duplicate=0.999, minimum={"score": -2})
    plain = select_rehearsal(
        given, [r["score"] for r in given], encode([r["prompt"] for r in given]), num_clusters=3, top_k=4
    )
    assert chosen.indices.tolist() == plain.indices.tolist()
    with gzip.open(tmp_path / "o" / "rehearsal.jsonl.gz", "rt", encoding="utf-8") as file:
        kept = [json.loads(line) for line in file]
    assert sum(row["provenance"]["origin"] == "selected" for row in kept) == 12 and len(kept) == 13
    assert all(row["provenance"]["criteria"].keys() >= {"score", "length"} for row in kept if "score" in row)
    figures = json.loads((tmp_path / "o" / "selection.json").read_text(encoding="utf-8"))
    assert figures["kept"] == 12 and figures["candidates"] == 90 and figures["embedding"]["rows"] == 90
    assert [row["num_clusters"] for row in figures["sweep"]] == [2, 3, 5]
    page = (tmp_path / "o" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 5  # map, sizes, criteria, coverage, sweep
    assert "<script" not in page and not re.search(r"""(src|href)=["']?(http|//)""", page)
    assert "12 of 90 candidates are kept" in page and "1 rows of outside data" in page
    assert "<b>" not in page and "&lt;b&gt;" in page
    assert "skill purity" in page and "1.0000 (random" in page


def test_the_embeddings_are_used_again(tmp_path):
    make(tmp_path / "one", rows(), embeddings_folder=tmp_path / "e")

    def refuse(texts):
        raise AssertionError("embedded twice")

    again = make(tmp_path / "two", rows(), embeddings_folder=tmp_path / "e", top_k=1, embedding={"encoder": refuse})
    assert len(again.rows) == 3
    make(tmp_path / "three", rows(60), embeddings_folder=tmp_path / "e")  # other prompts, a folder of their own
    assert len(list((tmp_path / "e").iterdir())) == 2


@pytest.mark.parametrize("settings", [{"group_by": "task"}, {"num_clusters": 1, "top_k": 12}])
def test_known_groups_are_kept_of_without_embeddings(tmp_path, settings):
    def refuse(texts):
        raise AssertionError("embedded")

    given = rows()
    given[4]["score"] = given[7]["score"] = 9.0  # two of "skill 1"
    chosen = make(tmp_path, given, **settings, embedding={"encoder": refuse}, spherical=True)
    best = {  # by hand: the best of each task, or of all
        i
        for group in ([range(k, 90, 3) for k in range(3)] if "group_by" in settings else [range(90)])
        for i in sorted(group, key=lambda i: -given[i]["score"])[: len(chosen.rows) // chosen.clusters.num_clusters]
    }
    assert set(chosen.indices.tolist()) == best and len(best) == 12
    figures = json.loads((tmp_path / "selection.json").read_text(encoding="utf-8"))
    assert figures["embedding"] is None and figures["inertia"] is None and figures["map"] == []
    assert figures["method"] == ("task" if "group_by" in settings else "none")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "12 of 90 candidates are kept" in page and ("of each of 3 tasks" in page) == ("group_by" in settings)


def test_groups_by_task_beside_embeddings_for_duplicates(tmp_path):
    given = rows()
    for i in range(0, 90, 3):  # one prompt for all of a task
        given[i]["prompt"] = "a"
    chosen = make(tmp_path, given, group_by="task", near_duplicate=0.9999)
    assert [row["kept"] for row in chosen.cluster_stats] == [1, 4, 4]
    without = [{k: v for k, v in row.items() if k != "task"} for row in given]
    with pytest.raises(ValueError, match=r"^group_by: no candidate has a 'task' to be grouped by$"):
        make(tmp_path / "none", without, group_by="task")


@pytest.mark.parametrize("count", [1, 2, 40])
def test_small_and_unlabelled_sets_have_a_page_too(tmp_path, count):
    given = [{k: v for k, v in row.items() if k != "task"} for row in rows(count)]
    make(tmp_path, given, num_clusters=min(count, 3))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "skill purity" not in page and f"of {count} candidates" in page


def test_a_selection_that_keeps_nothing_has_a_page_and_a_warning(tmp_path, capsys):
    assert make(tmp_path, rows(), minimum={"score": 99.0}).rows == []
    nothing = "none of 90 candidates is left by select.minimum {'score': 99.0}"
    assert f"WARNING: {nothing}: the rehearsal data are 0 outside rows" in capsys.readouterr().err
    assert "0 of 90 candidates are kept" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "90 did not meet score ≥ 99" in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(DataError, match=f"^{nothing}, and there are no outside rows: nothing is left"):
        make(tmp_path, rows(), minimum={"score": 99.0}, needed=True)
    make(tmp_path, rows(), minimum={"score": 99.0}, needed=True, outside=[{"prompt": "q", "response": "a"}])


def test_read_candidates(tmp_path):
    path = write(tmp_path / "c.jsonl", [{**rows()[0], "entropy": 0.5}, rows()[1]])
    found, scores = read_candidates(path)
    assert scores.tolist() == [rows()[0]["score"], rows()[1]["score"]]
    assert found[0]["entropy"] == 0.5 and found[0]["task"] == "skill 0" and found[0]["prompt"] == rows()[0]["prompt"]
    for bad, message in ((None, "'score' is missing"), ("high", "not a string"), (True, "not a boolean")):
        broken = {k: v for k, v in rows()[2].items() if k != "score"} | ({} if bad is None else {"score": bad})
        path = write(tmp_path / "d.jsonl", [rows()[0], broken])
        with pytest.raises(DataError, match=rf"d\.jsonl:2: .*{message}"):
            read_candidates(path)
        assert len(read_candidates(path, on_bad_row="skip")[0]) == 1


def test_select_file(tmp_path):
    path = write(tmp_path / "c.jsonl", rows())
    outside = write(tmp_path / "outside.jsonl", [{"prompt": "q", "response": "a"}])
    chosen = select_file(
        path, tmp_path / "o", num_clusters=3, top_k=2, outside=outside, embedding_model="fake",
        embedding={"encoder": encode},
    )  # fmt: skip
    assert len(chosen.rows) == 6
    with gzip.open(tmp_path / "o" / "rehearsal.jsonl.gz", "rt", encoding="utf-8") as file:
        assert len(file.readlines()) == 7


def test_selecting_does_not_import_the_trainer(tmp_path):
    code = f"""
import sys, numpy as np
from stable_rlhf.rehearsal import select_file
select_file({write(tmp_path / "c.jsonl", rows())!r}, {str(tmp_path / "o")!r}, num_clusters=3, top_k=2,
            embedding_model="fake", embedding={{"encoder": lambda texts: np.eye(4)[[ord(t[0]) % 4 for t in texts]]}})
heavy = ("deepspeed", "transformers", "stable_rlhf.engine", "stable_rlhf.policy", "stable_rlhf.run")
print([m for m in heavy if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"


def test_skill_purity():
    labels = ["a"] * 6 + ["b"] * 3 + [None]
    assert skill_purity(np.array([0] * 6 + [1] * 3 + [2]), labels)["purity"] == 1.0
    mixed = skill_purity(np.array([0, 0, 0, 1, 1, 1, 0, 0, 1, 1]), labels)
    assert mixed["purity"] == 0.6  # three a's in each cluster
    assert skill_purity(np.zeros(10, int), labels)["random"] == pytest.approx(0.6)
    rng = np.random.default_rng(0)
    many = rng.integers(5, size=4000)
    chance = skill_purity(rng.integers(8, size=4000), many.tolist())
    assert abs(chance["purity"] - chance["random"]) < 5 * chance["random_std"]
    assert skill_purity(many, many.tolist())["random"] < 0.3
    with pytest.raises(ValueError, match="labels: 9 for 10 rows"):
        skill_purity(np.zeros(10, int), labels[:9])


def test_sweep(tmp_path):
    given = [row["prompt"] for row in rows()]
    x = embed_to_folder(given, tmp_path, "fake", encoder=encode).array
    value = np.arange(90.0)
    found = sweep_clusters(x, [1, 3, 9], value=value, budget=9)
    assert [row["num_clusters"] for row in found] == [1, 3, 9]
    assert [row["kept"] for row in found] == [9, 9, 9]
    assert found[0]["kept_value"] == 85.0  # one cluster: the best nine of all
    assert found[1]["kept_value"] == np.mean([87, 84, 81, 88, 85, 82, 89, 86, 83])
    assert found[0]["silhouette"] is None and found[1]["silhouette"] > 0.8 > found[2]["silhouette"]
    assert found[0]["inertia"] > found[1]["inertia"] > found[2]["inertia"]
    assert "kept" not in sweep_clusters(open_embeddings(tmp_path).array, [3])[0]
    limited = sweep_clusters(x, [1], value=value, budget=9, allowed=value < 50)
    assert limited[0]["kept_value"] == 45.0  # the best nine of those that a limit leaves
    apart = sweep_clusters(x, [1], value=value, budget=90, near_duplicate=0.5)[0]
    assert 3 <= apart["kept"] < 90
    none = sweep_clusters(x, [1], value=value, budget=9, allowed=value < 0)[0]
    assert (none["kept"], none["kept_value"]) == (0, None)
    with pytest.raises(ValueError, match="sweep: needs numbers of clusters"):
        sweep_clusters(x, [3, 0])
    with pytest.raises(ValueError, match="budget"):
        sweep_clusters(x, [3], value=value)
