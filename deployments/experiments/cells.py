"""The cells of an experiment: each case with each seed, measured or simulated.

What makes a cell another one is in its key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from deployments.experiment import Case, Experiment
from engine import __version__

Kind = Literal["measured", "simulated"]
KINDS: tuple[Kind, ...] = ("measured", "simulated")
# What a case says of the simulated machine; a real one is as it is.
_SIMULATED_ONLY = ("device", "model_shape", "disk", "steps", "network", "drain_s")
MAX_SLUG_CHARS = 80


@dataclass(frozen=True, slots=True)
class Cell:
    """One run. key: of all that its figures depend on, as far as the experiment says it."""

    kind: Kind
    case: Case
    seed: int
    key: str

    @property
    def name(self) -> str:
        return f"{self.case.name or 'all'}, seed {self.seed}"

    @property
    def file_name(self) -> str:
        slug = re.sub(r"[^A-Za-z0-9.=]+", "-", self.name).strip("-")
        return f"{slug[:MAX_SLUG_CHARS]}.{self.key}"


def cells_of(experiment: Experiment, kind: Kind) -> list[Cell]:
    """All cells, seed by seed: what is there after a break is complete for the first seeds."""
    return [
        Cell(kind, case, seed, _key(experiment, kind, case, seed))
        for seed in experiment.seeds
        for case in experiment.cases
    ]


def _key(experiment: Experiment, kind: Kind, case: Case, seed: int) -> str:
    said = {name: value for name, value in _said_of(case).items() if name not in ("name", "axes")}
    said |= {"kind": kind, "seed": seed, "version": __version__}
    if kind == "measured":
        said = {name: value for name, value in said.items() if name not in _SIMULATED_ONLY}
        said |= {"cluster": _said_of(experiment.cluster), "serve": experiment.serve}
    elif case.steps is not None:
        said["steps"] = hashlib.blake2b(_content(case.steps)).hexdigest()
    text = json.dumps(said, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _said_of(value: Any) -> dict[str, Any]:
    """The fields that are not at their defaults: a result stays valid when a later version has more options."""
    said = {}
    for each in fields(value):
        given = getattr(value, each.name)
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if given != default:
            said[each.name] = _said_of(given) if is_dataclass(given) else given
    return said


def _content(path: str) -> bytes:
    """Empty if there is no such file: the simulation says so."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def pending(cells: Sequence[Cell], done: set[str], failed: set[str]) -> list[Cell]:
    """Those without a result, in their order; those that failed before come last.

    done, failed: keys.
    """
    left = [cell for cell in cells if cell.key not in done]
    return sorted(left, key=lambda cell: cell.key in failed)
