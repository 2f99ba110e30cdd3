"""What lies under a folder, so that what was measured of one disk is not believed of another."""

from __future__ import annotations

import os
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")


def device_of(path: Path) -> str:
    """The file system of a folder, or of the first one above it that exists, as "ext4 /dev/sda1".

    The number of its device if the system does not name it. Raises OSError.
    """
    while not path.exists() and path != path.parent:
        path = path.parent
    number = os.stat(path).st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    lines = MOUNTS.read_text(errors="replace").splitlines() if MOUNTS.exists() else []
    for line in lines:
        mount, _, system = line.partition(" - ")  # see proc_pid_mountinfo(5)
        if mount.split()[2] == wanted:
            return " ".join(system.split()[:2])
    return f"device {wanted}"
