"""Run folders: finished stages are remembered, unfinished ones are redone, foreign folders are refused."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from stable_rlhf.data.digest import json_digest
from stable_rlhf.data.jsonl import kind_of, read_json, to_json
from stable_rlhf.data.records import DataError
from stable_rlhf.engine.order import stream_seed
from stable_rlhf.engine.process import stop_asked
from stable_rlhf.engine.signals import Stopped, defer
from stable_rlhf.engine.watchdog import watch
from stable_rlhf.ranks import barrier, on_first_rank, world_size
from stable_rlhf.settings.recipe import CheckpointArguments
from stable_rlhf.show.progress import begin, say
from stable_rlhf.system.folders import remove_folder
from stable_rlhf.system.locks import LOCK, FolderInUse, FolderLock, lock_folder

_MARKER = "run.json"
_NO_CONTENT = (LOCK, "run.part")  # what a kill may leave before the marker is there
_STAGE = "stage.json"
_ATTEMPT = "attempt.json"  # which settings an unfinished stage has
_KEPT: dict[str, Any] = {"fingerprint": str, "settings": dict, "inputs": dict, "seconds": (int, float), "result": dict}
SNAPSHOTS = "checkpoints"  # of a stage that trains; see snapshots.py
_FORMAT = 1
_T = TypeVar("_T")
# Settings that say how a stage is spread over ranks and memory, not what it computes.
_LAYOUT = frozenset(
    (
        "zero_stage", "offload_optimizer", "gradient_checkpointing", "per_device_train_batch_size",
        "per_device_rehearsal_batch_size", "gradient_accumulation_steps",
    )
)  # fmt: skip


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
    settings is an error. An unfinished stage is begun again, or, where it left snapshots, finds them in its folder;
    then other settings are an error too, for snapshots are work. Under ``checkpoint.universal`` settings of the layout
    may be others.

    While this object lives, its folder is locked (by rank 0): two runs in one folder would write each other's files.
    """

    def __init__(self, output_dir: str | Path, checkpoint: CheckpointArguments | None = None) -> None:
        self.root = Path(output_dir)
        self.checkpoint = checkpoint or CheckpointArguments()
        self.stages: list[Stage] = []
        self._lock: FolderLock | None = None
        self._first_rank(self._open)
        watch(60 * self.checkpoint.hang_minutes, self.root)

    def _first_rank(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns on rank 0, on every rank; where it fails there, every rank fails alike."""

        def tried() -> _T:
            try:
                return work()
            except OSError as error:
                raise RunError(f"output_dir {str(self.root)!r}: {error}") from None

        return on_first_rank(tried, RunError)

    def _open(self) -> None:
        marker = self.root / _MARKER
        if self.root.exists() and not self.root.is_dir():
            raise RunError(f"output_dir {str(self.root)!r} is a file")
        if not marker.exists() and self.root.exists() and any(p.name not in _NO_CONTENT for p in self.root.iterdir()):
            raise RunError(
                f"output_dir {str(self.root)!r} is not empty and was not written by stable_rlhf; nothing is "
                "overwritten: choose another output_dir"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock_folder(self.root)
        except FolderInUse as error:
            raise RunError(f"output_dir {error}; let that one end, or choose another output_dir") from None
        if marker.is_file():
            try:
                version = read_json(marker, "format")["format"]
            except DataError as error:
                raise RunError(
                    f"output_dir {str(self.root)!r}: {_MARKER} is damaged ({error}); choose another "
                    "output_dir or delete this one"
                ) from None
            if version != _FORMAT:
                raise RunError(
                    f"output_dir {str(self.root)!r} was written by another version (format {version}); choose another"
                )
            return
        _note(marker, {"format": _FORMAT, "made_by": "stable_rlhf"})

    def stage(
        self, name: str, settings: dict[str, Any], run: Callable[[Path], dict[str, Any]], inputs: Sequence[Stage] = ()
    ) -> Stage:
        """Run a stage, or find it finished. ``run`` gets the folder to write to and returns a JSON-ready result."""
        begin(name)
        folder = self.root / name
        key = {"settings": settings, "inputs": {s.name: s.fingerprint for s in inputs}}
        fingerprint = json_digest(key)
        known = self._first_rank(lambda: self._look(name, folder, key, fingerprint))
        if known is not None:
            say(f"[{name}] finished before ({known['seconds']:.0f} s), not redone")
            done = Stage(name, folder, known["result"], known["seconds"], True, known["fingerprint"])
            self.stages.append(done)
            return done
        say(f"[{name}]")
        working = self.root / f"{name}.tmp"
        self._first_rank(lambda: self._begin(name, working, key, fingerprint))
        # Dropout draws the same masks whichever stages this process ran before.
        torch.manual_seed(stream_seed(settings.get("seed", 0), name))
        began = time.monotonic()
        try:
            result = run(working)
            barrier()  # another rank may still be reading what it loads back from there
            seconds = time.monotonic() - began

            def finish() -> None:
                _note(working / _STAGE, {
                    "name": name, "fingerprint": fingerprint, **key, "world_size": world_size(), "seconds": seconds,
                    "result": result,
                })  # fmt: skip
                _put_in_place(working, folder)

            self._first_rank(finish)
        finally:
            defer(False)  # a stage that trains has set it
        say(f"[{name}] {seconds:.0f} s")
        done = Stage(name, folder, result, seconds, False, fingerprint)
        self.stages.append(done)
        if stop := stop_asked():  # it came after the last step, to this rank or to another
            raise Stopped(stop, f"stage {name} is finished")
        return done

    def refuse_changed(self, name: str, settings: dict[str, Any]) -> None:
        """Raise where a finished stage was made with other values of these settings, before what goes into it is made
        anew."""

        def look() -> None:
            folder = self.root / name
            known = read_json(folder / _STAGE).get("settings", {}) if (folder / _STAGE).is_file() else settings
            if changed := _differences({key: known.get(key) for key in settings}, settings):
                raise _made_otherwise(name, ", ".join(changed), folder)

        self._first_rank(look)

    def _look(self, name: str, folder: Path, key: dict[str, Any], fingerprint: str) -> dict[str, Any] | None:
        working = folder.with_name(f"{name}.tmp")
        if not folder.exists() and _fingerprint(working / _STAGE) == fingerprint:  # killed after its last word
            _put_in_place(working, folder)
        if not folder.exists():
            return None
        try:
            known = read_json(folder / _STAGE, *_KEPT)
            if wrong := [k for k, kind in _KEPT.items() if not isinstance(known[k], kind) or known[k] is True]:
                raise DataError(f"{folder / _STAGE}: {wrong[0]!r} is {kind_of(known[wrong[0]])}")
        except DataError as error:
            raise RunError(
                f"stage {name}: {str(folder)!r} holds no readable {_STAGE}, so it is broken or foreign ({error}); "
                f"{_remedy(folder)}"
            ) from None
        seen = known["fingerprint"]
        if seen != fingerprint and not (self.checkpoint.universal and _layout_alone(known, key)):
            raise _made_otherwise(name, ", ".join(_changes(known, key)), folder)
        before = _rows_a_step(known["settings"], known.get("world_size", world_size()))
        if seen != fingerprint and before != _rows_a_step(key["settings"], world_size()):
            raise _made_otherwise(name, "other rows a step: " + ", ".join(_changes(known, key)), folder)
        return dict(known)

    def _begin(self, name: str, working: Path, key: dict[str, Any], fingerprint: str) -> None:
        """Make an unfinished stage's folder ready; snapshots of an attempt with other settings are in the way."""
        attempt = working / _ATTEMPT
        if any(p.suffix != ".tmp" for p in (working / SNAPSHOTS).glob("step-*")):
            same = _fingerprint(attempt) == fingerprint
            before = {} if _fingerprint(attempt) is None else read_json(attempt)
            if not same and self.checkpoint.resume_from_checkpoint != "none":
                alone = _layout_alone(before, key)
                if not (alone and self.checkpoint.universal):
                    raise RunError(
                        f"stage {name}: {str(working)!r} holds checkpoints of an attempt with other settings "
                        f"({', '.join(_changes(before, key))}); give the same settings to go on, "
                        + ("set checkpoint.universal to true to go on with these, " if alone else "")
                        + "set checkpoint.resume_from_checkpoint to 'none' to begin the stage again, or choose another "
                        "output_dir"
                    )
                same = True
                _note(attempt, {"fingerprint": fingerprint, **key})
            if same:
                say(f"  an earlier attempt at {name} did not finish: its checkpoints are there")
                return
        if working.exists():
            say(f"  an earlier attempt at {name} did not finish: starting it again")
            remove_folder(working)
        working.mkdir(parents=True)
        _note(attempt, {"fingerprint": fingerprint, **key})


def _note(path: Path, record: dict[str, Any]) -> None:
    """Write a record that is whole at every moment: without it, snapshots beside it could not be used."""
    part = path.with_suffix(".part")
    part.write_text(to_json(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _fingerprint(path: Path) -> str | None:
    """That of a record that `_note` wrote, None where there is none."""
    try:
        return str(read_json(path, "fingerprint")["fingerprint"])
    except DataError:
        return None


def _put_in_place(working: Path, folder: Path) -> None:
    """What is left to do once ``stage.json`` is whole; a kill in the middle of it costs nothing."""
    shutil.rmtree(working / SNAPSHOTS, ignore_errors=True)
    (working / _ATTEMPT).unlink(missing_ok=True)
    working.rename(folder)


def _rows_a_step(settings: Any, world: int) -> list[int]:
    """The rows of an optimiser step, of every section whose layout decides them."""
    if not isinstance(settings, dict):
        return []
    rows, pieces = settings.get("per_device_train_batch_size"), settings.get("gradient_accumulation_steps")
    own = [rows * pieces * world] if rows and pieces else []
    return own + [rows for key in sorted(settings) for rows in _rows_a_step(settings[key], world)]


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """In words, what makes two stages' settings and inputs different."""
    changed = _differences(old.get("settings", {}), new["settings"])
    if old.get("inputs") != new["inputs"]:
        changed.append("its input stages")
    return changed or ["unknown"]


def _remedy(folder: Path) -> str:
    return f"delete {str(folder)!r} to redo it, or choose another output_dir"


def _made_otherwise(name: str, changed: str, folder: Path) -> RunError:
    return RunError(f"stage {name} was made with other settings ({changed}); {_remedy(folder)}")


def _layout_alone(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two stages would compute the same, up to rounding."""
    if old.get("inputs") != new["inputs"] or "settings" not in old:
        return False
    changed = _differences(old["settings"], new["settings"])
    return all(text.split(":")[0].rsplit(".", 1)[-1] in _LAYOUT for text in changed)


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if old == json.loads(json.dumps(new)) else [f"{prefix}: {old!r} -> {new!r}"]
