"""Where the engine keeps files of its own on a machine."""

from __future__ import annotations

import os
from pathlib import Path


def data_folder() -> Path:
    """What must not be lost. May not exist yet."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "pensieve"


def cache_folder() -> Path:
    """What can be made again at any time: built kernels, measured profiles. May not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pensieve"
