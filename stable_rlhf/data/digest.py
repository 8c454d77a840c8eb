"""Digests of files and of settings: what tells a changed input, or a damaged file, from the one of before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def file_digest(path: Path, method: str | Callable[[], Any] = lambda: hashlib.blake2b(digest_size=16)) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, method).hexdigest()


def json_digest(value: Any, *, sort_keys: bool = True) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=sort_keys).encode(), digest_size=12).hexdigest()
