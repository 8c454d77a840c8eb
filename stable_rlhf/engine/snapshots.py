"""Snapshots inside a stage: a killed stage goes on from its last good one, to the same bits as if nothing had happened.

Everything random in the trainers follows from the seed and the step, so a snapshot holds weights, optimiser and
schedule (shards.py), torch's generators of every rank, the metrics so far, and the few numbers a trainer carries from
step to step. It is written under another name, checked off file by file in a manifest, and renamed: what has its name
is whole, and the newest whole one is the one to go on from. All ranks write it, or none has: a rank that cannot (a full
disk) is an error on all of them, and the snapshots before it stay.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stable_rlhf.data.digest import file_digest
from stable_rlhf.data.jsonl import read_json, to_json
from stable_rlhf.data.records import DataError
from stable_rlhf.engine.engine import Engine
from stable_rlhf.engine.process import stop_asked
from stable_rlhf.engine.run_folder import SNAPSHOTS
from stable_rlhf.engine.signals import Stopped, defer
from stable_rlhf.engine.tracking import METRICS
from stable_rlhf.ranks import barrier, on_first_rank, rank, together, world_size
from stable_rlhf.settings.recipe import CheckpointArguments
from stable_rlhf.show.progress import is_main_process, say
from stable_rlhf.system.folders import remove_folder

_MANIFEST = "manifest.json"
_FORMAT = 2
_WENT_ON = "went-on-from.json"  # in the folder of a stage that has gone on from a snapshot that the settings name


class Kept(NamedTuple):
    """A number that follows from the ranks and the cut into micro-steps. Where a stage goes on from a snapshot it must
    be the same, or the stage would go on with something else than other roundings."""

    what: str
    number: int
    remedy: str


def rows_a_step(rows: int) -> Kept:
    """Of a stage whose rows a step follow from the number of ranks."""
    return Kept(
        "rows a step", rows, "choose per_device_train_batch_size and gradient_accumulation_steps so that their "
        "product with the number of ranks is the same",
    )  # fmt: skip


class Snapshots:
    """The snapshots of one stage, in ``folder/checkpoints/step-N``.

    Args:
        folder: The stage's working folder.
        engine: Whose weights, optimiser and schedule are kept.
        arguments: How often, how many, and where to resume from; None: the defaults.
        kept: What another number of ranks, or another cut, must come to as well.
    """

    def __init__(
        self, folder: Path, engine: Engine, arguments: CheckpointArguments | None, kept: Sequence[Kept] = ()
    ) -> None:
        self.stage = folder.name.removesuffix(".tmp")
        self.folder, self.engine, self.arguments = folder / SNAPSHOTS, engine, arguments or CheckpointArguments()
        self.kept, self.shape = kept, {"world_size": world_size(), "zero_stage": engine.zero_stage}

    def restore(self) -> tuple[int, dict[str, Any]]:
        """Load the newest good snapshot; returns its step and what :meth:`save` was given, or (0, {}) without one.

        Raises:
            ValueError: ``resume_from_checkpoint`` names a folder that is missing, damaged or another stage's; the
                snapshot was made by another number of ranks or another ZeRO stage and ``universal`` is off; or one of
                ``kept`` is another number there.
        """
        defer(True)  # from here on a signal waits for the end of a step: `save` looks
        newest = on_first_rank(self._newest, ValueError)
        if newest is None:
            return 0, {}
        path, record = newest
        known = record.get("kept", {"rows a step": record.get("rows")})  # snapshots of old have these alone
        for what, number, remedy in self.kept:
            if (before := known.get(what, number)) != number:
                raise ValueError(
                    f"checkpoint {str(path)!r} was made with {before} {what}, this run has {number}: {remedy}"
                )
        if record["shape"] != self.shape:
            if not self.arguments.universal:
                raise ValueError(
                    f"checkpoint {str(path)!r} was made with {_words(record['shape'])}, this run has "
                    f"{_words(self.shape)}; go on with the same, set checkpoint.universal to true to go on with these, "
                    "or checkpoint.resume_from_checkpoint to 'none' to begin the stage again"
                )
            say(f"  made with {_words(record['shape'])}: results go on to rounding, not to the bit")
        self.engine.load(path)
        generators = path / f"generators-{rank()}.safetensors"
        if generators.exists():  # not on ranks that were not there: they keep the one they were started with
            states = load_file(generators)
            torch.set_rng_state(states["cpu"])
            if "cuda" in states and torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"])
        metrics = self.folder.parent / METRICS
        if is_main_process():  # a snapshot of another folder, or the file was being written when the stage was killed
            metrics.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path / METRICS, metrics)
        barrier()  # nobody reads the metrics before they are there
        say(f"  going on after step {record['step']}")
        return int(record["step"]), record["state"]

    def due(self, step: int) -> bool:
        """Whether the settings ask for a snapshot after ``step``."""
        return self.arguments.save_steps > 0 and step % self.arguments.save_steps == 0

    def save(self, step: int, state: dict[str, Any], *, last: int, asked: bool = False) -> None:
        """Write a snapshot after ``step`` when one is due or ``asked`` for, or a signal asks for the end; ``last`` is
        the stage's last step, which needs none.

        ``state``: what the trainer carries besides (counts, moments, a controller's coefficient), as JSON has it.

        Raises:
            OSError: it could not be written on some rank; nothing of it is left, and the ones before it are.
            Stopped: a signal came, to this rank or to another; the snapshot is written.
        """
        if step >= last:
            return
        stop = stop_asked()
        if stop or asked or self.due(step):
            self._write(step, state)
        if stop:
            raise Stopped(stop, f"stage {self.stage} is saved after step {step}")

    def _write(self, step: int, state: dict[str, Any]) -> None:
        path = self.folder / f"step-{step:08d}"
        working = path.with_suffix(".tmp")
        what = f"checkpoint {str(path)!r} could not be written"

        def prepare() -> None:
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir(parents=True)
            shutil.copy(self.folder.parent / METRICS, working)

        def write() -> None:
            self.engine.save(working)
            generators = {"cpu": torch.get_rng_state()}
            if torch.cuda.is_available():
                generators["cuda"] = torch.cuda.get_rng_state()
            save_file(generators, working / f"generators-{rank()}.safetensors")

        def finish() -> None:
            files = {str(f.relative_to(working)): file_digest(f) for f in sorted(working.rglob("*")) if f.is_file()}
            record = {"format": _FORMAT, "stage": self.stage, "step": step, "shape": self.shape, "state": state,
                      "kept": {each.what: each.number for each in self.kept}, "files": files}  # fmt: skip
            (working / _MANIFEST).write_text(to_json(record) + "\n", encoding="utf-8")
            _remove(path)  # of an attempt that was begun again from an earlier step, as are later ones
            working.rename(path)
            whole = self._all()
            kept = [p for p in whole if p <= path][: self.arguments.save_total_limit]
            for old in set(whole) - set(kept):
                _remove(old)

        try:
            self._everywhere(prepare if is_main_process() else None, what)
            self._everywhere(write, what)
            self._everywhere(finish if is_main_process() else None, what)
        except OSError:
            if is_main_process():
                shutil.rmtree(working, ignore_errors=True)
            raise

    def _everywhere(self, work: Callable[[], None] | None, what: str) -> None:
        """Do this rank's ``work`` and wait for the others'; where a file fails on some rank, raise on every rank."""
        try:
            with together(OSError):
                try:
                    if work is not None:
                        work()
                except (OSError, SafetensorError) as error:
                    raise OSError(f"{error} (rank {rank()})") from None
        except OSError as error:
            good = [p.name for p in self._all()] or ["none"]
            raise OSError(f"{what}: {error}; {good[0]} is the last good one") from None

    def _all(self) -> list[Path]:
        """Finished snapshots, the newest first."""
        return sorted((p for p in self.folder.glob("step-*") if p.suffix != ".tmp"), reverse=True)

    def _newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The snapshot to go on from, None without one; ValueError: what is wrong with the one asked for."""
        for leftover in self.folder.glob("step-*.tmp"):
            remove_folder(leftover)
        wanted = self.arguments.resume_from_checkpoint
        if wanted == "none":
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        # That one is for one stage alone: the stages after it, which have the same settings, look for their own.
        others = [note for note in self.folder.parent.parent.glob(f"*/{_WENT_ON}") if note.parent != self.folder.parent]
        if wanted != "auto" and not any(read_json(note).get("checkpoint") == wanted for note in others):
            path = Path(wanted)
            record = _read(path)
            if isinstance(record, str):
                raise ValueError(f"checkpoint.resume_from_checkpoint: {record}")
            if record["stage"] != self.stage:
                raise ValueError(
                    f"checkpoint.resume_from_checkpoint: checkpoint {wanted!r} is of stage {record['stage']}, and the "
                    f"first that has something to train is {self.stage}"
                )
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            (self.folder.parent / _WENT_ON).write_text(to_json({"checkpoint": wanted}) + "\n", encoding="utf-8")
            return path, record
        for path in self._all():
            record = _read(path)
            if not isinstance(record, str):
                return path, record
            say(f"  WARNING: {record}; the one before it is used")
        return None


def _read(path: Path) -> dict[str, Any] | str:
    """The record of a snapshot whose every file is whole, or what is wrong with it."""
    if not path.is_dir():
        return f"there is no checkpoint {str(path)!r}"
    try:
        record = read_json(path / _MANIFEST, "files")
        files = record["files"].items()
    except (DataError, AttributeError):
        return f"checkpoint {str(path)!r} has no readable {_MANIFEST}"
    if record.get("format") != _FORMAT:
        return f"checkpoint {str(path)!r} was written by another version"
    for name, digest in files:
        if not (path / name).is_file():
            return f"checkpoint {str(path)!r} is damaged: {name} is missing"
        if file_digest(path / name) != digest:
            return f"checkpoint {str(path)!r} is damaged: {name} is not what was written"
    return record


def _remove(path: Path) -> None:
    """Delete a snapshot; what a kill leaves of it must not look like a damaged one."""
    if path.exists():
        remove_folder(path.rename(path.with_suffix(".old.tmp")))


def _words(shape: dict[str, Any]) -> str:
    ranks = shape["world_size"]
    return f"{ranks} rank{'s' if ranks != 1 else ''} and engine.zero_stage {shape['zero_stage']}"
