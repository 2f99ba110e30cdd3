"""A worker process that belongs to one group after the other.

Standard input: pickled (EngineConfig, GroupMember, fault). Standard output: a line after each. fault: None, or of this rank:

raise, hang    its second step that computes does that instead
slow copies    its swap-outs end after the step of rank 0
flaky          its disk fails now and then, or takes its time
disk           its disk is full as long as there is a file "full" in kv_disk_path, and does not answer as long as there is
               one "hangs"
"""

import errno
import itertools
import logging
import os
import pickle
import sys
import threading
import time
from pathlib import Path

import torch

from engine.executor.model_runner import ModelRunner
from engine.executor.tiers.disk_store import DiskStore
from engine.executor.tiers.swapper import ThreadSwapper
from engine.executor.worker import run_worker

forward = ModelRunner._forward
read, write, swap_out = DiskStore.read, DiskStore.write, ThreadSwapper._swap_out


def faulty(fault: str):
    calls = []

    def instead(self, *args):
        calls.append(args)
        if len(calls) < 2:
            return forward(self, *args)
        if fault == "hang":
            threading.Event().wait()
        raise RuntimeError("injected fault")

    return instead


def spoil_disk(path: Path) -> None:
    def read_in_time(self, *args):
        while (path / "hangs").exists():
            time.sleep(0.005)
        return read(self, *args)

    def write_if_there_is_room(self, *args):
        if (path / "full").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, *args)

    DiskStore.read, DiskStore.write = read_in_time, write_if_there_is_room


def make_disk_flaky() -> None:
    """Every third write fails; of every third read the first block, or all of it."""
    reads, writes = itertools.count(1), itertools.count(1)

    def read_sometimes(self, block, keys, buffers):
        number = next(reads)
        time.sleep(number % 4 / 200)
        if number % 6 == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        first, *others = read(self, block, keys, buffers)
        return [first and number % 6 != 3, *others]

    def write_sometimes(self, *args):
        number = next(writes)
        time.sleep(number % 4 / 200)
        if number % 3 == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(self, *args)

    DiskStore.read, DiskStore.write = read_sometimes, write_sometimes


def slow_swap_out(self, *args):
    time.sleep(0.05)
    swap_out(self, *args)


torch.set_num_threads(1)
logging.basicConfig(level=logging.ERROR)
while True:
    try:
        config, member, fault = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    ModelRunner._forward = faulty(fault) if fault in ("raise", "hang") else forward
    ThreadSwapper._swap_out = slow_swap_out if fault == "slow copies" else swap_out
    DiskStore.read, DiskStore.write = read, write
    if fault == "disk":
        spoil_disk(Path(config.kv_disk_path))
    elif fault == "flaky":
        make_disk_flaky()
    run_worker(config, member)  # whatever it raises ends the process, as it does elsewhere
    print("ended", flush=True)
