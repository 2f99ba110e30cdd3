"""What tests ask of an error that refuses a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from deployments.http.errors import wire_of
from engine.errors import RequestError

MAX_REFUSAL_CHARS = 300  # it may quote a parameter's name or value, but not all of a large one


def refusal(call: Callable[[], Any]) -> tuple[str | None, str | None]:
    """The parameter that a refusal names, and its code. The call has to be refused as an invalid request, briefly."""
    with pytest.raises(RequestError) as info:
        call()
    wire = wire_of(info.value)
    assert (wire.status, wire.type) == (400, "invalid_request_error")
    assert len(info.value.message) < MAX_REFUSAL_CHARS
    return info.value.param, wire.code
