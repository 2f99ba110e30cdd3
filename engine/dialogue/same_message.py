"""Whether two messages say the same though they are written with other spaces or order of keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from engine.dialogue.events import ParsedCall
from engine.dialogue.tools import PYTHON_WORDS


def same_calls(one: Sequence[ParsedCall], other: Sequence[ParsedCall], *, are_texts: bool) -> bool:
    """Whether they are the same calls in the same order.

    are_texts: values were written as texts, so that {"a": 1} may be the text of an object.
    """
    return len(one) == len(other) and all(
        a.name == b.name and _canonical_text(a.arguments, are_texts) == _canonical_text(b.arguments, are_texts)
        for a, b in zip(one, other, strict=True)
    )


def _canonical_text(text: str, are_texts: bool) -> str:
    """Equal for equal JSON; what is none stays as it is."""
    try:
        return json.dumps(_canonical(json.loads(text), are_texts), sort_keys=True)
    except (ValueError, RecursionError, OverflowError):
        return text


def _canonical(value: Any, are_texts: bool) -> Any:
    match value:
        case dict():
            return {key: _canonical(part, are_texts) for key, part in value.items()}
        case list():
            return [_canonical(part, are_texts) for part in value]
        case float() if value.is_integer():
            return int(value)
        case str() if are_texts:
            try:
                return _canonical(json.loads(PYTHON_WORDS.get(value.strip(), value)), are_texts=False)
            except ValueError:
                return value
    return value
