"""Whether two messages say the same though they are written with other spaces or order of keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from engine.dialogue.events import ParsedCall


def same_calls(one: Sequence[ParsedCall], other: Sequence[ParsedCall]) -> bool:
    """Whether they are the same calls in the same order."""
    return len(one) == len(other) and all(
        a.name == b.name and canonical_arguments(a.arguments) == canonical_arguments(b.arguments)
        for a, b in zip(one, other, strict=True)
    )


def canonical_arguments(text: str) -> str:
    """Equal for equal JSON; what is none stays as it is."""
    try:
        return json.dumps(_canonical(json.loads(text)), sort_keys=True)
    except (ValueError, RecursionError):
        return text


def _canonical(value: Any) -> Any:
    match value:
        case dict():
            return {key: _canonical(part) for key, part in value.items()}
        case list():
            return [_canonical(part) for part in value]
        case float() if value.is_integer():
            return int(value)
    return value
