"""What is installed, and what a build makes with and without a compiler."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Folder in the repository -> its place in the package.
FOLDERS = {"stable_rlhf": "stable_rlhf", "kernels": "stable_rlhf/kernels", "recipes": "stable_rlhf/recipes"}


def test_version_has_one_source():
    import stable_rlhf

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" in project["dynamic"] and "version" not in project
    assert re.fullmatch(r"\d+\.\d+\.\d+", stable_rlhf.__version__)
    assert importlib.metadata.version("stable-rlhf") == stable_rlhf.__version__


def test_importing_the_package_is_light():
    script = "import stable_rlhf, sys; print(*sorted(m for m in sys.modules if '.' not in m))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True, env=environment
    )
    assert not {"torch", "numpy", "transformers", "deepspeed"} & set(done.stdout.split())


def test_kernels_are_part_of_the_package():
    from stable_rlhf.kernels import sequence

    assert callable(sequence.gae)


def test_build_needs_neither_torch_nor_the_dependencies():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    assert {re.split(r"[<>=]", name)[0] for name in build["requires"]} == {"setuptools", "pybind11"}


def build_wheel(tmp_path: Path, **environment: str) -> tuple[set[str], str]:
    """Builds a wheel from a copy of the sources; returns its files and the build's output."""
    source = tmp_path / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(source),
        "--no-deps",
        "--no-build-isolation",
        "-v",
        "--wheel-dir",
    ]
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, encoding="utf-8", timeout=600, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist()), done.stdout + done.stderr


def expected_files() -> set[str]:
    files = {"stable_rlhf/py.typed"}
    for folder, place in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".j2", ".html", ".css", ".json"):
                files.add(f"{place}/{path.relative_to(ROOT / folder).as_posix()}")
    return files


@pytest.mark.slow
def test_wheel_holds_everything(tmp_path):
    pytest.importorskip("pybind11")
    files, output = build_wheel(tmp_path)
    assert expected_files() <= files
    assert any(re.fullmatch(r"stable_rlhf/_C\..*\.(so|pyd)", name) for name in files), output
    assert not any(name.startswith(("tests/", "bench/", "kernels/", "csrc/", "recipes/")) for name in files)
    assert any(name.endswith("licenses/LICENSE") for name in files)
    (wheel,) = tmp_path.glob("*.whl")
    (metadata,) = (name for name in files if name.endswith(".dist-info/METADATA"))
    lines = zipfile.ZipFile(wheel).read(metadata).decode().partition("\n\n")[0].splitlines()
    needed = [line for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert {re.split(r"[<>=;]", line.split()[1])[0] for line in needed} == {"torch", "triton", "numpy"}


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cpp")), ids=lambda path: path.name)
def test_the_cpp_module_compiles_for_aarch64(source, tmp_path):
    """Compiles: nothing has run it there. Debian's g++-aarch64-linux-gnu."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++")
    headers = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    done = subprocess.run(
        [compiler, "-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", *headers,
         "-c", source, "-o", tmp_path / "object.o"],
        capture_output=True, encoding="utf-8", timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_without_a_compiler_the_wheel_installs_and_says_so(tmp_path):
    files, output = build_wheel(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert "the C++ module stable_rlhf._C was NOT built" in output
    assert expected_files() <= files
    assert not any("_C" in name for name in files)
    target = tmp_path / "target"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, *tmp_path.glob("*.whl")],
        check=True, capture_output=True,
    )  # fmt: skip
    script = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import torch, stable_rlhf.ops as ops; "
        "print(ops.__file__); print(ops.gae(torch.ones(2), torch.zeros(2), torch.tensor([0, 2]), lam=1.0)[0].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", cwd=tmp_path, check=True
    )
    where, answer = done.stdout.split("\n")[:2]
    assert where.startswith(str(target)) and answer == "[2.0, 1.0]"
