"""A user's own functions and classes, which settings name as ``path/to/file.py:name`` or ``package.module:name``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

_files: dict[Path, ModuleType] = {}  # a file is run once a process, however many of its names are used


def load(setting: str, spec: str) -> Callable[..., Any]:
    """What ``spec`` names: a function or a class.

    Relative files, and modules beside those that are installed, are looked up in the working folder.

    Raises:
        ValueError: names the setting: there is no such file, module or name, it cannot be imported, or is not called.
    """
    place, name = split(setting, spec)
    try:
        module = _of_file(Path(place)) if place.endswith(".py") else _of_name(place)
    except FileNotFoundError:
        raise ValueError(f"{setting}: {spec!r}: there is no file {place!r}") from None
    except Exception as error:  # whatever a user's module does when it is run
        raise ValueError(f"{setting}: {spec!r} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        near = difflib.get_close_matches(name, [n for n in vars(module) if not n.startswith("_")], n=1)
        raise ValueError(f"{setting}: {place!r} has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if not callable(found):
        raise ValueError(f"{setting}: {spec!r} is {type(found).__name__}, expected a function or a class")
    result: Callable[..., Any] = found
    return result


def split(setting: str, spec: str) -> tuple[str, str]:
    """The file or module of ``spec``, and the name in it.

    Raises:
        ValueError: names the setting and the form.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(f"{setting}: expected path/to/file.py:name or package.module:name, got {spec!r}")
    return place, name


def source(spec: str) -> Path | None:
    """The file that ``spec`` is written in, None where that cannot be told without running it."""
    place = spec.rpartition(":")[0]
    if place.endswith(".py"):
        path: Path | None = Path(place)
    elif "." in place:  # its packages would be run to find it
        path = Path(*place.split(".")).with_suffix(".py")
    else:
        with _first_on_path(Path.cwd()):
            found = importlib.util.find_spec(place) if place else None
        path = Path(found.origin) if found is not None and found.origin else None
    return path if path is not None and path.is_file() else None


def _of_file(path: Path) -> ModuleType:
    path = path.resolve()
    if path not in _files:
        if not path.is_file():
            raise FileNotFoundError(path)
        name = f"_stable_rlhf_own_{len(_files)}_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # its name ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look there
        try:
            with _first_on_path(path.parent):  # as for a script: what lies beside it can be imported
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        _files[path] = module
    return _files[path]


def _of_name(name: str) -> ModuleType:
    with _first_on_path(Path.cwd()):
        return importlib.import_module(name)


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    entry = os.fspath(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
