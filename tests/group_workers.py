"""Workers of tensor-parallel groups, for tests: processes that outlive a group, and faults to give them."""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.executor.process_group import GroupMember

FOLDER = Path(__file__).parent
END_S = 20


class WarmWorkers:
    """A WorkerStarter whose processes go on to the next group. fault: of the next group's rank 1, see warm_worker.py."""

    host: str | None = None

    def __init__(self) -> None:
        self._idle: list[subprocess.Popen[bytes]] = []
        self.busy: list[subprocess.Popen[bytes]] = []
        self.fault: str | None = None

    def start(self, config: EngineConfig, members: Sequence[GroupMember]) -> None:
        while len(self._idle) < len(members):
            self._idle.append(self._spawn())
        for member in members:
            process = self._idle.pop()
            self.busy.append(process)
            fault, self.fault = self.fault, None
            process.stdin.write(pickle.dumps((config, member, fault)))
            process.stdin.flush()

    def check(self) -> None:
        for process in self.busy:
            if process.poll() is not None:
                raise EngineError(f"a worker ended with {process.returncode}")

    def shutdown(self) -> None:
        """A process that has ended its part stays; whoever has not is killed."""
        while self.busy:
            process = self.busy.pop()
            if select.select([process.stdout], [], [], 0.5)[0] and process.stdout.readline():
                self._idle.append(process)
            else:
                process.kill()
                process.wait()

    def close(self) -> None:
        self.shutdown()
        for process in self._idle:
            process.stdin.close()
            process.wait(END_S)

    def _spawn(self) -> subprocess.Popen[bytes]:
        python_path = os.pathsep.join([str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            [sys.executable, str(FOLDER / "warm_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": python_path},
        )
