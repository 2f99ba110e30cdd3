"""What the engine keeps on a machine is its user's alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from engine.paths import private_folder, write_private_file


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def generous_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_private_folder_and_the_parents_made_with_it_are_closed_to_others(tmp_path):
    folder = tmp_path / "share" / "pensieve" / "kernels"
    assert private_folder(folder) == folder
    assert [mode_of(path) for path in (folder, folder.parent, folder.parent.parent)] == [0o700] * 3


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o750, 0o720])
def test_a_folder_that_others_may_enter_is_closed_and_its_parent_left_alone(tmp_path, mode):
    folder = tmp_path / "home" / "pensieve"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    folder.parent.chmod(0o755)
    (folder / "kept").touch()
    private_folder(folder)
    assert mode_of(folder) == 0o700
    assert mode_of(folder.parent) == 0o755
    assert (folder / "kept").exists()


@pytest.mark.parametrize(("mode", "is_safe"), [(0o755, True), (0o775, False), (0o757, False)])
def test_a_folder_of_another_user_is_used_unless_others_may_write_to_it(tmp_path, monkeypatch, mode, is_safe):
    def refuses(*_: object) -> None:
        raise PermissionError("not the owner")

    tmp_path.chmod(mode)
    monkeypatch.setattr(Path, "chmod", refuses)
    if is_safe:
        assert private_folder(tmp_path) == tmp_path
    else:
        with pytest.raises(PermissionError):
            private_folder(tmp_path)


@pytest.mark.parametrize("name", ["pensieve", "pensieve/kernels"])
def test_a_file_in_place_of_the_folder_is_an_error_and_stays_as_it_is(tmp_path, name):
    (tmp_path / "pensieve").write_text("mine")
    with pytest.raises(OSError, match="pensieve"):
        private_folder(tmp_path / name)
    assert (tmp_path / "pensieve").read_text() == "mine"


def test_a_private_file_replaces_the_old_one_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    path.write_text("old")
    path.chmod(0o644)
    write_private_file(path, "new")
    assert path.read_text() == "new"
    assert mode_of(path) == 0o600

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_private_file(path, "newer")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
