"""What the headers of an HTTP request say of it, besides whose it is and its session: for logs, traces and explanations.

Every value is bounded and clean by the time it is here: log lines and spans have them as they are.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import InvalidParameterError

REQUEST_ID_HEADER, EXPLAIN_HEADER = "x-request-id", "x-pensieve-explain"
GOOD_REQUEST_ID = re.compile(r"[!-~]{1,128}")
# https://www.w3.org/TR/trace-context: version, trace, span and flags; what later versions add may follow.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,128})?")
_TRACESTATE = re.compile(r"[ -~]{0,512}")
_SWITCH = {"": False, "0": False, "false": False, "1": True, "true": True}


@dataclass(frozen=True, slots=True)
class Origin:
    """The HTTP request that a generation is for.

    request_id: its X-Request-Id, or one that was made for it; empty = it is for none.
    traceparent, tracestate: the span that what is done for it is part of, as W3C writes it; empty = none.
    explains: its client asks how the answer came about.
    """

    request_id: str = ""
    traceparent: str = ""
    tracestate: str = ""
    explains: bool = False

    @property
    def trace_id(self) -> str:
        """Of its trace; empty = none."""
        return self.traceparent[3:35]

    @property
    def is_sampled(self) -> bool:
        """Whether its trace is recorded."""
        return bool(self.traceparent) and bool(int(self.traceparent[53:55], 16) & 1)


NO_ORIGIN = Origin()


def origin_of(headers: Mapping[str, str]) -> Origin:
    """What these headers say; a value that is not as it has to be is as if it were not there.

    headers: by names in lower case, or found without regard to case. Raises InvalidParameterError if EXPLAIN_HEADER says
    neither yes nor no.
    """
    request_id = headers.get(REQUEST_ID_HEADER, "")
    switch = headers.get(EXPLAIN_HEADER, "").strip().lower()
    if switch not in _SWITCH:
        raise InvalidParameterError(f"the header {EXPLAIN_HEADER} must be true or false", EXPLAIN_HEADER)
    traceparent, tracestate = headers.get("traceparent", "").strip(), headers.get("tracestate", "")
    is_traced = _TRACEPARENT.fullmatch(traceparent) is not None
    return Origin(
        request_id if GOOD_REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex,
        traceparent if is_traced else "",
        tracestate if is_traced and _TRACESTATE.fullmatch(tracestate) else "",
        _SWITCH[switch],
    )
