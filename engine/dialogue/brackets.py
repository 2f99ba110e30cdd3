"""Finds the end of a value in brackets in a text that comes in pieces. Knows strings and escapes."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Brackets:
    """A notation: its pairs of brackets, and the characters that begin and end strings."""

    pairs: dict[str, str]
    quotes: str

    @property
    def plain(self) -> re.Pattern[str]:
        """What stands between the characters that matter."""
        return re.compile(f"[^{re.escape(''.join((*self.pairs, *self.pairs.values(), self.quotes)))}]*")


JSON_BRACKETS = Brackets({"{": "}", "[": "]"}, '"')
PYTHON_BRACKETS = Brackets({"{": "}", "[": "]", "(": ")"}, "\"'")
PLAIN = {brackets.quotes: brackets.plain for brackets in (JSON_BRACKETS, PYTHON_BRACKETS)}
IN_STRING = {quote: re.compile(rf"[^\\{quote}]*") for quote in "\"'"}


def run_end(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where the characters end that `pattern` takes from `at` on; `at` itself if it takes none."""
    match = pattern.match(text, at)
    return at if match is None else match.end()


class BracketScanner:
    """Reads one value from its opening bracket on.

    is_closed: the value is complete. is_broken: a bracket closes what it did not open; the value has no end.
    """

    def __init__(self, brackets: Brackets) -> None:
        self._brackets = brackets
        self._plain = PLAIN[brackets.quotes]
        self._closers: list[str] = []
        self._quote = ""
        self._is_escaped = False
        self.is_closed = False
        self.is_broken = False

    def scan(self, text: str, start: int) -> int:
        """Go on with `text` from `start`: up to where it belongs to the value, at most to its end."""
        at = start
        while at < len(text) and not (self.is_closed or self.is_broken):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
            elif self._quote:
                at = run_end(IN_STRING[self._quote], text, at)
                if at < len(text):
                    self._is_escaped = text[at] == "\\"
                    self._quote = self._quote if self._is_escaped else ""
                    at += 1
            else:
                at = run_end(self._plain, text, at)
                if at < len(text):
                    at += self._take_bracket(text[at])
        return at

    def _take_bracket(self, char: str) -> int:
        """How many characters it takes: none if the bracket breaks the value."""
        if char in self._brackets.quotes:
            self._quote = char
        elif char in self._brackets.pairs:
            self._closers.append(self._brackets.pairs[char])
        elif self._closers and char == self._closers[-1]:
            self._closers.pop()
            self.is_closed = not self._closers
        else:
            self.is_broken = True
            return 0
        return 1
