from __future__ import annotations

import pytest

from stable_rlhf.system import folders
from stable_rlhf.system.folders import remove_folder


def test_a_folder_goes_with_all_in_it(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").touch()
    remove_folder(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_cannot_go_is_named_with_its_place(tmp_path, monkeypatch):
    def read_only(path):
        raise OSError(30, "Read-only file system", "manifest.json")

    monkeypatch.setattr(folders.shutil, "rmtree", read_only)
    with pytest.raises(OSError, match="Read-only file system: ") as told:
        remove_folder(tmp_path / "a")
    assert told.value.filename == str(tmp_path / "a") and told.value.errno == 30
