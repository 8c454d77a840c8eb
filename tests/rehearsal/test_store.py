from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from helpers.files import contents
from helpers.launch import command, free_port, worker_environment
from helpers.workers.embedding_worker import WIDTH, encode, texts
from stable_rlhf.rehearsal import embed_to_folder, open_embeddings


def start_worker(folder: Path, count: int, seconds: float, log: Path, **extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        command("embedding_worker", folder, count, seconds, log),
        env=worker_environment(**extra),
        stderr=subprocess.PIPE,
    )


def test_rows_are_in_the_order_of_the_texts_and_the_manifest_says_what_they_are(tmp_path):
    given = texts(50)
    calls: list[list[str]] = []

    def watched(part: list[str]) -> np.ndarray:
        calls.append(part)
        return encode(part)

    made = embed_to_folder(
        given, tmp_path / "e", "fake", encoder=watched, shard_rows=16, row_ids=[f"id{i}" for i in range(50)]
    )
    np.testing.assert_array_equal(made.array, encode(given))
    assert isinstance(made.array, np.memmap) and made.array.dtype == np.float32
    lengths = [len(text) for part in calls for text in part]
    assert lengths == sorted(lengths, reverse=True) and [len(part) for part in calls] == [16, 16, 16, 2]
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest == made.manifest
    assert (manifest["model"], manifest["normalized"], manifest["rows"], manifest["dimensions"]) == (
        "fake",
        True,
        50,
        WIDTH,
    )
    assert manifest["row_ids"][49] == "id49" and manifest["dtype"] == "float32"
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [".lock", "embeddings.npy", "manifest.json"]
    np.testing.assert_array_equal(open_embeddings(tmp_path / "e", verify=True).array, encode(given))


def test_a_finished_folder_is_opened_without_the_encoder(tmp_path):
    embed_to_folder(texts(9), tmp_path, "fake", encoder=encode)

    def refuse(part: list[str]) -> np.ndarray:
        raise AssertionError("nothing is left to embed")

    np.testing.assert_array_equal(embed_to_folder(texts(9), tmp_path, "fake", encoder=refuse).array, encode(texts(9)))


def test_half_precision_on_disk(tmp_path):
    made = embed_to_folder(texts(9), tmp_path, "fake", encoder=encode, dtype="float16")
    np.testing.assert_array_equal(made.array, encode(texts(9)).astype(np.float16))


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"texts": texts(21)}, "rows 20 -> 21"),
        ({"texts": [*texts(19), "other"]}, "other texts"),
        ({"texts": texts(20)[::-1]}, "other texts"),
        ({"model": "another"}, "model 'fake' -> 'another'"),
        ({"normalize": False}, "normalized True -> False"),
        ({"row_ids": [str(i) for i in range(20)]}, "row ids"),
    ],
)
def test_another_input_in_the_same_folder_is_refused(tmp_path, change, what, finished):
    call = {"texts": texts(20), "folder": tmp_path, "model": "fake", "encoder": encode, "shard_rows": 8}

    def fails_late(part: list[str]) -> np.ndarray:
        if part[0] == texts(20)[-1] or len(part) < 8:
            raise KeyboardInterrupt
        return encode(part)

    if finished:
        embed_to_folder(**call)
    else:
        with pytest.raises(KeyboardInterrupt):
            embed_to_folder(**{**call, "encoder": fails_late})
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"holds embeddings of another input .*{what}"):
        embed_to_folder(**{**call, **change})
    assert contents(tmp_path) == before


def test_a_damaged_shard_is_made_again_and_only_that(tmp_path, capsys):
    asked: list[int] = []

    def stops(part: list[str]) -> np.ndarray:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(len(part))
        return encode(part)

    with pytest.raises(KeyboardInterrupt):
        embed_to_folder(texts(40), tmp_path, "fake", encoder=stops, shard_rows=8)
    with pytest.raises(ValueError, match="holds an unfinished job"):
        open_embeddings(tmp_path)
    shard = tmp_path / "shards" / "000001.npy"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    again: list[int] = []

    def counted(part: list[str]) -> np.ndarray:
        again.append(len(part))
        return encode(part)

    made = embed_to_folder(texts(40), tmp_path, "fake", encoder=counted, shard_rows=5)  # the folder keeps its own 8
    assert again == [8, 8, 8]  # the damaged one and the two that were never made
    assert "000001.npy does not fit its checksum" in capsys.readouterr().err
    np.testing.assert_array_equal(made.array, encode(texts(40)))


