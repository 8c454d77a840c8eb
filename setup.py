"""Builds the optional C++ module `stable_rlhf._C`; everything else of the package is declared in pyproject.toml.

A machine without a working C++ compiler still gets an installable package: the build says so and the operations fall
back to their PyTorch implementations.
"""

from __future__ import annotations

import sys
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError:  # building without isolation on a machine that lacks pybind11
    Pybind11Extension = None


def _report_missing_extension(reason: str) -> None:
    print(
        f"\nstable-rlhf: the C++ module stable_rlhf._C was NOT built ({reason}).\n"
        "stable-rlhf: the package installs without it and its CPU operations run on PyTorch, more slowly.\n"
        "stable-rlhf: for the fast path install a C++17 compiler (g++ or clang++) and reinstall.\n",
        file=sys.stderr,
        flush=True,
    )


class OptionalBuildExt(build_ext):
    """Builds the extension, or reports why it could not and goes on."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # no compiler at all fails here, before any extension is touched
            _report_missing_extension(str(error))

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            _report_missing_extension(str(error))


def _extensions() -> list[Extension]:
    if Pybind11Extension is None:
        _report_missing_extension("pybind11 is not installed")
        return []
    extension = Pybind11Extension(
        "stable_rlhf._C",
        sorted(glob("csrc/*.cpp")),
        depends=sorted(glob("csrc/*.h")),
        cxx_std=17,
    )
    if sys.platform == "win32":
        extension.extra_compile_args += ["/O2"]
    else:
        # No -march=native: one wheel serves every machine of its architecture. No contraction into fused
        # multiply-adds: the results then equal those of PyTorch bit for bit.
        extension.extra_compile_args += ["-O3", "-ffp-contract=off"]
        extension.extra_link_args += ["-pthread"]
    # Lets setuptools leave out a module that was not built.
    extension.optional = True
    return [extension]


setup(
    packages=[*find_packages(include=["stable_rlhf", "stable_rlhf.*"]), "stable_rlhf.kernels", "stable_rlhf.recipes"],
    package_dir={"stable_rlhf.kernels": "kernels", "stable_rlhf.recipes": "recipes"},
    ext_modules=_extensions(),
    cmdclass={"build_ext": OptionalBuildExt},
)
