"""Where the engine keeps files of its own on a machine, and who may read them: its user alone."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

# What group and others may do with a file or folder.
_OF_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def data_folder() -> Path:
    """What must not be lost. May not exist yet."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "pensieve"


def cache_folder() -> Path:
    """What can be made again at any time: built kernels, measured profiles. May not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pensieve"


def private_folder(path: Path) -> Path:
    """Make a folder that its owner alone can enter, with the parents that are missing; returns `path`.

    path: a folder of the engine's own. One that exists loses what group and others may do there: an earlier version may
    have made it, and the engine runs code from its cache. Its parents are left as they are. Raises OSError if it cannot be
    made, or if others can write to it and this user may not change that.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    for folder in (*reversed(missing), path):
        folder.mkdir(mode=stat.S_IRWXU, exist_ok=True)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & _OF_OTHERS:
        try:
            path.chmod(mode & ~_OF_OTHERS)
        except PermissionError:  # an administrator's, to be read by all
            if mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise
    return path


def write_private_file(path: Path, text: str) -> None:
    """Write a file that only its owner can read, in an existing folder.

    A concurrent reader sees the old content or all of the new one.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # with mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