@pytest.mark.parametrize("value", [None, 0, -8, "8", 8.5, True, [8]])
def test_a_job_whose_size_of_shards_is_damaged_is_told(tmp_path, value):
    def stops(part: list[str]) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_to_folder(texts(20), tmp_path, "fake", encoder=stops, shard_rows=8)
    job = json.loads((tmp_path / "job.json").read_text(encoding="utf-8"))
    (tmp_path / "job.json").write_text(json.dumps({**job, "shard_rows": value}), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/job\.json: damaged; delete the folder"):
        embed_to_folder(texts(20), tmp_path, "fake", encoder=encode, shard_rows=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, "empty list"),
        ({"texts": ["a", 3]}, r"texts\[1\] is int"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16"),
        ({"shard_rows": 0}, "shard_rows must be at least 1"),
        ({"row_ids": ["a"]}, "row_ids: 1 names for 3 texts"),
        ({"encoder": lambda part: np.zeros((1, 2))}, r"encoder: returned shape \[1, 2\] for 3 texts"),
        ({"encoder": lambda part: np.full((3, 2), 1e6), "dtype": "float16"}, "text 2 is not finite in float16"),
        ({"encoder": lambda part: np.array([[0.0], [np.nan], [0.0]])}, "text 1 is not finite"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    call = {"texts": ["a", "bb", "ccc"], "folder": tmp_path / "new", "model": "fake", "encoder": encode, **arguments}
    with pytest.raises(ValueError, match=message):
        embed_to_folder(**call)


def test_foreign_and_broken_folders(tmp_path):
    (tmp_path / "thesis.txt").write_text("keep me", encoding="utf-8")
    with pytest.raises(ValueError, match=r"is not empty \(thesis.txt\) and holds no embeddings"):
        embed_to_folder(texts(3), tmp_path, "fake", encoder=encode)
    with pytest.raises(ValueError, match="holds no embeddings"):
        open_embeddings(tmp_path)
    made = embed_to_folder(texts(3), tmp_path / "e", "fake", encoder=encode)
    data = made.folder / "embeddings.npy"
    original = data.read_bytes()
    data.write_bytes(original[:-4] + b"\0\0\0\1")
    open_embeddings(made.folder)
    with pytest.raises(ValueError, match="checksum"):
        open_embeddings(made.folder, verify=True)
    np.save(data, np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match=r"float32 \[2, 2\] instead of float32 \[3, 12\]"):
        open_embeddings(made.folder)
    (made.folder / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
        open_embeddings(made.folder)


def test_one_process_at_a_time(tmp_path):
    worker = start_worker(tmp_path / "e", 64, 0.5, tmp_path / "log")
    try:
        until = time.monotonic() + 900
        while not (tmp_path / "log").exists() and time.monotonic() < until:
            time.sleep(0.02)
        with pytest.raises(ValueError, match="is in use by process"):
            embed_to_folder(texts(64), tmp_path / "e", "fake", encoder=encode, shard_rows=8)
    finally:
        worker.kill()
        worker.wait()


def kill_and_finish(folder: Path, count: int, begun: int, delay: float) -> int:
    """Kill a worker `delay` seconds after it began its shard number `begun`; then let a second one finish.

    How many shards were done before the kill."""
    folder.mkdir()
    log = folder / "log"
    worker = start_worker(folder / "e", count, 0.02, log)

    def entries() -> list[str]:
        return log.read_text(encoding="utf-8").split() if log.exists() else []

    until = time.monotonic() + 900
    while len(entries()) < begun and worker.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(delay)
    worker.kill()
    worker.wait()
    first = entries()
    assert len(first) >= begun
    # Once the manifest is there, the shards are being cleared away.
    finished = (folder / "e" / "manifest.json").exists()
    done = len(first) if finished else len(list((folder / "e" / "shards").glob("*.json")))
    made = embed_to_folder(texts(count), folder / "e", "fake", shard_rows=8, encoder=lambda p: _logged(p, log))
    np.testing.assert_array_equal(made.array, encode(texts(count)))
    open_embeddings(folder / "e", verify=True)
    # Nothing finished is made twice: at most the one shard that the kill interrupted.
    every = entries()
    assert len(first) - done in (0, 1) and len(every) - len(first) == count // 8 - done
    assert len(set(every)) == count // 8
    assert sorted(p.name for p in (folder / "e").iterdir()) == [".lock", "embeddings.npy", "manifest.json"]
    return done


def _logged(part: list[str], log: Path) -> np.ndarray:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{part[0].split()[1]}\n")
    return encode(part)


def test_killed_at_random_moments_the_result_is_the_same(tmp_path):
    rng = random.Random(0)
    done = [kill_and_finish(tmp_path / str(i), 80, i, rng.uniform(0, 0.03)) for i in (1, 4, 8, 10)]
    assert any(0 < d < 10 for d in done), done  # at least one kill hit the middle


@pytest.mark.slow
def test_killed_at_twenty_random_moments_the_result_is_the_same(tmp_path):
    rng = random.Random(1)
    done = [kill_and_finish(tmp_path / str(i), 160, i, rng.uniform(0, 0.03)) for i in range(1, 21)]
    assert sum(0 < d < 20 for d in done) >= 10, done


def test_two_ranks_share_the_shards(tmp_path):
    launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [tmp_path / "log0", tmp_path / "log1"]
    workers = [
        start_worker(tmp_path / "e", 80, 0.0, logs[rank], RANK=str(rank), LOCAL_RANK=str(rank), **launcher)
        for rank in (0, 1)
    ]
    for worker in workers:
        _, err = worker.communicate(timeout=900)
        assert worker.returncode == 0, err.decode()[-3000:]
    shares = [set(log.read_text(encoding="utf-8").split()) for log in logs]
    assert [len(share) for share in shares] == [5, 5] and not shares[0] & shares[1]
    np.testing.assert_array_equal(open_embeddings(tmp_path / "e", verify=True).array, encode(texts(80)))
