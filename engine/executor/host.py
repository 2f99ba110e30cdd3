"""How this process uses its machine: cores, freed memory, OpenMP's threads. Knows no model."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from pathlib import Path

logger = logging.getLogger(__name__)

# Options of glibc's mallopt(3); it takes no larger threshold for mmap than 32 MiB, and none for trimming over 2 GiB.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
MAX_MMAP_THRESHOLD, MAX_TRIM_THRESHOLD = 32 << 20, (2 << 30) - 1
OMP_PAUSE_SOFT = 1  # of omp.h
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """How many cores this process was given.

    By OMP_NUM_THREADS, which Ray sets to a replica's num_cpus, or else by the scheduler's affinity and the control group's
    quota.
    """
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if CPU_QUOTA.exists():
        limit, period = CPU_QUOTA.read_text().split()
        if limit != "max":
            num_cores = min(num_cores, max(1, int(limit) // int(period)))
    return num_cores


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step; no effect on other systems.

    Each step allocates its activations anew, and fetching their pages from the system costs more than many of the
    operations on them. For the whole process, from now on; one arena, because the heaps of the others are too small for
    activations.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in (
        (M_ARENA_MAX, 1),
        (M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD),
        (M_TRIM_THRESHOLD, MAX_TRIM_THRESHOLD),
    ):
        libc.mallopt(option, value)


def end_openmp_team() -> None:
    """End the OpenMP threads that loading has started for the calling thread.

    No effect without GNU's OpenMP.

    Steps run in another thread, with OpenMP threads of its own. Once there are more in all than cores, GNU's OpenMP
    sleeps at every barrier.
    """
    try:
        ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(OMP_PAUSE_SOFT)
    except (OSError, AttributeError):
        logger.debug("torch does not use GNU's OpenMP here")
