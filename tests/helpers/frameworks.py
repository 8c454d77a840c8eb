"""Virtual environments with the frameworks that the integrations are for, beside the libraries of this one."""

from __future__ import annotations

import fcntl
import importlib.metadata
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from helpers.launch import ROOT, command, worker_environment

FOLDER = ROOT / "build" / "frameworks"
_KEPT = ("torch", "transformers", "accelerate", "numpy")  # what this environment pins: no framework may move it


def framework_python(name: str, *requirements: str) -> Path:
    """The interpreter of ``build/frameworks/<name>``: an environment with ``requirements`` in which this one's
    libraries are found too. It is made once, by pip; the test is skipped where that does not work."""
    folder = FOLDER / name
    python, done = folder / "bin" / "python", folder / "installed.txt"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{name}.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        if done.is_file() and done.read_text(encoding="utf-8").split() == list(requirements):
            return python
        venv.create(folder, clear=True, with_pip=True)
        (packages,) = (folder / "lib").glob("python*/site-packages")
        ours = [path for path in sys.path if path.endswith("site-packages")]
        lines = [f"import site; site.addsitedir({path!r})" for path in ours]  # with its .pth files: editable installs
        (packages / "beside.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
        pins = folder / "pins.txt"
        pins.write_text("".join(f"{kept}=={importlib.metadata.version(kept)}\n" for kept in _KEPT), encoding="utf-8")
        install = [python, "-m", "pip", "install", "--quiet", "--constraint", pins, *requirements]
        result = subprocess.run([*map(str, install)], capture_output=True, encoding="utf-8", timeout=900)
        if result.returncode:
            pytest.skip(f"{', '.join(requirements)} cannot be installed: {result.stderr.strip()[-300:]}")
        done.write_text("\n".join(requirements) + "\n", encoding="utf-8")
    return python


def run_in(python: Path, worker: str, *arguments: object, **extra: str) -> str:
    """What ``workers/<worker>.py`` prints in that environment, once it has ended well."""
    done = subprocess.run(
        [str(python), *command(worker, *arguments)[1:]], env=worker_environment(**extra), capture_output=True,
        encoding="utf-8", timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def run_code(python: Path, code: str, folder: Path, **extra: str) -> str:
    """What a script of that code prints, started in ``folder``."""
    script = folder / "pasted.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [str(python), str(script)], env=worker_environment(**extra), capture_output=True, encoding="utf-8",
        timeout=1200, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout
