"""Ray and Serve of the tests' own, in this process and on this machine. Modules that want the same kind share one."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import pytest
import ray

from deployments.cluster.ray_settings import DEFAULTS
from deployments.cluster.serve_start import start_serve

# As pensieve-serve starts it; or with Ray's own defaults, as other ways to start it have them.
AS_PENSIEVE_SERVE: Mapping[str, str] = DEFAULTS
AS_RAY: Mapping[str, str] = {"RAY_USAGE_STATS_ENABLED": "0"}
NODE: Mapping[str, Any] = {"num_cpus": 4, "object_store_memory": 150 * 2**20, "include_dashboard": False}
NUM_STARTS = 3
# How Ray says that its node, or the first process of it, did not come up in time.
NOT_IN_TIME = ("timed out during startup", "Timed out waiting for file")


def free_port() -> int:
    """A port that was free a moment ago. Two Serve instances on one port share its connections silently."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start_ray(**options: Any) -> None:
    """Starts a small Ray, without a dashboard unless it is asked for.

    Ray gives its node half a minute to come up, which a slow machine may miss, even twice. And it waits as long for a process
    that died as it began, which happens once in hundreds of starts in a process that has threads.
    """
    options = {**NODE, **options}
    for num_failed in range(NUM_STARTS):
        try:
            ray.init("local", log_to_driver=False, **options)
            return
        except Exception as error:
            if not any(text in str(error) for text in NOT_IN_TIME) or num_failed == NUM_STARTS - 1:
                raise
            ray.shutdown()


class LocalServe:
    """The Serve that this process has, if any: there can be one at a time. Access logs are off."""

    def __init__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        self._kind: Mapping[str, str] | None = None
        self._url = ""

    def start(self, kind: Mapping[str, str]) -> str:
        """The URL of a Serve without applications, started with this environment unless it runs already.

        Delete what you deploy, so that the next module finds none.
        """
        if self._kind is not kind:
            self.stop()
            for name, value in kind.items():
                self._patch.setenv(name, value)
            port = free_port()
            self._kind, self._url = kind, f"http://127.0.0.1:{port}"
            start_ray()
            http_options = {"host": "127.0.0.1", "port": port}
            logging_config = {"enable_access_log": False}
            start_serve({"applications": [], "logging_config": logging_config, "http_options": http_options})
        return self._url

    def stop(self) -> None:
        """Ends it, for those who need a Ray of another kind, or for good."""
        if self._kind is not None:
            self._kind = None
            ray.shutdown()
        self._patch.undo()
