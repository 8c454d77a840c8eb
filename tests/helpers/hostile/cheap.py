"""Kinds that are tried in this process, hundreds a minute: rows, recipes, run folders, embeddings, servers."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from helpers.files import contents
from helpers.hostile.drawn import SWAPS, changes, corruptions, one_line
from helpers.launch import ROOT
from helpers.raw_server import answering, forever, http
from stable_rlhf.cli.arguments import parse
from stable_rlhf.data.readers import read_comparisons, read_demonstrations, read_prompts, read_responses, read_scored
from stable_rlhf.data.records import DataError
from stable_rlhf.engine.run_folder import RunDirectory, RunError
from stable_rlhf.evaluate.chat import ChatJudge
from stable_rlhf.rehearsal import embed_to_folder, open_embeddings
from stable_rlhf.rollout.local import GenerationSettings
from stable_rlhf.rollout.vllm import VLLMRollouts
from stable_rlhf.run.bounds import check
from stable_rlhf.system.http import ServerError

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

# -- rows --------------------------------------------------------------------------------------------------------------

_CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
_ROWS: dict[Callable[..., Any], list[dict[str, Any]]] = {
    read_comparisons: [
        {"prompt": "p", "chosen": "a", "rejected": "b", "task": "t", "margin": 1.0},
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]},
        {"chosen": [*_CHAT], "rejected": [_CHAT[0], {"role": "assistant", "content": "b"}]},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "strength": 0.5, "chosen_logprobs": [-1.0]},
    ],
    read_prompts: [{"prompt": "p", "task": "t"}, {"prompt": _CHAT[:1]}, {"question": "q"}],
    read_demonstrations: [{"prompt": "p", "response": "r", "finished": True}, {"prompt": _CHAT[:1], "response": "r"}],
    read_scored: [{"prompt": "p", "response": "r", "score": 1.5, "entropy": 0.1}],
    read_responses: [{"prompt": "p", "responses": ["a", "b"], "finished": [True, False]}],
}  # fmt: skip


@st.composite
def rows(draw: st.DrawFn) -> tuple[Any, bytes, str]:
    reader = draw(st.sampled_from(sorted(_ROWS, key=lambda r: r.__name__)))
    base, lines = _ROWS[reader], []
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.sampled_from(base))
        kind = draw(st.sampled_from(["good", "changed", "changed", "bytes", "line"]))
        line = json.dumps(draw(changes())(row) if kind == "changed" else row).encode("utf-8", "surrogatepass")
        if kind == "bytes":
            line = draw(corruptions())(line)
        lines.append(draw(st.sampled_from(SWAPS)) if kind == "line" else line)
    content = b"\n".join(lines) + draw(st.sampled_from([b"", b"\n", b"\r\n", b"\n\n"]))
    name = draw(st.sampled_from(["rows.jsonl", "rows.jsonl", "rows.jsonl.gz"]))
    if name.endswith("gz"):
        content = gzip.compress(content, mtime=0)
        content = draw(corruptions())(content) if draw(st.booleans()) else content
    return reader, content, name


def check_rows(folder: Path) -> Callable[[tuple[Any, bytes, str]], None]:
    def tried(case: tuple[Any, bytes, str]) -> None:
        reader, content, name = case
        path = folder / name
        path.write_bytes(content)
        for on_bad_row in ("error", "skip"):
            try:
                found = reader([path], on_bad_row=on_bad_row)
            except DataError as error:
                one_line(str(error), str(path))
            else:
                for row in found.rows:
                    json.dumps(row.meta, allow_nan=False, ensure_ascii=False).encode()
        assert path.read_bytes() == content

    return tried


# -- recipes -----------------------------------------------------------------------------------------------------------

_SCALARS = ["", "~", "-", "null", "[]", "{}", "[1, a]", "{a: 1}", ".nan", "-.inf", "1e400", "-1", "0", "9" * 20,
            "yes", "'\\0'", '"\\ud800"', "&a [*a]", "*a", "!!python/object:os.system x", "2026-01-01", "0x10", "|", "%",
            "@", "a: b: c", "- a", "\t", "'", "é", "\u2028", "\x07"]  # fmt: skip


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    text = draw(st.sampled_from(RECIPES)).read_bytes()
    for _ in range(draw(st.integers(1, 3))):
        lines = text.decode("utf-8", "surrogateescape").split("\n")
        at = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["value", "value", "value", "drop", "double", "indent", "bytes"]))
        if kind == "bytes":
            text = draw(corruptions())(text)
            continue
        if kind == "value" and ":" in lines[at]:
            lines[at] = lines[at].split(":")[0] + ": " + draw(st.sampled_from(_SCALARS))
        elif kind == "drop":
            del lines[at]
        elif kind == "double":
            lines.insert(at, lines[at])
        else:
            lines[at] = draw(st.sampled_from([" ", "    ", "\t", "- "])) + lines[at]
        text = "\n".join(lines).encode(
            "utf-8", "surrogatepass" if any("\ud800" in x for x in lines) else "surrogateescape"
        )
    return text


def check_recipes(folder: Path) -> Callable[[bytes], None]:
    def tried(content: bytes) -> None:
        path = folder / "recipe.yaml"
        path.write_bytes(content)
        said, began = io.StringIO(), time.monotonic()
        try:
            with contextlib.redirect_stderr(said):
                recipe, _ = parse("run", [str(path)])
            check(recipe)
        except SystemExit as end:
            assert end.code == 2, end
            lines = said.getvalue().splitlines()
            assert len(lines) <= 2 and lines[0].startswith("stable-rlhf: error: "), lines
            one_line(lines[0], str(path), "setting", "--")
        except ValueError as error:  # which the command line shows as one line
            one_line(str(error).replace("\n", " "))
        assert time.monotonic() - began < 60 and path.read_bytes() == content

    return tried


# -- run folders -------------------------------------------------------------------------------------------------------


@st.composite
def run_folders(draw: st.DrawFn) -> tuple[str, Callable[[bytes], bytes] | None]:
    name = draw(st.sampled_from(["run.json", "done/stage.json", "done/stage.json", "open.tmp/attempt.json",
                                 "open.tmp/attempt.json"]))  # fmt: skip
    return name, draw(st.one_of(corruptions(), st.none()))  # None: the file is gone


def check_run_folders(folder: Path) -> Callable[[tuple[str, Callable[[bytes], bytes] | None]], None]:
    settings = {"seed": 0, "ppo": {"kl_coef": 0.05, "per_device_train_batch_size": 2}}
    base, tries = folder / "base", 0

    def write(path: Path) -> dict[str, Any]:
        (path / "weights").write_bytes(b"w")
        return {"loss": 0.5, "curve": [1, 2]}

    def die(path: Path) -> dict[str, Any]:
        (path / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
        (path / "checkpoints" / "step-00000001" / "manifest.json").write_bytes(b"{}")
        raise KeyboardInterrupt

    def both(root: Path) -> list[Any]:
        found: list[Any] = []
        for name, run in (("done", write), ("open", die)):
            try:
                found.append(RunDirectory(root).stage(name, settings, run).result)
            except KeyboardInterrupt:
                found.append("goes on")
            except RunError as error:
                one_line(str(error), str(root))
                found.append("refused")
        return found

    with contextlib.redirect_stderr(io.StringIO()):
        both(base)

    def tried(case: tuple[str, Callable[[bytes], bytes] | None]) -> None:
        nonlocal tries
        tries += 1
        name, corrupt = case
        root = folder / f"run-{tries}"
        shutil.copytree(base, root)
        before = contents(root)
        if corrupt is None:
            (root / name).unlink()
        else:
            (root / name).write_bytes(corrupt(before[name]))
        with contextlib.redirect_stderr(io.StringIO()):
            found = both(root)
        after = contents(root)
        assert after["done/weights"] == b"w"
        kept = [path for path in before if path.startswith("open.tmp/checkpoints")]
        assert found[1] != "refused" or all(after.get(path) == before[path] for path in kept)
        (root / name).write_bytes(before[name])
        if "refused" in found and found[1] != "goes on":
            with contextlib.redirect_stderr(io.StringIO()):
                assert both(root) == [{"loss": 0.5, "curve": [1, 2]}, "goes on"]
        shutil.rmtree(root)

    return tried


# -- embeddings --------------------------------------------------------------------------------------------------------


def _encode(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), *(hash_of(text, k) for k in range(3))] for text in texts], np.float32)


def hash_of(text: str, k: int) -> float:
    return float(sum((i + k) * ord(c) for i, c in enumerate(text)) % 997)


@st.composite
def embeddings(draw: st.DrawFn) -> tuple[bool, float, Callable[[bytes], bytes] | None]:
    return draw(st.booleans()), draw(st.floats(0, 0.999)), draw(st.one_of(corruptions(), st.none()))


def check_embeddings(folder: Path) -> Callable[[tuple[bool, float, Callable[[bytes], bytes] | None]], None]:
    texts = [f"text {'x' * (i % 7)} {i}" for i in range(24)]
    whole, half, tries = folder / "whole", folder / "half", 0
    want = embed_to_folder(texts, whole, "fake", encoder=_encode, shard_rows=8).array.copy()
    left = 2

    def dying(part: list[str]) -> np.ndarray:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return _encode(part)

    with contextlib.suppress(KeyboardInterrupt):
        embed_to_folder(texts, half, "fake", encoder=dying, shard_rows=8)

    def tried(case: tuple[bool, float, Callable[[bytes], bytes] | None]) -> None:
        nonlocal tries
        tries += 1
        finished, place, corrupt = case
        root = folder / f"e-{tries}"
        shutil.copytree(whole if finished else half, root)
        before = contents(root)
        name = sorted(before)[int(place * len(before))]
        if corrupt is None:
            (root / name).unlink()
        else:
            (root / name).write_bytes(corrupt(before[name]))
        try:
            found = open_embeddings(root, verify=True)
            assert np.array_equal(found.array, want) or not finished
        except (ValueError, OSError) as error:
            one_line(str(error), str(root))
        try:
            again = embed_to_folder(texts, root, "fake", encoder=_encode, shard_rows=8).array
        except (ValueError, OSError) as error:
            one_line(str(error), str(root))
        else:
            assert np.array_equal(again, want) or (finished and name == "embeddings.npy")  # not read again by itself
        shutil.rmtree(root)

    return tried


# -- servers -----------------------------------------------------------------------------------------------------------

_MODELS = {"data": [{"id": "policy"}]}
_COMPLETION = {"choices": [{"token_ids": [5, 6], "logprobs": {"token_logprobs": [-0.5, -1]}, "finish_reason": "stop"}],
               "model": "policy"}  # fmt: skip
_REPLY = {"choices": [{"message": {"role": "assistant", "content": "so [[A]]"}}], "model": "m"}
_HEADERS = ["Content_Encoding", "Transfer_Encoding", "Retry_After", "Location", "Content_Length", "Connection"]
_HEADED = ["gzip", "chunked", "3600", "-1", "x", "", "br", "http://127.0.0.1:1", "\x1b[31m", "99999999999"]
_STATUS = [
    "200 OK",
    "200 OK",
    "200 OK",
    "204 No",
    "301 Moved",
    "400 Bad",
    "401 No",
    "429 Slow",
    "500 Oh",
    "503 Busy",
    "999 X",
]


@st.composite
def servers(draw: st.DrawFn) -> tuple[str, Any, str]:
    whose = draw(st.sampled_from(["models", "completion", "judge"]))
    good = {"models": _MODELS, "completion": _COMPLETION, "judge": _REPLY}[whose]
    kind = draw(st.sampled_from(["value", "value", "value", "header", "bytes", "noise", "slow"]))
    content: Any = draw(changes())(draw(changes())(good)) if draw(st.booleans()) else good
    body = json.dumps(content).encode("utf-8", "surrogatepass")
    if kind == "value":
        return whose, http(body), kind
    if kind == "header":
        extra = draw(st.dictionaries(st.sampled_from(_HEADERS), st.sampled_from(_HEADED), max_size=3))
        return whose, http(body, draw(st.sampled_from(_STATUS)), **extra), kind
    if kind == "slow":
        whole = http(body)
        return (
            whose,
            forever(whole[: draw(st.integers(0, len(whole) - 1))], b"" if draw(st.booleans()) else b" ", 0.01),
            kind,
        )
    return whose, draw(st.binary(max_size=200)) if kind == "noise" else draw(corruptions())(http(body)), kind


def check_servers(tokenizer: Any) -> Callable[[tuple[str, Any, str]], None]:
    def tried(case: tuple[str, Any, str]) -> None:
        whose, answer, _ = case
        before = [http(_MODELS)] if whose == "completion" else []
        began = time.monotonic()
        with answering(*before, answer, *([http(_COMPLETION)] if whose == "models" else [])) as server:
            try:
                if whose == "judge":
                    judge = ChatJudge(server.url, "m", api_key="geheimnis", retries=0, timeout=0.3)
                    assert set(judge.verdicts(["p"], ["a"], ["b"]).values) <= {-1, 0, 1}
                else:
                    engine = VLLMRollouts(server.url, tokenizer, retries=0, timeout=0.3)
                    (rollout,) = engine.sample([[1, 5]], GenerationSettings(4), seeds=[1])
                    assert 1 <= len(rollout.encoded.response) <= 4 and rollout.logprobs is not None
                    assert all(type(t) is int and 0 <= t < len(tokenizer) for t in rollout.encoded.response)
                    assert all(math.isfinite(p) and p < 0.01 for p in rollout.logprobs)
            except ServerError as error:
                one_line(str(error), server.url)
                assert "geheim" not in str(error)
        assert time.monotonic() - began < 20

    return tried
