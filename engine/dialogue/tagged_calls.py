"""Calls that the model writes as tags, with a value for each parameter between two of them.

The arguments become JSON here, one parameter after the other as its value closes; the value of a parameter that is a string
by the tool's schema is told as it comes. What a value is (5 or "5") only the schema says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from engine.dialogue.program import BrokenCallError, Program, ProgramParser
from engine.dialogue.tools import Tool, parameter_schema, schema_types, value_text

NAME = re.compile(r'[^\s<>"]*')
KEY = re.compile(r'[^<>"\n]*')
STRING = frozenset(["string"])


@dataclass(frozen=True, slots=True)
class TaggedCalls:
    """A format of tags.

    opening, closing: around one call, or around all of them.
    name: what stands before and behind the name; an empty first part if that follows the opening.
    key: before and behind a parameter's name.
    value: before and behind its value.
    end: behind the last parameter; empty if the closing is all that there is.
    pad: white space that the model writes before and behind each value, and that is no part of it.
    begins_with_name: a call may begin without the opening.
    line: what stands between the parts.
    """

    opening: str
    closing: str
    name: tuple[str, str]
    key: tuple[str, str]
    value: tuple[str, str]
    end: str = ""
    pad: str = ""
    begins_with_name: bool = False
    line: str = "\n"

    @property
    def markers(self) -> tuple[str, ...]:
        return tuple(
            part for part in (self.opening, self.closing, *self.name, *self.key, *self.value, self.end) if len(part) > 2
        )

    @property
    def signature(self) -> tuple[str, ...]:
        return tuple(part for part in (self.opening, self.name[0], self.key[0]) if part)

    @property
    def frames_answers(self) -> bool:
        return False

    def parser(self, tools: Sequence[Tool]) -> TaggedCallParser:
        return TaggedCallParser(self, tools)


class TaggedCallParser(ProgramParser):
    """See TaggedCalls."""

    def __init__(self, form: TaggedCalls, tools: Sequence[Tool]) -> None:
        super().__init__(form.markers)
        self._form = form
        self._tools = {tool.name: tool for tool in tools}

    def _run(self) -> Program[None]:
        form = self._form
        openings = (form.opening, form.name[0]) if form.begins_with_name else (form.opening,)
        yield from self._read_calls_in_text(openings, self._read_calls)

    def _read_calls(self, opening: str) -> Program[None]:
        form = self._form
        if opening == form.opening:
            yield from self._skip_blank()
            yield from self._expect(form.name[0])
        while True:
            yield from self._read_call()
            yield from self._skip_blank()
            if form.closing and form.end and (yield from self._try_take(form.closing)):
                self._tell_markup()
                return
            # Some formats have several calls between one opening and one closing.
            if not (form.end and form.name[0] and (yield from self._try_take(form.name[0]))):
                return

    def _read_call(self) -> Program[None]:
        """Read from the name on to the end of the parameters."""
        form = self._form
        name = yield from self._read_name(NAME)
        yield from self._expect(form.name[1])
        yield from self._skip_blank()
        has_more = yield from self._try_take(form.key[0])
        if not has_more:
            yield from self._expect(form.end or form.closing)
        self._start_call(name)
        tool = self._tools.get(name)
        glue = "{"
        while has_more:
            key = yield from self._read_name(KEY)
            yield from self._expect(form.key[1])
            if form.value[0]:
                yield from self._skip_blank()
                yield from self._expect(form.value[0])
            self._tell_arguments(f"{glue}{json.dumps(key, ensure_ascii=False)}: ")
            schema = None if tool is None else parameter_schema(tool, key)
            # A parameter that no schema knows is told as it was written.
            types = STRING if tool is None or schema is None else schema_types(schema, tool.parameters)
            yield from self._read_value(types)
            glue = ", "
            yield from self._skip_blank()
            has_more = yield from self._try_take(form.key[0])
            if not has_more:
                yield from self._expect(form.end or form.closing)
        self._tell_arguments("{}" if glue == "{" else "}")
        self._end_call()

    def _read_value(self, types: frozenset[str]) -> Program[None]:
        """Read a value and tell it as JSON."""
        form = self._form
        if form.pad:
            yield from self._try_take(form.pad)
        ends = (form.pad + form.value[1], form.value[1]) if form.pad else (form.value[1],)
        if types == STRING:
            self._tell_arguments('"')
            if not (yield from self._read_until(ends, self._tell_string, keeps_end=False)):
                raise BrokenCallError
            self._tell_arguments('"')
        else:
            pieces: list[str] = []
            if not (yield from self._read_until(ends, pieces.append)):
                raise BrokenCallError
            self._tell_arguments(value_text("".join(pieces), types))

    def _tell_string(self, piece: str) -> None:
        self._tell_arguments(json.dumps(piece, ensure_ascii=False)[1:-1])
