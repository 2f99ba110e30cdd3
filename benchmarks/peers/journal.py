"""Keeps each run of a comparison as soon as it is over, so that one that was interrupted goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Journal:
    """A file of JSON lines: the identity, then a line for each run.

    Runs are of use only beside others of the same settings and the same code: with another identity it starts anew.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n")]  # one that was cut is a run to do again
        if not kept or json.loads(kept[0]) != identity:
            kept = [json.dumps(identity) + "\n"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(kept))
        self._results = {tuple(entry["key"]): entry["result"] for entry in map(json.loads, kept[1:])}

    def find(self, workload: str, number: int, system: str) -> dict[str, Any] | None:
        """The result of a system's run of that number, if it is over."""
        return self._results.get((workload, number, system))

    def add(self, workload: str, number: int, system: str, result: dict[str, Any]) -> None:
        self._results[workload, number, system] = result
        with self._path.open("a") as file:
            file.write(json.dumps({"key": [workload, number, system], "result": result}) + "\n")
