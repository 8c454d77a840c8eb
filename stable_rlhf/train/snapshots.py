"""Snapshots inside a stage: a killed stage goes on from its last good one, to the same bits as if nothing had happened.

Everything random in the trainers follows from the seed and the step, so a snapshot holds weights, optimiser and
schedule (DeepSpeed's own files), torch's generators of every rank, and the few numbers a trainer carries from step to
step. It is written under another name, checked off file by file in a manifest, and renamed: what has its name is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stable_rlhf.progress import is_main_process, say
from stable_rlhf.train.checkpoint import SNAPSHOTS
from stable_rlhf.train.config import CheckpointArguments
from stable_rlhf.train.engine import Engine, barrier, gather_objects, rank, world_size

_MANIFEST = "manifest.json"
_CHUNK = 1 << 22


class Snapshots:
    """The snapshots of one stage, in ``folder/checkpoints/step-N``.

    Args:
        folder: The stage's working folder.
        engine: Whose weights, optimiser and schedule are kept.
        arguments: How often, how many, and where to resume from; None: the defaults.
    """

    def __init__(self, folder: Path, engine: Engine, arguments: CheckpointArguments | None) -> None:
        self.folder, self.engine, self.arguments = folder / SNAPSHOTS, engine, arguments or CheckpointArguments()
        self.shape = {"world_size": world_size(), "zero_stage": engine.zero_stage}

    def restore(self) -> tuple[int, dict[str, Any]]:
        """Load the newest good snapshot; returns its step and what :meth:`save` was given, or (0, {}) without one.

        Raises:
            ValueError: ``resume_from_checkpoint`` names a folder that is missing or damaged, or the snapshot was made
                by another number of ranks or another ZeRO stage.
        """
        found = gather_objects(self._newest() if is_main_process() else None)[0]
        if isinstance(found, str):
            raise ValueError(found)
        if found is None:
            return 0, {}
        path, record = found
        if record["shape"] != self.shape:
            raise ValueError(
                f"checkpoint {str(path)!r} was made with {_words(record['shape'])}, this run has {_words(self.shape)}; "
                "go on with the same, or set checkpoint.resume_from_checkpoint to 'none' to begin the stage again"
            )
        self.engine.load(path)
        generators = load_file(path / f"generators-{rank()}.safetensors")
        torch.set_rng_state(generators["cpu"])
        if "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"])
        say(f"  going on after step {record['step']}")
        return int(record["step"]), record["state"]

    def save(self, step: int, state: dict[str, Any], *, last: int) -> None:
        """Write a snapshot after ``step`` when one is due; ``last`` is the stage's last step, which needs none."""
        every = self.arguments.save_steps
        if every == 0 or step % every or step >= last:
            return
        path = self.folder / f"step-{step:08d}"
        working = path.with_suffix(".tmp")
        if is_main_process():
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir(parents=True)
        barrier()
        self.engine.save(working)
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators["cuda"] = torch.cuda.get_rng_state()
        save_file(generators, working / f"generators-{rank()}.safetensors")
        barrier()
        if is_main_process():
            files = {str(f.relative_to(working)): _digest(f) for f in sorted(working.rglob("*")) if f.is_file()}
            record = {"step": step, "shape": self.shape, "state": state, "files": files}
            (working / _MANIFEST).write_text(json.dumps(record) + "\n")
            shutil.rmtree(path, ignore_errors=True)
            working.rename(path)
            for old in self._all()[self.arguments.save_total_limit :]:
                shutil.rmtree(old)
        barrier()

    def _all(self) -> list[Path]:
        """Finished snapshots, the newest first."""
        return sorted((p for p in self.folder.glob("step-*") if p.suffix != ".tmp"), reverse=True)

    def _newest(self) -> tuple[Path, dict[str, Any]] | str | None:
        """The snapshot to go on from, None without one, or what is wrong with the one asked for."""
        for leftover in self.folder.glob("step-*.tmp"):
            shutil.rmtree(leftover)
        wanted = self.arguments.resume_from_checkpoint
        if wanted == "none":
            return None
        if wanted != "auto":
            path = Path(wanted)
            record = _read(path)
            if isinstance(record, str):
                return f"checkpoint.resume_from_checkpoint: {record}"
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
        record: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
        files = record["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"checkpoint {str(path)!r} has no readable {_MANIFEST}"
    for name, digest in files:
        if not (path / name).is_file():
            return f"checkpoint {str(path)!r} is damaged: {name} is missing"
        if _digest(path / name) != digest:
            return f"checkpoint {str(path)!r} is damaged: {name} is not what was written"
    return record


def _digest(path: Path) -> str:
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            found.update(block)
    return found.hexdigest()


def _words(shape: dict[str, Any]) -> str:
    ranks = shape["world_size"]
    return f"{ranks} rank{'s' if ranks != 1 else ''} and engine.zero_stage {shape['zero_stage']}"
