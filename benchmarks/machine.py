"""What a figure was measured with: processor, versions, command. Goes into every result file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> None:
    """NAME.json in `folder`: the figures, and what they were measured with."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    # Whole or not at all: a process may be ended while it writes.
    path.with_suffix(".part").write_text(json.dumps({"run": describe_run(), **figures}, indent=2) + "\n")
    path.with_suffix(".part").replace(path)


@cache
def describe_run() -> dict[str, Any]:
    """Command, commit, versions and machine of this process."""
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "processor": _processor(),
        "cores": os.cpu_count(),
        **_describe_gpu(),
    }


def _describe_gpu() -> dict[str, Any]:
    """Only where this process has used torch with one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "triton": version("triton"),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
