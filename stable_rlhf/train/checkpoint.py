"""Run folders: finished stages are remembered, unfinished ones are redone, foreign folders are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_rlhf.progress import is_main_process, say
from stable_rlhf.train.engine import barrier, gather_objects

_MARKER = "run.json"
_STAGE = "stage.json"
_ATTEMPT = "attempt.json"  # which settings an unfinished stage has
SNAPSHOTS = "checkpoints"  # of a stage that trains; see snapshots.py
_FORMAT = 1


class RunError(ValueError):
    """The output folder cannot be used as it is."""


@dataclass(frozen=True)
class Stage:
    """A finished stage: its folder, what it returned, how long it took, and whether it was found finished."""

    name: str
    folder: Path
    result: dict[str, Any]
    seconds: float
    skipped: bool
    fingerprint: str


class RunDirectory:
    """``output_dir`` of a run.

    Each stage is written to ``<name>.tmp`` and renamed when it is done, with ``stage.json`` (settings, result,
    seconds) inside. A stage with the same settings and the same input stages is not redone; one with other
    settings is an error. An unfinished stage is begun again, or, where it left snapshots and its settings are the same,
    finds them in its folder.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.root = Path(output_dir)
        self.stages: list[Stage] = []
        problem = self._open() if is_main_process() else None
        problem = gather_objects(problem)[0]
        if problem:
            raise RunError(problem)

    def _open(self) -> str | None:
        marker = self.root / _MARKER
        if self.root.exists() and not self.root.is_dir():
            return f"output_dir {str(self.root)!r} is a file"
        if marker.is_file():
            try:
                found = json.loads(marker.read_text())["format"]
            except (ValueError, KeyError, TypeError):
                return (
                    f"output_dir {str(self.root)!r}: {_MARKER} is damaged; choose another output_dir or delete this one"
                )
            if found != _FORMAT:
                return f"output_dir {str(self.root)!r} was written by another version (format {found}); choose another"
            return None
        if self.root.exists() and any(self.root.iterdir()):
            return (
                f"output_dir {str(self.root)!r} is not empty and was not written by stable_rlhf; nothing is "
                "overwritten: choose another output_dir"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps({"format": _FORMAT, "made_by": "stable_rlhf"}) + "\n")
        return None

    def stage(
        self, name: str, settings: dict[str, Any], run: Callable[[Path], dict[str, Any]], inputs: Sequence[Stage] = ()
    ) -> Stage:
        """Run a stage, or find it finished. ``run`` gets the folder to write to and returns a JSON-ready result."""
        folder = self.root / name
        key = {"settings": settings, "inputs": {s.name: s.fingerprint for s in inputs}}
        fingerprint = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
        known: dict[str, Any] | None = None
        problem = None
        if is_main_process():
            known, problem = self._look(name, folder, key, fingerprint)
        known, problem = gather_objects((known, problem))[0]
        if problem:
            raise RunError(problem)
        if known is not None:
            say(f"[{name}] finished before ({known['seconds']:.0f} s), not redone")
            done = Stage(name, folder, known["result"], known["seconds"], True, fingerprint)
            self.stages.append(done)
            return done
        say(f"[{name}]")
        working = self.root / f"{name}.tmp"
        if is_main_process():
            if _may_go_on(working, fingerprint):
                say(f"  an earlier attempt at {name} did not finish: its checkpoints are there")
            else:
                if working.exists():
                    say(f"  an earlier attempt at {name} did not finish: starting it again")
                    shutil.rmtree(working)
                working.mkdir(parents=True)
                (working / _ATTEMPT).write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
        barrier()
        began = time.monotonic()
        result = run(working)
        barrier()  # another rank may still be reading what it loads back from there
        seconds = time.monotonic() - began
        if is_main_process():
            record = {"name": name, "fingerprint": fingerprint, **key, "seconds": seconds, "result": result}
            (working / _STAGE).write_text(json.dumps(record, indent=1) + "\n")
            shutil.rmtree(working / SNAPSHOTS, ignore_errors=True)
            (working / _ATTEMPT).unlink()
            working.rename(folder)
        barrier()
        say(f"[{name}] {seconds:.0f} s")
        done = Stage(name, folder, result, seconds, False, fingerprint)
        self.stages.append(done)
        return done

    def _look(
        self, name: str, folder: Path, key: dict[str, Any], fingerprint: str
    ) -> tuple[dict[str, Any] | None, str | None]:
        if not folder.exists():
            return None, None
        remedy = f"delete {str(folder)!r} to redo it, or choose another output_dir"
        try:
            known = json.loads((folder / _STAGE).read_text())
            seen, _, _ = known["fingerprint"], known["seconds"], known["result"]
        except (OSError, ValueError, KeyError, TypeError):
            return (
                None,
                f"stage {name}: {str(folder)!r} holds no readable {_STAGE}, so it is broken or foreign; {remedy}",
            )
        if seen != fingerprint:
            changed = _differences(known.get("settings", {}), key["settings"])
            if known.get("inputs") != key["inputs"]:
                changed.append("its input stages")
            return None, f"stage {name} was made with other settings ({', '.join(changed) or 'unknown'}); {remedy}"
        return known, None


def _may_go_on(working: Path, fingerprint: str) -> bool:
    """Whether an unfinished stage was begun with the same settings and left something to go on from."""
    try:
        same = json.loads((working / _ATTEMPT).read_text())["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return same and any((working / SNAPSHOTS).glob("step-*"))


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if old == json.loads(json.dumps(new)) else [f"{prefix}: {old!r} -> {new!r}"]
