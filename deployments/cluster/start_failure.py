"""How an engine replica that cannot start says why.

Serve keeps the text of the exception that ends a replica's constructor, traceback and all, in the status of its
deployment. Here that text is written, and the reason found again in it. Knows no Ray.
"""

from __future__ import annotations

import re

from engine.errors import PensieveError

# Of a reason; a message of torch's may go on for pages.
MAX_REASON_CHARS = 600
# Folders say nothing to a client, and more about the server than a stranger should know: the last name is enough.
_FOLDERS = re.compile(r"(?<![\w.~:/-])~?/(?:[^\s'\":;,()/]+/)+(?=[^\s'\":;,()/])")


class EngineStartError(Exception):
    """An engine replica cannot start; says why in one line, fit for clients."""


_REASON = re.compile(rf"^\S*{EngineStartError.__name__}: (.+)$", re.MULTILINE)


def start_error(error: BaseException) -> EngineStartError:
    """What a constructor is to raise from `error`."""
    text = error.message if isinstance(error, PensieveError) else f"{type(error).__name__}: {error}"
    reason = _FOLDERS.sub("", " ".join(text.split()))
    if len(reason) > MAX_REASON_CHARS:
        reason = reason[:MAX_REASON_CHARS] + "..."
    return EngineStartError(reason)


def read_start_error(message: str) -> str | None:
    """The reason in a deployment's status message; None when there is none."""
    reasons: list[str] = _REASON.findall(message)
    return reasons[-1] if reasons else None
