"""What a client's script runs in: a virtual environment or a folder of npm packages, made once and kept in the user's cache.

PENSIEVE_CLIENTS names another folder for them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from engine.paths import cache_folder
from tests.clients.catalogue import Client

SCRIPTS = Path(__file__).parent / "scripts"
# pip and npm end by themselves when a registry does not answer; only a defect waits for this.
INSTALL_S = 1800.0
# What pip and npm say when there is no registry, and not when a package is not there.
UNREACHABLE = ("NewConnectionError", "ConnectTimeout", "NameResolutionError", "ReadTimeout", "ProxyError", "ENOTFOUND",
               "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT")  # fmt: skip


def command(client: Client) -> list[str]:
    """The command line of its script, with its packages installed. Skips if they cannot be had here."""
    if client.is_node:
        node = shutil.which("node")
        if node is None or shutil.which("npm") is None:
            pytest.skip("Node is not installed (Debian: apt-get install nodejs npm)")
        version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
        if int(version.removeprefix("v").split(".")[0]) < client.min_node:
            pytest.skip(f"needs Node {client.min_node}; this is {version.strip()}")
        folder = _installed(client, [["npm", "install", "--no-audit", "--no-fund", *client.requirements]])
        # Node looks for packages beside the script, wherever it is started.
        return [node, shutil.copy(SCRIPTS / client.script, folder)]
    if client.is_light:
        return [sys.executable, "-I", str(SCRIPTS / client.script)]
    python = str(Path("bin", "python"))
    install = [python, "-m", "pip", "install", "--quiet", "--no-input", *client.requirements]
    folder = _installed(client, [[sys.executable, "-m", "venv", "."], install])
    return [str(folder / python), "-I", str(SCRIPTS / client.script)]


def _installed(client: Client, commands: list[list[str]]) -> Path:
    """The folder in which these commands have been run, now or by an earlier test.

    Clients with the same packages share one.
    """
    identity = hashlib.sha256("\n".join((sys.version, sys.prefix, *client.requirements)).encode()).hexdigest()[:12]
    root = Path(os.environ.get("PENSIEVE_CLIENTS") or cache_folder() / "clients")
    folder = root / f"{client.name}-{identity}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        done = folder / "installed.txt"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for arguments in commands:
                _run(arguments, folder)
            done.write_text("\n".join(client.requirements))
    return folder


def _run(arguments: list[str], folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = [str(folder / arguments[0]) if arguments[0].startswith("bin/") else arguments[0], *arguments[1:]]
    ran = subprocess.run(
        program, cwd=folder, env=environment, capture_output=True, text=True, timeout=INSTALL_S, check=False
    )
    if ran.returncode != 0:
        said = ran.stdout + ran.stderr
        if any(word in said for word in UNREACHABLE):
            pytest.skip(f"the registry cannot be reached: {said.strip().splitlines()[-1]}")
        pytest.fail(f"{' '.join(arguments)}\n{said}")
