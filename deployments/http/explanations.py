"""How an answer came about, as clients that ask for it are told. Knows no endpoint."""

from __future__ import annotations

from typing import Any

from engine.text.output import OutputDelta


def explanation_field(delta: OutputDelta) -> dict[str, Any]:
    """The field of an answer whose last delta this is; {} if it was not asked for, or more follows."""
    return {} if delta.explanation is None else {"explanation": delta.explanation.as_json(delta.recomputed)}
