"""The form that an answer is to have, as plain data: it pickles, compares and is a key of caches.

Says nothing of how it is enforced; engine/grammar does that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidParameterError

KINDS = ("json_schema", "lenient_json_schema", "json_object", "regex", "choice", "lark", "gbnf")
# Bounds the work before it is done, together with the limits of engine/grammar/trial.py.
MAX_GRAMMAR_CHARS = 1 << 17
MAX_BEGINS_BEHIND_CHARS = 256
MAX_BEGINNINGS = 256


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What every complete answer has to match, from its first character to its last.

    kind: one of KINDS.
    text: the schema as JSON (json_schema; lenient_json_schema leaves out what cannot be enforced), nothing (json_object: any
        JSON object), the expression (regex), a JSON list of strings (choice), or the grammar's text (lark, gbnf); at most
        MAX_GRAMMAR_CHARS characters.
    begins_behind: a text or a special token, such as the end of the model's thinking, up to which anything may be said. The
        grammar holds for what follows it, after at most two line breaks or spaces. Empty = from the start.
    form: what `@form` stands for in the text of a lark grammar; None = nothing.
    never_begins: texts of a regex do not begin with any of these, at most MAX_BEGINNINGS.

    Raises InvalidParameterError with param "grammar" for what is wrong in form; only compiling it shows the rest.
    """

    kind: str
    text: str = ""
    begins_behind: str = ""
    form: GrammarSpec | None = None
    never_begins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def check(ok: bool, message: str) -> None:
            if not ok:
                raise InvalidParameterError(message, param="grammar")

        check(self.kind in KINDS, f"a grammar's kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        check(
            len(self.text) <= MAX_GRAMMAR_CHARS,
            f"a grammar must have at most {MAX_GRAMMAR_CHARS} characters, got {len(self.text)}; simplify it",
        )
        check(
            len(self.begins_behind) <= MAX_BEGINS_BEHIND_CHARS,
            f"the text that a grammar begins behind must have at most {MAX_BEGINS_BEHIND_CHARS} characters, got "
            f"{len(self.begins_behind)}",
        )
        check(
            _is_unicode(self.text) and _is_unicode(self.begins_behind),
            "a grammar must be valid Unicode, but this one has half a surrogate pair",
        )
        check(
            (self.kind == "json_object") == (not self.text),
            f"a grammar of kind {self.kind!r} " + ("takes no text" if self.text else "needs a text"),
        )
        check(self.form is None or self.kind == "lark", "only a lark grammar can refer to a form")
        check(len(self.never_begins) <= MAX_BEGINNINGS, f"at most {MAX_BEGINNINGS} beginnings can be excluded")

    @property
    def is_json(self) -> bool:
        """Whether what matches is JSON."""
        return self.kind in ("json_schema", "lenient_json_schema", "json_object")

    @property
    def num_chars(self) -> int:
        """The length of its text, that of its form included."""
        return len(self.text) + (0 if self.form is None else self.form.num_chars)

    @classmethod
    def json_schema(cls, schema: Any, begins_behind: str = "", *, is_lenient: bool = False) -> GrammarSpec:
        """JSON that is valid under `schema`, a JSON schema as parsed JSON; its properties come in the order of the schema.

        is_lenient: what of it cannot be enforced is left out; else it is refused when it is compiled.

        Raises InvalidParameterError for what cannot be written as JSON.
        """
        return cls("lenient_json_schema" if is_lenient else "json_schema", _to_json(schema), begins_behind)

    @classmethod
    def json_object(cls, begins_behind: str = "") -> GrammarSpec:
        """Any JSON object."""
        return cls("json_object", "", begins_behind)

    @classmethod
    def choice(cls, strings: Sequence[str], begins_behind: str = "") -> GrammarSpec:
        """One of these strings; at least one, and none of them empty."""
        if not strings or not all(isinstance(string, str) and string for string in strings):
            raise InvalidParameterError("a choice needs at least one string, and no empty one", param="grammar")
        return cls("choice", _to_json(list(strings)), begins_behind)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _to_json(value: Any) -> str:
    """As short as it gets; keys stay in their order, in which a schema's properties are generated."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameterError(f"the schema cannot be written as JSON: {error}", param="grammar") from error
