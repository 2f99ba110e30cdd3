"""The folder of an experiment: a file for each cell, written when it is over, so that a break loses one cell at most.

FOLDER/measured/NAME.KEY.json    FOLDER/simulated/NAME.KEY.json    and beside a measured one: .turns.csv, .metrics.txt
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployments.experiments.cells import KINDS, Cell, Kind
from engine.errors import ConfigError

DONE, FAILED = "done", "failed"
Record = dict[str, Any]


class Results:
    """One folder, which is made."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if it cannot be made."""
        self.folder = folder
        try:
            for kind in KINDS:
                (folder / kind).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--out {folder} cannot be made: {error.strerror}; name another folder", param="out"
            ) from error

    def load(self, kind: Kind) -> dict[str, Record]:
        """What is there, by the cells' keys. A file that is no record is as if it were not there."""
        records = {}
        for path in sorted((self.folder / kind).glob("*.json")):
            try:
                record = json.loads(path.read_text())
                records[record["key"]] = record
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return records

    def save(self, cell: Cell, record: Mapping[str, Any]) -> Record:
        """With what the cell is. The file is complete or not there. Returns all that it holds."""
        whole = {
            "key": cell.key,
            "name": cell.name,
            "kind": cell.kind,
            "seed": cell.seed,
            "axes": dict(cell.case.axes),
            "num_replicas": cell.case.num_replicas,
            "arrivals": cell.case.arrivals,
            "status": DONE,
            **record,
        }
        path = self.path(cell, ".json")
        made = path.with_suffix(".new")
        made.write_text(json.dumps(whole, indent=1) + "\n")
        os.replace(made, path)
        return whole

    def path(self, cell: Cell, suffix: str) -> Path:
        return self.folder / cell.kind / f"{cell.file_name}{suffix}"
