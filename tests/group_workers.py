"""Workers of tensor-parallel groups, and faults to give them.

They are processes that outlive a group, because an interpreter with torch starts slowly.
"""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.executor.process_group import GroupMember

FOLDER = Path(__file__).parent
END_S = 20


class WarmWorkers:
    """Processes that go on to the next group, as long as all goes well in the one before."""

    def __init__(self) -> None:
        self.idle: list[subprocess.Popen[bytes]] = []

    def take(self) -> subprocess.Popen[bytes]:
        return self.idle.pop() if self.idle else self.spawn()

    def spawn(self) -> subprocess.Popen[bytes]:
        python_path = os.pathsep.join([str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            [sys.executable, str(FOLDER / "warm_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": python_path},
        )

    def starter(self, fault: str | None = None) -> WarmStarter:
        """For one group. fault: of its rank 1, see warm_worker.py."""
        return WarmStarter(self, fault)

    def close(self) -> None:
        for process in self.idle:
            process.stdin.close()
            process.wait(END_S)


class WarmStarter:
    """A WorkerStarter. A worker that has left its group goes back to the others; one that has not is killed."""

    host: str | None = None

    def __init__(self, pool: WarmWorkers, fault: str | None) -> None:
        self._pool = pool
        self._fault = fault
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, config: EngineConfig, members: Sequence[GroupMember]) -> None:
        for member in members:
            process = self._pool.take()
            self._processes.append(process)
            process.stdin.write(pickle.dumps((config, member, self._fault if member.rank == 1 else None)))
            process.stdin.flush()

    def check(self) -> None:
        for process in self._processes:
            if process.poll() is not None:
                raise EngineError(f"a worker ended with {process.returncode}")

    def shutdown(self) -> None:
        with self._lock:
            while self._processes:
                process = self._processes.pop()
                if select.select([process.stdout], [], [], 0.5)[0] and process.stdout.readline():
                    self._pool.idle.append(process)
                else:
                    process.kill()
                    process.wait()
                    self._pool.idle.append(self._pool.spawn())  # the next test comes soon
