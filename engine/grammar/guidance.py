"""Grammars by llguidance: every kind is turned into its Lark syntax, and matched token by token.

Its habits that this file allows for: it raises nothing, a matcher has an error instead; a matcher in use by two threads
raises; it would force the tokenizer's own tokens for what can be said in one way only (`no_forcing`), which makes a mask
depend on more than the text so far.
"""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import gbnf_to_lark

from engine.core.grammar import GrammarSpec
from engine.errors import InvalidParameterError
from engine.grammar.interface import Vocabulary
from engine.grammar.json_schema import JSON_WHITESPACE, without_notes
from engine.grammar.lark import escaped, quoted

# Counts, not times: what is refused does not depend on the machine. A mask takes at most some milliseconds with them. What
# compiling costs they do not bound: trial.py does.
LIMITS = llguidance.LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# In expressions, \d, \w and \s are those of ASCII: a model that may choose among all the world's digits does.
ASCII_CLASSES = "dws"
# The library's words for a mask in which no token is allowed.
NOTHING_CAN_FOLLOW = "NoExtension"
MAX_REASON_CHARS = 300
NO_FORCING = "%llguidance " + json.dumps({"no_forcing": True}) + "\n"
# The library's mark of a special token. No text in UTF-8 has this byte.
SPECIAL = b"\xff"


class GuidanceCompiler:
    """Compiles grammars for one vocabulary. Thread-safe."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Takes tenths of a second for 100,000 tokens. Raises InvalidParameterError if no token ends an answer."""
        if not vocabulary.eos_ids:
            raise InvalidParameterError(
                "this model has no token that ends an answer, and without one an answer cannot follow a grammar",
                param="grammar",
            )
        self._vocabulary = vocabulary
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(vocabulary)), eos_token=list(vocabulary.eos_ids)
        )

    def compile(self, spec: GrammarSpec) -> GuidanceGrammar:
        """Raises InvalidParameterError, as GrammarCompiler.compile."""
        try:
            grammar = self._grammar(spec)
        except RecursionError:
            raise _refusal("it is nested too deeply") from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise _refusal(_reason(matcher.get_error()))
        matcher.compute_bitmask()  # the first one takes long; what it found out, copies know too
        if matcher.is_error():
            raise _refusal("no answer matches it, or none that this model's tokens can spell")
        return GuidanceGrammar(matcher, frozenset(self._vocabulary.eos_ids))

    def close(self) -> None:
        """There is nothing outside this process."""

    def _grammar(self, spec: GrammarSpec) -> str:
        body = NO_FORCING + _lark(spec)
        grammars: list[dict[str, str]] = [{"lark_grammar": body}]
        if spec.begins_behind:
            head = "start: before gap @body\ngap: /[ \\n]{0,2}/\n" + self._before(spec.begins_behind)
            grammars = [{"lark_grammar": head}, {"name": "body", "lark_grammar": body}]
        if spec.form is not None:
            grammars.append({"name": "form", "lark_grammar": NO_FORCING + _lark(spec.form)})
        return json.dumps({"grammars": grammars})

    def _before(self, marker: str) -> str:
        """The rule of what comes before the grammar, `marker` included."""
        data = marker.encode()
        for token_id in self._vocabulary.special_ids:
            if self._vocabulary.token_bytes[token_id] == data:
                return f"before: any <[{token_id}]>\nany: /(?s:.)*/"
        return "before[lazy]: /(?s:.)*/ " + quoted(marker)


class GuidanceGrammar:
    """A matcher that has done its first work, to be copied. Thread-safe."""

    def __init__(self, prototype: llguidance.LLMatcher, eos_ids: frozenset[int]) -> None:
        self._prototype = prototype
        self._eos_ids = eos_ids
        self._lock = threading.Lock()

    def matcher(self) -> GuidanceMatcher:
        with self._lock:
            inner = self._prototype.deep_copy()
        return GuidanceMatcher(inner, self._eos_ids)


