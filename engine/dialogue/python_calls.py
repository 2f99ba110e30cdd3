"""Calls that the model writes as a Python list, [f(a='x', b=1), g()], told once it is complete."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.dialogue.brackets import PYTHON_BRACKETS
from engine.dialogue.program import BrokenCallError, Program, ProgramParser
from engine.dialogue.tools import Tool

# JSON's words, which models mix in.
JSON_WORDS = {"true": True, "false": False, "null": None}
ESCAPE = re.compile(r"\\(.)", re.DOTALL)
# Python warns of other characters behind a backslash.
ESCAPABLE = frozenset("\n\\'\"abfnrtvx01234567uUN")
# Names of tools are no Python: they may have hyphens, or be one of its words.
NAME = re.compile(r"[\w.-]+")
CALL = re.compile(r"\s*([\w.-]+)\s*\((.*)\)\s*", re.DOTALL)
SEPARATORS = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[\[({})\],]""", re.DOTALL)


@dataclass(frozen=True, slots=True)
class PythonCalls:
    """A format of Python calls.

    opening, closing: around the list; empty if the whole answer is the list.
    """

    opening: str = ""
    closing: str = ""

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.opening, self.closing) if self.opening else ()

    @property
    def signature(self) -> tuple[str, ...]:
        return self.markers

    @property
    def frames_answers(self) -> bool:
        return False

    def parser(self, tools: Sequence[Tool]) -> PythonCallParser:
        return PythonCallParser(self, tools)


class PythonCallParser(ProgramParser):
    """See PythonCalls. Without markers, a list that names other things than tools is text.

    tools: without any, each name will do.
    """

    def __init__(self, form: PythonCalls, tools: Sequence[Tool]) -> None:
        super().__init__(form.markers)
        self._form = form
        self._names = {tool.name for tool in tools}

    def _run(self) -> Program[None]:
        if self._form.opening:
            yield from self._read_calls_in_text((self._form.opening,), self._read_calls)
            return
        try:
            yield from self._skip_blank()
            if (yield from self._next_char()) == "[":
                yield from self._read_calls("")
        except BrokenCallError:
            self._break_off()
        yield from self._read_rest()

    def _read_calls(self, opening: str) -> Program[None]:
        yield from self._skip_blank()
        if (yield from self._next_char()) != "[":
            raise BrokenCallError
        num_before = len(self._pending)
        yield from self._read_brackets(PYTHON_BRACKETS, lambda piece: None)
        calls = _parse_calls("".join(self._pending[num_before:]))
        if not opening and self._names and not all(name in self._names for name, _ in calls):
            raise BrokenCallError
        for name, arguments in calls:
            self._start_call(name)
            self._tell_arguments(arguments)
            self._end_call()
        yield from self._skip_blank()
        if self._form.closing and (yield from self._try_take(self._form.closing)):
            self._tell_markup()


def _parse_calls(text: str) -> list[tuple[str, str]]:
    """(name, arguments as JSON) of each call in a list of them. Raises BrokenCallError if it is none."""
    try:
        calls = [_parse_call(part) for part in _split(text[1:-1])]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BrokenCallError from error
    if not calls:
        raise BrokenCallError
    return calls


def _split(text: str) -> list[str]:
    """The parts between commas outside of brackets and strings; the last one if it is not blank."""
    parts: list[str] = []
    start = depth = 0
    for match in SEPARATORS.finditer(text):
        mark = match[0]
        if mark in "([{":
            depth += 1
        elif mark in ")]}":
            depth -= 1
        elif mark == "," and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]] if text[start:].strip() else parts


def _known_escape(match: re.Match[str]) -> str:
    """An escape as Python knows it.

    A backslash before any other character stands for itself, but JSON escapes slashes.
    """
    if match[1] in ESCAPABLE:
        return match[0]
    return match[1] if match[1] == "/" else "\\" + match[0]


def _parse_call(text: str) -> tuple[str, str]:
    match = CALL.fullmatch(text)
    if match is None:
        raise BrokenCallError
    arguments: dict[str, Any] = {}
    for part in _split(match[2]):
        key, sign, value = part.partition("=")
        if not NAME.fullmatch(key.strip()) or not sign or key.strip() in arguments:
            raise BrokenCallError
        arguments[key.strip()] = _value(ast.parse(ESCAPE.sub(_known_escape, value.strip()), mode="eval").body)
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    written.encode()  # half a surrogate pair can be sent to no client
    return match[1], written


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(str(value)):
            # JSON writes characters beyond U+FFFF as two escapes.
            return value.encode("utf-16", "surrogatepass").decode("utf-16")
        case ast.Constant(value) if value is None or isinstance(value, int | float):
            return value
        case ast.Name(name) if name in JSON_WORDS:
            return JSON_WORDS[name]
        case ast.UnaryOp(ast.USub(), ast.Constant(value)) if isinstance(value, int | float):
            return -value
        case ast.List(elements) | ast.Tuple(elements):
            return [_value(element) for element in elements]
        case ast.Dict(keys, values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
    raise BrokenCallError


def _key(node: ast.expr | None) -> str:
    key = None if node is None else _value(node)
    if not isinstance(key, str):
        raise BrokenCallError
    return key
