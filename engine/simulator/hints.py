"""What clients say of the next use of their contexts, and what a server learns of it, in a simulation."""

from __future__ import annotations

from engine.core.engine_core import EngineCore
from engine.core.pauses import Pauses
from engine.core.request import Request
from engine.core.retention import RetentionHint
from engine.simulator.clients import Client

# Clients of all tenants know the same of tools and of people.
_ALL = "all"


class Hints:
    """By the option `kv_hints`: none, those of clients, or what the server learns.

    A client knows whether its session goes on, which tool it runs then, and how long that, or a person, takes as a rule. A
    server knows the tool that its answer calls, and takes every other answer for one that a person reads.
    """

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._pauses = Pauses()

    def hint_of(self, client: Client) -> RetentionHint | None:
        """What the client says with the turn that it sends now."""
        if self._mode != "client":
            return None
        following = client.following
        if following is None:
            return RetentionHint.of(release=True)
        usual_s = self._pauses.expected_s(_ALL, following.tool or following.kind)
        return None if not usual_s else RetentionHint.of(expected_return_s=usual_s)

    def note_ask(self, client: Client, now: float) -> None:
        """A turn is sent."""
        self._pauses.note_return(client.session.session_id, now)

    def note_end(self, client: Client, request: Request, core: EngineCore, now: float) -> None:
        """The turn has ended there."""
        following, session = client.following, client.session
        if self._mode == "client" and following is not None:
            self._pauses.note_end(session.session_id, _ALL, following.tool or following.kind, now)
        elif self._mode == "learned":
            is_tool = following is not None and following.kind == "tool"
            tool = (following.tool or following.kind) if following is not None and is_tool else ""
            expected_s = self._pauses.note_end(session.session_id, session.tenant, tool, now)
            if expected_s is not None:
                core.expect_use(request, now + expected_s, now)