class GuidanceMatcher:
    """See interface.Matcher."""

    def __init__(self, inner: llguidance.LLMatcher, eos_ids: frozenset[int]) -> None:
        self._inner = inner
        self._eos_ids = eos_ids
        self._is_ended = False
        self.error: str | None = None

    def fill(self, mask: np.ndarray) -> None:
        """See interface.Matcher. `mask` is contiguous."""
        if self.error is None:
            self._inner.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if self._inner.is_error():
                self.error = _reason(self._inner.get_error())
        if self.error is not None:
            mask[:] = 0xFF

    def accept(self, token_id: int) -> None:
        """See interface.Matcher."""
        if self._is_ended or self.error is not None:
            return
        if token_id in self._eos_ids:
            self._is_ended = True
        elif not self._inner.consume_token(token_id):
            self.error = _reason(self._inner.get_error())

    def copy(self) -> GuidanceMatcher:
        """See interface.Matcher."""
        other = GuidanceMatcher(self._inner.deep_copy(), self._eos_ids)
        other._is_ended, other.error = self._is_ended, self.error
        return other


class _Tokens:
    """A vocabulary as the library reads it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        special_ids = vocabulary.special_ids | set(vocabulary.eos_ids)
        self.eos_token_id = vocabulary.eos_ids[0]
        self.bos_token_id = None
        self.special_token_ids = sorted(special_ids)
        self.tokens = [
            SPECIAL + data if token_id in special_ids else data.removeprefix(SPECIAL)
            for token_id, data in enumerate(vocabulary.token_bytes)
        ]

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("nothing is tokenised here: see no_forcing")


def _lark(spec: GrammarSpec) -> str:
    """The grammar in llguidance's Lark syntax. Raises InvalidParameterError."""
    if spec.kind in ("json_schema", "lenient_json_schema", "json_object"):
        schema = {"type": "object"} if spec.kind == "json_object" else _read_json(spec.text)
        schema = {} if schema is True else {"enum": []} if schema is False else schema
        if not isinstance(schema, dict):
            raise _refusal(f"a JSON schema must be an object, got {json.dumps(schema)[:40]}")
        options = {"whitespace_pattern": JSON_WHITESPACE, "lenient": spec.kind == "lenient_json_schema"}
        return "start: %json " + json.dumps({**without_notes(schema), "x-guidance": options})
    if spec.kind == "choice":
        choices = _read_json(spec.text)
        if not isinstance(choices, list) or not choices or not all(isinstance(text, str) and text for text in choices):
            raise _refusal("a choice must be a JSON list of strings that are not empty")
        return "start: " + " | ".join(quoted(text) for text in choices)
    if spec.kind == "regex":
        text = f"/{llguidance.regex_to_lark(spec.text, ASCII_CLASSES)}/"
        bars = "".join(f" & ~/{escaped(beginning)}(?s:.)*/" for beginning in spec.never_begins)
        return f"start: TEXT\nTEXT: {text}{bars}" if bars else f"start: {text}"
    if spec.kind == "gbnf":
        try:
            return gbnf_to_lark(spec.text)
        except Exception as error:  # plain Exception among others, and RecursionError
            raise _refusal(str(error)) from error
    return spec.text


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal(f"it is not JSON: {error}") from error


def _refusal(reason: str) -> InvalidParameterError:
    return InvalidParameterError(f"the grammar cannot be used: {reason[:MAX_REASON_CHARS]}", param="grammar")


def _reason(error: str) -> str:
    """The library's words without what repeats the grammar, which only confuses: the client never saw it as Lark."""
    lines = error.split("<non-verbose/>")[0].strip().splitlines()
    if error.startswith(NOTHING_CAN_FOLLOW):
        return "no token of the model can come next"
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    first = lines[0] if lines else ""
    first = re.sub(r"^at \d+\(\d+\): ", "", first).removeprefix("failed to compile JSON schema: ")
    return told or first
