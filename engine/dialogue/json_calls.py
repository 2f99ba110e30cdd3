"""Calls whose arguments the model writes as a JSON object: between markers, or as the whole answer.

The text of the arguments is passed on as it was generated, character by character. A call's name is told when its arguments
begin; if the object has its arguments before its name, or as a string, they are told at once when both are known.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.dialogue.brackets import JSON_BRACKETS
from engine.dialogue.program import BrokenCallError, Program, ProgramParser
from engine.dialogue.tools import Tool

ARGUMENT_KEYS = ("arguments", "parameters")
# What an answer that is a call as a whole may have besides; anything else is an answer in JSON.
BARE_KEYS = frozenset(["name", "type", "id", *ARGUMENT_KEYS])
SCALAR = re.compile(r"[-+.\w]*")
# Between a marker and the arguments: a name, an id, further markers.
MAX_HEAD_CHARS = 512


class JsonCallParser(ProgramParser):
    """The part that these formats share: one object that is a call.

    names: of the tools that may be called; None = any name will do.
    keys: that such an object may have; None = any.
    """

    def __init__(
        self, markers: Sequence[str], names: Collection[str] | None = None, keys: Collection[str] | None = None
    ) -> None:
        super().__init__(markers)
        self._names = names
        self._keys = keys
        self._has_arguments = False  # of the call that is being read, all of them are told

    def _read_call(self) -> Program[None]:
        """Read {"name": .., "arguments": ..} and tell it; what is wrong behind the arguments does not count."""
        try:
            yield from self._read_call_object()
        except BrokenCallError:
            if not self._has_arguments:
                raise
        self._end_call()
        yield from self._skip_blank()

    def _read_call_object(self) -> Program[None]:
        """Read the object, its keys in any order and others between them, and tell the call but for its end."""
        name: str | None = None
        arguments: str | None = None
        self._has_arguments = False
        yield from self._expect("{")
        while True:
            yield from self._skip_blank()
            key = yield from self._read_string()
            if self._keys is not None and key not in self._keys:
                raise BrokenCallError
            yield from self._skip_blank()
            yield from self._expect(":")
            yield from self._skip_blank()
            if key == "name" and name is None:
                name = yield from self._read_string()
                if not name or (self._names is not None and name not in self._names):
                    raise BrokenCallError
                if arguments is not None:
                    self._tell_call(name, arguments)
            elif key in ARGUMENT_KEYS and arguments is None:
                char = yield from self._next_char()
                if name is not None and char == "{":
                    arguments = ""
                    yield from self._stream_call(name)
                else:
                    arguments = yield from self._read_arguments(char)
                    if name is not None:
                        self._tell_call(name, arguments)
            else:
                yield from self._read_value()
            yield from self._skip_blank()
            if (yield from self._try_take("}")):
                break
            yield from self._expect(",")
        if name is None:
            raise BrokenCallError
        if arguments is None:
            self._tell_call(name, "{}")

    def _stream_call(self, name: str, call_id: str = "") -> Program[None]:
        """Tell a call whose arguments come next, as they come."""
        self._has_arguments = False
        self._start_call(name, call_id)
        yield from self._read_brackets(JSON_BRACKETS, self._tell_arguments)
        self._has_arguments = True

    def _tell_call(self, name: str, arguments: str) -> None:
        self._start_call(name)
        self._tell_arguments(arguments)
        self._has_arguments = True

    def _read_arguments(self, char: str) -> Program[str]:
        """The text of arguments that are told later: an object, a string that is one, or nothing."""
        if char == '"':
            return (yield from self._read_string())
        if char == "{":
            return (yield from self._read_value())
        yield from self._expect("null")
        return "{}"

    def _read_value(self) -> Program[str]:
        """The text of any JSON value."""
        num_before = len(self._pending)
        char = yield from self._next_char()
        if char and char in "{[":
            yield from self._read_brackets(JSON_BRACKETS, lambda piece: None)
        elif char == '"':
            yield from self._read_string()
        else:
            yield from self._read_name(SCALAR)
        return "".join(self._pending[num_before:])

    def _read_head(self, pattern: re.Pattern[str]) -> Program[re.Match[str]]:
        """What stands before the arguments if the name is not among them."""
        while True:
            end = self._text.find("{", self._at, self._at + MAX_HEAD_CHARS)
            match = pattern.fullmatch(self._text, self._at, end) if end >= 0 else None
            if match is not None:
                self._take(end - self._at)
                return match
            if end >= 0 or self._unread >= MAX_HEAD_CHARS or self._is_final:
                raise BrokenCallError
            yield


@dataclass(frozen=True, slots=True)
class MarkedJson:
    """A format of JSON objects between markers.

    opening, closing: around each call, or around a list of them.
    is_list: whether the model writes a list.
    """

    opening: str
    closing: str = ""
    is_list: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        return tuple(marker for marker in (self.opening, self.closing) if marker)

    @property
    def signature(self) -> tuple[str, ...]:
        return (self.opening,)

    @property
    def frames_answers(self) -> bool:
        return False

    def parser(self, tools: Sequence[Tool]) -> MarkedJsonParser:
        return MarkedJsonParser(self)


class MarkedJsonParser(JsonCallParser):
    """See MarkedJson; it takes lists and single objects alike."""

    def __init__(self, form: MarkedJson) -> None:
        super().__init__(form.markers)
        self._form = form

    def _run(self) -> Program[None]:
        yield from self._read_calls_in_text((self._form.opening,), self._read_calls)

    def _read_calls(self, opening: str) -> Program[None]:
        yield from self._skip_blank()
        if (yield from self._try_take("[")):
            yield from self._skip_blank()
            yield from self._read_call()
            while (yield from self._try_take(",")):
                yield from self._skip_blank()
                yield from self._read_call()
            yield from self._expect("]")
            yield from self._skip_blank()
        else:
            yield from self._read_call()
        if self._form.closing and (yield from self._try_take(self._form.closing)):
            self._tell_markup()


@dataclass(frozen=True, slots=True)
class NamedJson:
    """A format in which the name stands before the arguments, between markers.

    opening, closing: around one call.
    head: what stands between the opening and the arguments; its group `name` is the name, its group `id` the call's id.
    head_text: the same as a text to write; {name} stands for the name, {index} for a number that the model chooses.
    tail: between the arguments and the closing.
    section: around all calls.
    separator: between two calls.
    head_markers: the markers within `head`.
    takes_objects: what follows the opening may be objects with the name in them, too.
    is_list: the model writes a list of such objects.
    """

    opening: str
    closing: str
    head: str
    head_text: str
    tail: str = ""
    section: tuple[str, str] = ("", "")
    separator: str = ""
    head_markers: tuple[str, ...] = ()
    takes_objects: bool = False
    is_list: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        return tuple(marker for marker in (*self.section, self.opening, self.closing, *self.head_markers) if marker)

    @property
    def signature(self) -> tuple[str, ...]:
        return (self.opening,) if self.is_list else (self.opening, *self.head_markers[:1])

    @property
    def frames_answers(self) -> bool:
        return False

    def parser(self, tools: Sequence[Tool]) -> NamedJsonParser:
        return NamedJsonParser(self)


class NamedJsonParser(MarkedJsonParser):
    """See NamedJson."""

    def __init__(self, form: NamedJson) -> None:
        super().__init__(MarkedJson(form.opening, form.closing))
        self._markers = frozenset(form.markers)
        self._named = form
        self._head = re.compile(form.head)

    def _run(self) -> Program[None]:
        openings = tuple(marker for marker in (self._named.section[0], self._named.opening) if marker)
        yield from self._read_calls_in_text(openings, self._read_calls)

    def _read_calls(self, opening: str) -> Program[None]:
        form = self._named
        if opening != form.opening:
            yield from self._skip_blank()
            yield from self._expect(form.opening)
        if form.takes_objects:
            yield from self._skip_blank()
            if (yield from self._next_char()) in ("[", "{"):
                yield from super()._read_calls(opening)
                return
        match = yield from self._read_head(self._head)
        yield from self._stream_call(match["name"], match.groupdict().get("id") or "")
        yield from self._skip_blank()
        if form.tail and (yield from self._try_take(form.tail.strip())):
            yield from self._skip_blank()
        if form.closing:
            yield from self._try_take(form.closing)
        self._end_call()
        yield from self._skip_blank()
        if form.section[1] and (yield from self._try_take(form.section[1])):
            self._tell_markup()


@dataclass(frozen=True, slots=True)
class BareJson:
    """A format in which the whole answer is one call, or several with a semicolon between.

    opening: a token that may stand before it.
    """

    opening: str
    arguments_key: str = "parameters"

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.opening,)

    @property
    def signature(self) -> tuple[str, ...]:
        return ()

    @property
    def frames_answers(self) -> bool:
        return False

    def parser(self, tools: Sequence[Tool]) -> BareJsonParser:
        return BareJsonParser(self, tools)


class BareJsonParser(JsonCallParser):
    """See BareJson. An answer in JSON that names none of the tools is text like any other.

    tools: without any, each name will do.
    """

    def __init__(self, form: BareJson, tools: Sequence[Tool]) -> None:
        super().__init__(form.markers, {tool.name for tool in tools} or None, BARE_KEYS)
        self._form = form

    def _run(self) -> Program[None]:
        try:
            yield from self._skip_blank()
            yield from self._try_take(self._form.opening)
            yield from self._skip_blank()
            while (yield from self._next_char()) == "{":
                yield from self._read_call()
                if not (yield from self._try_take(";")):
                    break
                yield from self._skip_blank()
        except BrokenCallError:
            self._break_off()
        yield from self._read_rest()
