"""A server for a benchmark: Serve with one ingress and one engine replica, in processes of its own."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from deployments.tenants import API_KEY_VARIABLE

KEY = "sk-benchmark"  # which the fast path asks for
START_TIMEOUT_S = 180


@contextmanager
def serve_app(engine: dict[str, Any], fast_path: bool, **args: Any) -> Iterator[str]:
    """A Serve application of one ingress and one engine replica in processes of its own; its URL.

    args: further AppArgs.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        config = {
            "http_options": {"host": "127.0.0.1", "port": port},
            "logging_config": {"enable_access_log": False},
            "applications": [
                {
                    "name": "overhead",
                    "route_prefix": "/",
                    "import_path": "deployments.app:build",
                    "args": {
                        "engine": engine,
                        "num_cpus": 0.5,
                        "max_ongoing_requests": 128,
                        "store_url": f"sqlite:///{folder}/conversations.db",
                        **args,
                    },
                }
            ],
        }
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "deployments.run", str(path), *(["--fast-path"] if fast_path else [])]
        with open(Path(folder) / "output.txt", "wb") as output:
            environment = os.environ | {API_KEY_VARIABLE: KEY}
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        url = f"http://127.0.0.1:{port}"
        try:
            asyncio.run(wait_until_ready(url, process, Path(folder) / "output.txt"))
            yield url
        finally:
            process.terminate()
            process.wait(60)


async def wait_until_ready(url: str, process: subprocess.Popen[bytes], output: Path) -> None:
    async with asyncio.timeout(START_TIMEOUT_S), aiohttp.ClientSession() as http:
        while True:
            try:
                async with http.get(f"{url}/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            if process.poll() is not None:
                sys.exit(f"the application did not start:\n{output.read_text()[-3000:]}")
            await asyncio.sleep(0.5)
