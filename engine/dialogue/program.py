"""A parser written as a program: it reads the answer from its beginning on, and waits for more text.

Every character that is read is `pending` until an event takes it as its source: so none is lost, and none is told twice. Text
that is pending when a call turns out to be none becomes content. What is unread stays short (an end that can still become a
marker), so the time is linear in the answer, however it is cut.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from functools import cache
from typing import TypeVar

from engine.dialogue.brackets import Brackets, BracketScanner, run_end
from engine.dialogue.events import Arguments, CallCut, CallEnd, CallStart, Event, Markup, Text, merge_events

T = TypeVar("T")
# What a part of a parser's program is: it yields to wait for more text, and returns what it read.
Program = Generator[None, None, T]

BLANK = " \t\r\n"
BLANKS = re.compile(r"[ \t\r\n]*")
# Names of tools and of their parameters; longer ones are none.
MAX_NAME_CHARS = 256
STRING_PIECE = re.compile(r'[^"\\]*')


class BrokenCallError(Exception):
    """What is being read is no call, or goes on no further; raised and caught within parsers only."""


@cache
def _any_of(literals: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(literal) for literal in sorted(literals, key=len, reverse=True)))


class ProgramParser(ABC):
    """The part that all parsers share: see Parser. `_run` is the program.

    markers: the texts that mean something to it, which have to reach it even if they are special tokens.
    """

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = frozenset(markers)
        self._text = ""
        self._at = 0
        self._is_final = False
        self._pending: list[str] = []
        self._events: list[Event] = []
        self._num_calls = 0
        self._is_call_open = False
        self._program = self._run()

    def feed(self, text: str) -> list[Event]:
        """See Parser.feed."""
        self._text, self._at = self._text[self._at :] + text, 0
        return self._go_on()

    def finish(self, end_token: str = "") -> list[Event]:
        """See Parser.finish."""
        self._is_final = True
        return self.feed(end_token if end_token in self._markers else "")

    def _go_on(self) -> list[Event]:
        next(self._program, None)
        events, self._events = self._events, []
        return merge_events(events)

    @abstractmethod
    def _run(self) -> Program[None]:
        """Read the whole answer."""

    # Reading. Each takes what it reads from the unread text and makes it pending.

    @property
    def _unread(self) -> int:
        return len(self._text) - self._at

    def _take(self, num_chars: int) -> str:
        piece = self._text[self._at : self._at + num_chars]
        self._at += len(piece)
        if piece:
            self._pending.append(piece)
        return piece

    def _next_char(self) -> Program[str]:
        """The next character, left unread; empty at the end of the answer."""
        while not self._unread and not self._is_final:
            yield
        return self._text[self._at : self._at + 1]

    def _skip_blank(self) -> Program[None]:
        while True:
            self._take(run_end(BLANKS, self._text, self._at) - self._at)
            if self._unread or self._is_final:
                return
            yield

    def _try_take(self, literal: str) -> Program[bool]:
        """Whether the answer goes on with `literal`; then it is read."""
        while True:
            if self._text.startswith(literal, self._at):
                self._take(len(literal))
                return True
            if self._is_final or not literal.startswith(self._text[self._at : self._at + len(literal)]):
                return False
            yield

    def _expect(self, literal: str) -> Program[None]:
        """Read `literal`. Raises BrokenCallError if something else stands there."""
        if not (yield from self._try_take(literal)):
            raise BrokenCallError

    def _read_name(self, pattern: re.Pattern[str]) -> Program[str]:
        """The characters, one at least, that `pattern` matches: up to one that it does not, which must come."""
        while True:
            end = run_end(pattern, self._text, self._at)
            if end - self._at > MAX_NAME_CHARS:
                raise BrokenCallError
            if end < len(self._text):
                if end == self._at:
                    raise BrokenCallError
                return self._take(end - self._at)
            if self._is_final:
                raise BrokenCallError
            yield

    def _read_until(
        self, literals: tuple[str, ...], on_piece: Callable[[str], None], *, keeps_end: bool = True
    ) -> Program[str]:
        """Read up to the first of `literals` and read that; empty at the end of the answer.

        on_piece: called with each piece before it, after which that is read.
        keeps_end: an end of the answer that is the beginning of a literal is a piece like any other.
        """
        pattern = _any_of(literals)
        longest = max(map(len, literals))
        while True:
            found = pattern.search(self._text, self._at)
            end = found.start() if found else len(self._text) - self._num_open(literals, longest)
            if piece := self._take(end - self._at):
                on_piece(piece)
            if found:
                return self._take(found.end() - self._at)
            if self._is_final:
                if (piece := self._take(self._unread)) and keeps_end:
                    on_piece(piece)
                return ""
            yield

    def _num_open(self, literals: tuple[str, ...], longest: int) -> int:
        """How many characters at the end of the text can be the beginning of one of `literals`."""
        for num_chars in range(min(longest - 1, self._unread), 0, -1):
            end = self._text[-num_chars:]
            if any(literal.startswith(end) for literal in literals):
                return num_chars
        return 0

    def _read_brackets(self, brackets: Brackets, on_piece: Callable[[str], None]) -> Program[None]:
        """Read a value in brackets, piece by piece. Raises BrokenCallError if it has no end."""
        scanner = BracketScanner(brackets)
        while True:
            if piece := self._take(scanner.scan(self._text, self._at) - self._at):
                on_piece(piece)
            if scanner.is_closed:
                return
            if scanner.is_broken or self._is_final:
                raise BrokenCallError
            yield

    def _read_string(self) -> Program[str]:
        """A JSON string: what it stands for. Raises BrokenCallError if it is none."""
        yield from self._expect('"')
        pieces = ['"']
        while True:
            piece = self._take(run_end(STRING_PIECE, self._text, self._at) - self._at)
            pieces.append(piece)
            num_needed = 2 if (yield from self._next_char()) == "\\" else 1
            while self._unread < num_needed:
                if self._is_final:
                    raise BrokenCallError
                yield
            if num_needed == 1 and self._text[self._at] not in '"\\':
                continue
            pieces.append(self._take(num_needed))
            if num_needed == 1:
                break
        try:
            value: str = json.loads("".join(pieces), strict=False)
            value.encode()  # half a surrogate pair can be sent to no client
        except ValueError as error:
            raise BrokenCallError from error
        return value

    # Telling. Each makes an event of what is pending.

    def _flush(self) -> str:
        source = "".join(self._pending)
        self._pending.clear()
        return source

    def _tell_text(self) -> None:
        if source := self._flush():
            self._events.append(Text(source))

    def _tell_markup(self) -> None:
        if source := self._flush():
            self._events.append(Markup(source))

    def _start_call(self, name: str, call_id: str = "") -> None:
        self._events.append(CallStart(self._num_calls, name, call_id, self._flush()))
        self._is_call_open = True

    def _tell_arguments(self, text: str) -> None:
        self._events.append(Arguments(self._num_calls, text, self._flush()))

    def _end_call(self) -> None:
        self._events.append(CallEnd(self._num_calls, self._flush()))
        self._close_call()

    def _close_call(self) -> None:
        self._num_calls += 1
        self._is_call_open = False

    def _break_off(self) -> None:
        """What was read is no call: text if nothing of it was told, else the end of that call."""
        if self._is_call_open:
            self._events.append(CallCut(self._num_calls, self._flush()))
            self._close_call()
        else:
            self._tell_text()

    # The frame of most formats: text, in which markers begin calls.

    def _read_calls_in_text(
        self, openings: tuple[str, ...], read_calls: Callable[[str], Program[None]]
    ) -> Program[None]:
        """Read to the end of the answer. `read_calls` reads what follows one of `openings`.

        White space before a call and behind the last one is markup, anywhere else it is text.
        """
        while True:
            opening = yield from self._read_until(openings, self._take_text)
            if not opening:
                break
            try:
                yield from read_calls(opening)
            except BrokenCallError:
                self._break_off()
        self._end_text()

    def _read_rest(self) -> Program[None]:
        """Read to the end of an answer in which no further call can begin."""
        while True:
            if piece := self._take(self._unread):
                self._take_text(piece)
            if self._is_final:
                break
            yield
        self._end_text()

    def _end_text(self) -> None:
        if self._num_calls:
            self._tell_markup()
        else:
            self._tell_text()

    def _take_text(self, piece: str) -> None:
        """Tell what is pending as text, but for the white space at its end."""
        end = len(piece.rstrip(BLANK))
        if end:
            self._pending[-1] = piece[:end]
            self._tell_text()
            if end < len(piece):
                self._pending.append(piece[end:])


class PlainParser(ProgramParser):
    """For models and requests without tools: everything is text."""

    def __init__(self) -> None:
        super().__init__(())

    def _run(self) -> Program[None]:
        while True:
            self._take(self._unread)
            self._tell_text()
            if self._is_final:
                return
            yield
