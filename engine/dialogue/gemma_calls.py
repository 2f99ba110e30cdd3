"""Calls in the notation of Gemma 4: call:f{city:<|"|>Bern<|"|>,days:3}.

That is JSON with bare keys and quotation marks of its own. The arguments are told as JSON once a call is complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from engine.dialogue.program import BrokenCallError, Program, ProgramParser
from engine.dialogue.tools import Tool

OPENING, CLOSING, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
NAME = re.compile(r"[^\s{}<>]*")
# A text in JSON's own quotation marks, which nested objects may have, or a bare key behind a bracket or a comma. What begins
# such a text always matches: else each escaped quotation mark within would be tried as a beginning.
KEY = re.compile(r""""(?:[^"\\]|\\.)*(?:"|\\?\Z)|([{,])([^{}\[\],:"]*):""", re.DOTALL)


@dataclass(frozen=True, slots=True)
class GemmaCalls:
    """The format; it has no choices."""

    @property
    def opening(self) -> str:
        return OPENING

    @property
    def markers(self) -> tuple[str, ...]:
        return (OPENING, CLOSING, QUOTE)

    @property
    def signature(self) -> tuple[str, ...]:
        return (OPENING, QUOTE)

    @property
    def frames_answers(self) -> bool:
        return False

    def parser(self, tools: Sequence[Tool]) -> GemmaCallParser:
        return GemmaCallParser()


class GemmaCallParser(ProgramParser):
    """See GemmaCalls."""

    def __init__(self) -> None:
        super().__init__((OPENING, CLOSING, QUOTE))
        self._noted: list[str] = []

    def _run(self) -> Program[None]:
        yield from self._read_calls_in_text((OPENING,), self._read_call)

    def _read_call(self, opening: str) -> Program[None]:
        yield from self._expect("call:")
        name = yield from self._read_name(NAME)
        if (yield from self._next_char()) != "{":
            raise BrokenCallError
        self._noted.clear()
        written: list[str] = []
        while (mark := (yield from self._read_until((QUOTE, CLOSING), self._note))) == QUOTE:
            written.append(KEY.sub(_quoted_key, self._take_noted()))
            if not (yield from self._read_until((QUOTE,), self._note)):
                raise BrokenCallError
            written.append(json.dumps(self._take_noted(), ensure_ascii=False))
        if not mark:
            raise BrokenCallError
        written.append(KEY.sub(_quoted_key, self._take_noted()))
        arguments = "".join(written).strip()
        _check_object(arguments)
        self._start_call(name)
        self._tell_arguments(arguments)
        self._end_call()

    def _note(self, piece: str) -> None:
        self._noted.append(piece)

    def _take_noted(self) -> str:
        text = "".join(self._noted)
        self._noted.clear()
        return text


def _quoted_key(match: re.Match[str]) -> str:
    return match[0] if match[1] is None else f"{match[1]}{json.dumps(match[2].strip(), ensure_ascii=False)}:"


def _check_object(text: str) -> None:
    """Raises BrokenCallError if it is no JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenCallError from error
    if not isinstance(value, dict):
        raise BrokenCallError
