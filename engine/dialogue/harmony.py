"""The format of gpt-oss: an answer is a row of messages with headers.

A header says who reads the message, and on which channel:
<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f <|message|>{..}<|call|>
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from engine.dialogue.events import Reasoning, Text
from engine.dialogue.json_calls import JsonCallParser
from engine.dialogue.program import BrokenCallError, Program
from engine.dialogue.reasoning import ReasoningFormat
from engine.dialogue.tools import Tool

MESSAGE = "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
MARKERS = ("<|start|>", "<|channel|>", "<|constrain|>", MESSAGE, *ENDS)
ANALYSIS = ReasoningFormat("<|channel|>analysis<|message|>", "<|end|>", repeats=True)
RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


@dataclass(frozen=True, slots=True)
class Harmony:
    """The format; it has no choices."""

    @property
    def markers(self) -> tuple[str, ...]:
        return MARKERS

    @property
    def signature(self) -> tuple[str, ...]:
        return ("<|channel|>", MESSAGE)

    @property
    def frames_answers(self) -> bool:
        return True

    def parser(self, tools: Sequence[Tool]) -> HarmonyParser:
        return HarmonyParser()


class HarmonyParser(JsonCallParser):
    """Analysis is reasoning, a message to functions.NAME is a call, everything else is text."""

    def __init__(self) -> None:
        super().__init__(MARKERS)

    def _run(self) -> Program[None]:
        while (yield from self._next_char()):
            yield from self._read_message()

    def _read_message(self) -> Program[None]:
        header: list[str] = []
        if not (yield from self._read_until((MESSAGE,), header.append)):
            self._tell_text()  # a header without a message, or an answer without headers
            return
        recipient = RECIPIENT.search("".join(header))
        channel = CHANNEL.search("".join(header))
        if recipient is not None:
            yield from self._read_call_message(recipient[1])
            return
        self._tell_markup()
        is_reasoning = channel is not None and channel[1] == "analysis"
        yield from self._read_until(ENDS, self._tell_reasoning if is_reasoning else self._tell_content)
        self._tell_markup()

    def _read_call_message(self, name: str) -> Program[None]:
        yield from self._skip_blank()
        try:
            if (yield from self._next_char()) == "{":
                yield from self._stream_call(name)
                self._end_call()
            else:
                self._tell_markup()
        except BrokenCallError:
            self._break_off()
        yield from self._read_until(ENDS, self._tell_content_if_any)
        self._tell_markup()

    def _tell_reasoning(self, piece: str) -> None:
        self._events.append(Reasoning(self._flush()))

    def _tell_content(self, piece: str) -> None:
        self._events.append(Text(self._flush()))

    def _tell_content_if_any(self, piece: str) -> None:
        if piece.strip():
            self._tell_content(piece)
