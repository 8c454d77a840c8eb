"""Folders that go."""

from __future__ import annotations

import shutil
from pathlib import Path


def remove_folder(path: Path) -> None:
    """Delete a folder with all that it holds.

    Raises:
        OSError: it cannot be; of its own accord ``shutil`` names a file inside, and not where that lies.
    """
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
