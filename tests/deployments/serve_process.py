"""pensieve-serve as a process: serve_config.yaml with the recall model, in a folder of a test's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import yaml

from tests.deployments.local_ray import free_port

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"
# Far longer than anything here takes; only a defect waits for it.
START_S = 120.0
END_S = 60.0
# Asks again and again, wherever it runs, and ends with 0 at the first 200.
ASK_READY = """
import sys, time, urllib.request
while True:
    try:
        urllib.request.urlopen(sys.argv[1] + "/ready", timeout=5)
        break
    except OSError:
        time.sleep(0.2)
"""


class ServeProcess:
    """A pensieve-serve that runs from the constructor on, and serves when `wait_until_ready` returns.

    enter: a command that runs another one in its arguments, elsewhere.
    token: Ray's, which gives it a dashboard; None = it makes one that the test does not know.
    """

    def __init__(self, folder: Path, enter: Sequence[str] = (), token: str | None = None) -> None:
        self._enter = enter
        port = free_port()
        config = yaml.safe_load(CONFIG.read_text())
        config["http_options"]["port"] = port
        application = config["applications"][0]
        application["args"]["store_url"] = f"sqlite:///{folder / 'conversations.db'}"
        application["args"]["engine"] |= {"model": "embedded", "num_threads": 1}
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{port}"
        self.home = folder / "home"
        self.home.mkdir()
        self._output = folder / "output.txt"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
        if token is not None:
            environment["RAY_AUTH_TOKEN"] = token
        environment.setdefault("XDG_CACHE_HOME", str(Path.home() / ".cache"))  # kernels are built once
        with open(self._output, "wb") as output:
            self.process = subprocess.Popen(
                [*enter, sys.executable, "-m", "deployments.run", str(path)],
                stdout=output,
                stderr=output,
                env={**environment, "HOME": str(self.home)},
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_until_ready(self) -> None:
        ready = subprocess.Popen([*self._enter, sys.executable, "-c", ASK_READY, self.url])
        try:
            _wait(lambda: ready.poll() is not None or self.process.poll() is not None, START_S)
            assert ready.returncode == 0, self.output
        finally:
            ready.kill()
            ready.wait()

    @property
    def session(self) -> int:
        """Of Serve's driver and all that it started."""
        (driver,) = psutil.Process(self.process.pid).children()
        return driver.pid

    def daemon(self, name: str) -> psutil.Process:
        (found,) = (process for process in in_session(self.session) if process.name() == name)
        return found

    def wait(self) -> int:
        return self.process.wait(END_S)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                for process in [*in_session(self.session), self.process]:
                    process.kill()
                raise


def in_session(session: int) -> list[psutil.Process]:
    """Its processes that are alive."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


def _wait(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
