"""Files of JSON and JSONL, read within bounds. A mistake is told with its file, its line or entry, and the remedy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import WorkloadError

# A JSON file is held in memory as a whole; of JSONL one line at a time.
MAX_JSON_BYTES = 1 << 30
MAX_LINE_BYTES = 1 << 24
# Of one workload, of one session, of one turn.
MAX_SESSIONS = 5_000_000
MAX_TURNS = 100_000
MAX_TOKENS = 10_000_000


@dataclass(frozen=True, slots=True)
class Record:
    """One object of a file. place: where it stands, for messages."""

    fields: dict[str, Any]
    place: str

    def fail(self, problem: str) -> NoReturn:
        raise WorkloadError(f"{self.place}: {problem}")

    def has(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def integer(self, name: str, low: int, high: int = MAX_TOKENS) -> int:
        value = self.fields.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.fail(f"{name!r} must be a whole number from {low} to {high}, got {_shown(value)}")
        return value

    def seconds(self, name: str, *, scale: float = 1.0) -> float:
        """A time that is not negative. scale: seconds of its unit."""
        value = self.fields.get(name, 0.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            self.fail(f"{name!r} must be a number that is not below 0, got {_shown(value)}")
        return value * scale

    def text(self, name: str, default: str | None = None) -> str:
        value = self.fields.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            self.fail(f"{name!r} must be a text, got {_shown(value)}")
        return value

    def items(self, name: str) -> list[Any]:
        value = self.fields.get(name)
        if not isinstance(value, list):
            self.fail(f"{name!r} must be a list, got {_shown(value)}")
        return value

    def records(self, name: str) -> list[Record]:
        """The objects of a list."""
        return [self._of(f"{name}[{index}]", value) for index, value in enumerate(self.items(name))]

    def record(self, name: str) -> Record:
        return self._of(name, self.fields.get(name))

    def _of(self, name: str, value: Any) -> Record:
        if not isinstance(value, dict):
            self.fail(f"{name!r} must be an object, got {_shown(value)}")
        return Record(value, f"{self.place}, {name}")


def read_jsonl(path: Path) -> Iterator[Record]:
    """The objects of a file that has one a line. Raises WorkloadError."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                place = f"{path}, line {number}"
                if len(line) > MAX_LINE_BYTES:
                    raise WorkloadError(
                        f"{place}: longer than {MAX_LINE_BYTES >> 20} MiB; is this a file of one object a line?"
                    )
                if line.strip():
                    yield _record(line, place)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_json_list(path: Path) -> Iterator[Record]:
    """The objects of a file that is one JSON list. Raises WorkloadError."""
    for index, value in enumerate(read_json_values(path)):
        if not isinstance(value, dict):
            raise WorkloadError(f"{path}, entry {index}: it must be an object, got {_shown(value)}")
        yield Record(value, f"{path}, entry {index}")


def read_json_values(path: Path) -> list[Any]:
    """What a file that is one JSON list holds. Raises WorkloadError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise WorkloadError(
                f"{path} has more than {MAX_JSON_BYTES >> 20} MiB; cut it into parts, or write it as JSONL"
            )
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise WorkloadError(f"{path}, line {line}: not JSON ({error}); is it another format?") from error
    if not isinstance(values, list):
        raise WorkloadError(f"{path}: it must be one JSON list, got {_shown(values)}; is it another format?")
    return values


def _record(line: bytes, place: str) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WorkloadError(
            f"{place}: not JSON ({error}); one object a line is wanted, is it another format?"
        ) from error
    if not isinstance(value, dict):
        raise WorkloadError(f"{place}: it must be an object, got {_shown(value)}; is it another format?")
    return Record(value, place)


def _unreadable(path: Path, error: OSError) -> WorkloadError:
    return WorkloadError(f"{path} cannot be read: {error.strerror}; check the name")


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
