"""Virtual environments with the frameworks that the integrations are for, beside the libraries of this one."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from helpers.launch import ROOT, command, worker_environment

FOLDER = ROOT / "build" / "frameworks"
_KEPT = ("torch", "transformers", "accelerate", "numpy")  # what this environment pins: no framework may move it


def framework_python(name: str, *requirements: str, alone: bool = False, **settings: str) -> Path:
    """The interpreter of ``build/frameworks/<name>``: an environment with ``requirements`` in which this one's
    libraries are found too. It is made once, by pip; the test is skipped where that does not work.

    Args:
        requirements: brought in with what they ask for, but for the libraries that this environment pins.
        alone: these and nothing else, each as it is named: for a framework with pins of its own, which then go before
            this environment's libraries.
        settings: environment variables of the installation.
    """
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
        how = ["--no-deps", "--no-build-isolation"] if alone else ["--constraint", str(pins)]
        result = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *how, *requirements], capture_output=True,
            encoding="utf-8", timeout=900, env=os.environ | settings,
        )  # fmt: skip
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


def verl_python() -> Path:
    """verl 0.9.1, whose transformers is older than this environment's, and what its import asks for."""
    return framework_python(
        "verl", "verl==0.9.1", "transformers==5.9.0", "huggingface-hub==1.33.0", "tokenizers==0.22.2", "httpx==0.28.1",
        "httpcore==1.0.9", "h11", "anyio", "idna", "certifi", "ray==2.55.0", "jsonschema==4.26.0",
        "jsonschema-specifications", "referencing", "rpds-py", "attrs", "msgpack", "protobuf", "filelock", "click",
        "tensordict==0.10.0", "pyvers==0.2.3", "orjson==3.13.0", "cloudpickle", "omegaconf==2.4.0",
        "antlr4-python3-runtime==4.9.3", "hydra-core==1.3.8", "codetiming==1.4.0", "torchdata==0.11.0",
        "datasets==5.2.0", "pyarrow==26.0.1", "dill==0.4.1", "multiprocess==0.70.19", "xxhash", "pandas==3.1.1",
        "python-dateutil", "fsspec", alone=True,
    )  # fmt: skip


def openrlhf_python() -> Path:
    """OpenRLHF 0.11.2 and what its models and trainers ask for; of flash-attn the Python alone, which they import."""
    return framework_python(
        "openrlhf", "openrlhf==0.11.2", "transformers==5.15.0", "huggingface-hub==1.33.0", "tokenizers==0.22.2",
        "httpx==0.28.1", "httpcore==1.0.9", "h11", "anyio", "idna", "certifi", "pylatexenc==2.11", "einops==0.8.2",
        "peft", "flash-attn==2.8.3", alone=True, FLASH_ATTENTION_FORCE_BUILD="TRUE",
        FLASH_ATTENTION_SKIP_CUDA_BUILD="TRUE",
    )  # fmt: skip
