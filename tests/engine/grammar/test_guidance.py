"""llguidance behind our seam: its masks against brute force, with tokenizers of every kind; what it refuses, and how."""

from __future__ import annotations

import json
import random
import re
from contextlib import suppress

import pytest

from engine.core.grammar import MAX_GRAMMAR_CHARS, GrammarSpec
from engine.dialogue.forced_calls import call_grammar
from engine.dialogue.formats import CALL_FORMATS
from engine.dialogue.tools import Tool, ToolChoice
from engine.errors import InvalidParameterError
from engine.grammar.guidance import GuidanceCompiler
from engine.grammar.interface import Vocabulary
from tests.engine.grammar.spelled import (
    PADDING,
    after,
    allowed,
    allowed_bytes,
    bytes_vocabulary,
    compiler,
    matcher,
    matches,
    vocabulary,
)
from tests.engine.text.trained_tokenizers import KINDS

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": GrammarSpec.json_schema(PERSON),
    "object": GrammarSpec.json_object(),
    "regex": GrammarSpec("regex", r"[a-z]{2,5}(, \w+)*\."),
    "choice": GrammarSpec.choice(["my cat", "my dog", "the cat", "é", '"quoted"\n']),
    "lark": GrammarSpec("lark", 'start: "<call>" %json {"type": "object"} "</call>"'),
    "gbnf": GrammarSpec("gbnf", 'root ::= "a" ("b" | [0-9])+ "z"'),
    "behind a text": GrammarSpec.json_schema(PERSON, begins_behind="</think>"),
    "behind a token": GrammarSpec("regex", "[a-z]{3}", begins_behind="<|im_start|>"),
}


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_what_trying_each_token_finds(kind, grammar):
    """Random walks; at each place every token of the vocabulary is tried by itself."""
    words, rng = vocabulary(kind), random.Random(f"{kind} {grammar}")
    if kind == "unigram" and grammar in ("schema", "object", "lark"):  # which learned no brace and knows no bytes
        with pytest.raises(InvalidParameterError, match="none that this model's tokens can spell"):
            matcher(GRAMMARS[grammar], kind)
        return
    num_ids, num_checked = len(words.token_bytes), 0
    for _ in range(2):
        state = matcher(GRAMMARS[grammar], kind)
        for _ in range(12):
            ids = allowed(state, num_ids)
            assert state.error is None
            is_stopped = state._inner.is_stopped()  # then it takes nothing, and leaves the end to us
            tried = [i for i in range(num_ids) if state._inner.validate_tokens([i]) == 1]
            tried = list(words.eos_ids) if is_stopped else tried
            assert ids == tried
            num_checked += 1
            # Specials are allowed only if they end the answer, or are what the grammar begins behind.
            may_come = set(words.eos_ids)
            may_come |= {i for i in words.special_ids if words.token_bytes[i] == b"<|im_start|>"}
            assert words.special_ids.intersection(ids) <= may_come
            assert max(ids) < num_ids - PADDING
            chosen = rng.choice([i for i in ids if i not in words.eos_ids] or ids)
            state.accept(chosen)
            if chosen in words.eos_ids:
                break
    assert num_checked > 2


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_a_copy_that_is_brought_up_to_date_allows_what_the_original_does(grammar):
    """Suspension, another replica, a restart: the tokens so far are replayed."""
    words, rng = vocabulary("byte_level"), random.Random(grammar)
    num_ids, tokens = len(words.token_bytes), []
    state = matcher(GRAMMARS[grammar], "byte_level")
    for _ in range(25):
        ids = allowed(state, num_ids)
        replayed = after(matcher(GRAMMARS[grammar], "byte_level"), tokens)
        assert allowed(replayed, num_ids) == ids
        tokens.append(rng.choice(ids))
        if tokens[-1] in words.eos_ids:
            break
        state.accept(tokens[-1])


def test_an_answer_may_end_when_it_is_complete_and_not_before():
    ends = {b"<eos>", b"<end>"}
    spec = GrammarSpec.json_schema(PERSON)
    text = '{"name": "Mia", "age": 3}'
    for length in range(len(text)):
        assert not ends & allowed_bytes(spec, text[:length])
    assert allowed_bytes(spec, text) == ends
    assert allowed_bytes(GrammarSpec("regex", "a+"), "aa") == {b"a", *ends}


