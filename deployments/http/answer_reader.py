"""What an answer says, read from its deltas in the same way for every endpoint that tells thinking and calls apart.

Knows no wire format. The parser is here and not in the engine, so it does not matter which replica the text comes from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from engine.dialogue.events import CallCut, CallStart, Event, Parser, merge_events
from engine.dialogue.program import PlainParser
from engine.dialogue.tools import Tool
from engine.text.output import OutputDelta


class AnswerReader:
    """Reads one answer.

    has_calls: it calls something. is_cut: one of its calls is incomplete.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        """Reads nothing yet.

        tools: that the answer may call.
        """
        self.has_calls = False
        self.is_cut = False
        self._tools = tools
        self._parser: Parser | None = None

    def read(self, delta: OutputDelta) -> list[Event]:
        """What is new. The delta with a finish_reason also gives what was held back."""
        if self._parser is None:
            form = delta.answer_format
            self._parser = PlainParser() if form is None else form.parser(self._tools)
        events = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            events += self._parser.finish()
        self.has_calls |= any(isinstance(event, CallStart) for event in events)
        self.is_cut |= any(isinstance(event, CallCut) for event in events)
        return merge_events(events)


def made_call_id(answer_id: str, index: int, prefix: str = "call_") -> str:
    """The id of a call that the model gave none: the same whenever the answer is read.

    index: of the call in its answer.
    """
    return prefix + hashlib.blake2b(f"{answer_id} {index}".encode(), digest_size=12).hexdigest()