@pytest.mark.parametrize(
    ("spec", "complete", "wrong"),
    [
        (GrammarSpec.json_object(), ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1", '"a"', "{", ""]),
        (GrammarSpec.json_schema(True), ["1", '"a"', "[]"], ["", "a"]),
        (GrammarSpec.choice(["yes", "no", "nothing"]), ["yes", "no", "nothing"], ["", "noth", "yesno", "Yes"]),
        (GrammarSpec("regex", r"^\d\d/\w[\d.-]$"), ["12/a-", "12/a1"], ["1٣/a1", "12/é1", "12/a1 ", " 12/a1"]),
        (GrammarSpec("lark", 'start: A+\nA: "x" | /y/'), ["x", "yx"], ["", "xz"]),
        (GrammarSpec("gbnf", 'root ::= "a" b\nb ::= [0-9]+'), ["a1", "a12"], ["a", "1"]),
        (GrammarSpec.choice(["yes"], "</it>"), ["</it>yes", "hm</it>\n\nyes"], ["yes", "</it>\n\n\nyes"]),
        (GrammarSpec.choice(["yes"], "END"), ["ENDyes", "EEN\nENDyes", "é END yes"], ["yes", "END END yes"]),
    ],
    ids=str,
)
def test_what_each_kind_matches(spec, complete, wrong):
    assert [text for text in complete if not matches(spec, text)] == []
    assert [text for text in wrong if matches(spec, text)] == []


def test_a_special_token_that_a_grammar_begins_behind_is_that_token_and_not_its_text():
    words, spec = bytes_vocabulary(), GrammarSpec.choice(["yes"], begins_behind="</think>")
    marker = words.token_bytes.index(b"</think>")
    state = after(matcher(spec), b"hm</think>")
    assert {b"y", b"\n"} - allowed_bytes(spec, "hm") == set()
    assert marker in allowed(state, len(words.token_bytes))  # the text alone was only said
    state.accept(marker)
    assert {words.token_bytes[i] for i in allowed(state, len(words.token_bytes))} == {
        b"y",
        b"yes",
        b" ",
        b"\n",
        b"\n\n",
    }


def test_whitespace_comes_to_an_end():
    """A model that likes nothing better can be held up only for so long at each place."""
    spec = GrammarSpec.json_schema(PERSON)
    for blank in (" ", "\n", "\t"):
        text = "{"
        while blank.encode() in allowed_bytes(spec, text):
            text += blank
        assert len(text) <= 3
    text = "{\n"
    while b" " in allowed_bytes(spec, text):
        text += " "
    assert len(text) == 18
    assert b"\n" not in allowed_bytes(spec, text)
    assert matches(spec, json.dumps({"name": "a", "age": 1}, indent=4))
    assert matches(spec, '{"name":"a","age":1}')


def test_a_client_cannot_switch_on_endless_whitespace():
    spec = GrammarSpec.json_schema({**PERSON, "x-guidance": {"whitespace_pattern": "[ ]+", "lenient": True}})
    assert b" " not in allowed_bytes(spec, "{ ")
    with pytest.raises(InvalidParameterError, match="not"):
        compiler().compile(GrammarSpec.json_schema({"not": {"type": "string"}, "x-guidance": {"lenient": True}}))


def test_no_special_token_within_a_string():
    words = bytes_vocabulary()
    state = after(matcher(GrammarSpec.json_object()), b'{"a": "')
    assert not words.special_ids & set(allowed(state, len(words.token_bytes)))
    assert b"<" in allowed_bytes(GrammarSpec.json_object(), '{"a": "')


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (GrammarSpec.json_schema({"not": {}}), 'Unimplemented keys: ["not"]'),
        (GrammarSpec.json_schema({"type": "array", "uniqueItems": True}), 'Unimplemented keys: ["uniqueItems"]'),
        (GrammarSpec.json_schema({"type": "foo"}), "Invalid type: foo"),
        (GrammarSpec.json_schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (GrammarSpec.json_schema({"$ref": "http://example.com/x"}), "is not present in a registry"),
        (GrammarSpec.json_schema({"$ref": "#/$defs/missing"}), "missing"),
        (GrammarSpec.json_schema({"$ref": "#"}), "no answer matches it"),
        (GrammarSpec.json_schema(False), "Unsatisfiable schema"),
        (GrammarSpec.json_schema([]), "a JSON schema must be an object"),
        (GrammarSpec.json_schema("text"), "a JSON schema must be an object"),
        (GrammarSpec("json_schema", '{"type":'), "it is not JSON"),
        (GrammarSpec("json_schema", "[" * 50_000), "it is not JSON"),
        (GrammarSpec("json_schema", '{"not":' * 900 + "{}" + "}" * 900), "recursion limit exceeded"),
        (GrammarSpec.json_schema({"properties": [1], "format": ["x"], "anyOf": {}}), "properties must be an object"),
        (GrammarSpec("choice", '["a", 1]'), "a choice must be a JSON list"),
        (GrammarSpec("choice", '{"a": 1}'), "a choice must be a JSON list"),
        (GrammarSpec("regex", "("), "unclosed group"),
        (GrammarSpec("regex", "(?<=a)b"), "look-around"),
        (GrammarSpec("regex", "\\bb"), "lookarounds not supported"),
        (GrammarSpec("lark", "start: foo"), 'unknown name: "foo"'),
        (GrammarSpec("lark", 'start: "a" )'), "expecting"),
        (GrammarSpec("gbnf", "root ::= ("), "Expected ')'"),
        (GrammarSpec("gbnf", 'x ::= "a"'), "No 'root' rule"),
        (GrammarSpec("gbnf", "root ::= " + "(" * 9000), "maximum recursion depth"),
        (GrammarSpec("lark", "start: " + "(" * 9000 + '"a"' + ")" * 9000), "too deeply nested"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_enforced_is_refused_with_the_reason(spec, reason):
    with pytest.raises(InvalidParameterError, match=re.escape(reason)) as caught:
        compiler().compile(spec)
    assert caught.value.param == "grammar"
    assert caught.value.message.startswith("the grammar cannot be used: ")
    assert len(caught.value.message) > len("the grammar cannot be used: ")
    assert len(caught.value.message) < 400
    assert "\n" not in caught.value.message  # no picture of a grammar that the client never wrote


def test_a_grammar_that_is_too_large_is_refused_or_quick():
    """Nothing that fits the limit of characters takes long: its work is counted."""
    properties = {f"property{i}": {"type": "string"} for i in range(4000)}
    for spec in (
        GrammarSpec.json_schema({"type": "object", "properties": properties}),
        GrammarSpec.json_schema({"enum": [f"value {i}" for i in range(9000)]}),
        GrammarSpec("regex", "((a{1,1000}){1,1000}){1,1000}"),
        GrammarSpec("regex", "(a|b)*a(a|b){500}"),
        GrammarSpec("lark", "start: " + " | ".join(f'"choice {i}"' for i in range(8000))),
    ):
        with suppress(InvalidParameterError):
            assert allowed(matcher(spec), len(bytes_vocabulary().token_bytes))


def test_an_answer_that_grows_too_complex_has_an_error_and_may_say_anything():
    """The mask is never empty: sampling from nothing has no result."""
    state, rng = matcher(GrammarSpec("regex", "(a|b)*a(a|b){20}")), random.Random(0)
    num_ids = len(bytes_vocabulary().token_bytes)
    for _ in range(100_000):
        ids = [i for i in allowed(state, num_ids) if i < 256]
        if state.error is not None:
            break
        state.accept(rng.choice(ids))
    assert state.error is not None
    assert "too many states" in state.error
    assert len(allowed(state, num_ids)) >= num_ids
    state.accept(5)
    assert "too many states" in state.error


def test_a_token_that_is_not_allowed_is_an_error():
    state = after(matcher(GrammarSpec.choice(["yes"])), b"x")
    assert state.error is not None
    assert "doesn't satisfy the grammar" in state.error


def test_behind_the_end_of_an_answer_nothing_happens():
    """A step may be under way behind the one that ended it."""
    state = after(matcher(GrammarSpec.choice(["yes"])), (*b"yes", 256, 7, 256))
    assert state.error is None
    assert allowed(state, len(bytes_vocabulary().token_bytes))
    assert state.error is None


def test_a_model_without_an_end_token_takes_no_grammar():
    words = Vocabulary(tuple(bytes([byte]) for byte in range(256)), frozenset(), ())
    with pytest.raises(InvalidParameterError, match="no token that ends an answer"):
        GuidanceCompiler(words).compile(GrammarSpec.json_object())


def test_a_vocabulary_that_cannot_say_it_has_an_error_in_time():
    words = Vocabulary((b"y", b"e", b"n", b"<eos>"), frozenset({3}), (3,))
    state = GuidanceCompiler(words).compile(GrammarSpec.choice(["yes"])).matcher()
    after(state, (0, 1))
    assert allowed(state, 4) == list(range(32))
    assert state.error is not None
    with pytest.raises(InvalidParameterError, match="no answer matches it"):
        GuidanceCompiler(words).compile(GrammarSpec.choice(["xes"]))


# -- what is wrong in form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: GrammarSpec("xml", "x"), "kind must be one of"),
        (lambda: GrammarSpec("regex", "a" * (MAX_GRAMMAR_CHARS + 1)), "must have at most"),
        (lambda: GrammarSpec("regex"), "needs a text"),
        (lambda: GrammarSpec("json_object", "{}"), "takes no text"),
        (lambda: GrammarSpec("regex", "a\ud800"), "half a surrogate pair"),
        (lambda: GrammarSpec("regex", "a", begins_behind="\ud800"), "half a surrogate pair"),
        (lambda: GrammarSpec("regex", "a", begins_behind="x" * 300), "at most 256"),
        (lambda: GrammarSpec.choice([]), "at least one string"),
        (lambda: GrammarSpec.choice(["a", ""]), "no empty one"),
        (lambda: GrammarSpec.json_schema({"const": float("nan")}), "cannot be written as JSON"),
        (lambda: GrammarSpec.json_schema({"const": {1, 2}}), "cannot be written as JSON"),
    ],
)
def test_wrong_forms(make, reason):
    with pytest.raises(InvalidParameterError, match=reason) as caught:
        make()
    assert caught.value.param == "grammar"
    assert len(caught.value.message) < 400


def test_what_a_schema_only_notes_is_no_reason_to_refuse_it():
    note = {"type": "string", "format": "password", "maxLength": 9}
    schema = {
        "type": "object",
        "properties": {
            "format": note,  # a property of that name
            "list": {"type": "array", "items": {"anyOf": [note, {"$ref": "#/$defs/x"}]}, "uniqueItems": False},
            "const": {"const": {"format": "path"}},
            "date": {"type": "string", "format": "date"},
        },
        "required": ["format", "list", "const", "date"],
        "$defs": {"x": {"type": "integer", "format": "int32"}},
    }
    spec = GrammarSpec.json_schema(schema)
    assert matches(spec, '{"format": "a", "list": ["b", 3, "b"], "const": {"format": "path"}, "date": "2026-11-26"}')
    assert not matches(spec, '{"format": "a", "list": [], "const": {"format": "path"}, "date": "26.11.2026"}')
    assert not matches(
        spec, '{"format": "too long by far", "list": [], "const": {"format": "path"}, "date": "2026-11-26"}'
    )
    with pytest.raises(InvalidParameterError, match="uniqueItems"):
        compiler().compile(GrammarSpec.json_schema({"type": "array", "items": {"type": "array", "uniqueItems": True}}))


def test_properties_come_in_the_order_of_the_schema():
    schema = {"type": "object", "properties": {"z": {"type": "null"}, "a": {"type": "null"}}, "required": ["a", "z"]}
    spec = GrammarSpec.json_schema(schema)
    assert matches(spec, '{"z": null, "a": null}')
    assert not matches(spec, '{"a": null, "z": null}')


# Without those that think within frames of special tokens.
CALL_FORMS = [form for forms in CALL_FORMATS.values() for form in forms if not form.frames_answers]


@pytest.mark.parametrize("form", CALL_FORMS, ids=lambda form: type(form).__name__)
def test_grammars_of_forced_calls_are_taken_as_they_are(form):
    """What engine/dialogue writes is a grammar of kind lark, also behind thinking."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    grammar = call_grammar(form, [Tool("find", parameters=parameters, strict=True)], ToolChoice("required"))
    assert allowed_bytes(GrammarSpec("lark", grammar.text))
    assert b"x" in allowed_bytes(GrammarSpec("lark", grammar.text, "</thought>"), "hm, ")
    assert b"x" not in allowed_bytes(GrammarSpec("lark", grammar.text, "</thought>"), "hm, </thought>")
