"""The public test suite of JSON Schema: what is accepted as a schema is enforced.

What is refused, and what is held to more strictly than JSON Schema would, is listed here, so that another version of the
library shows.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from engine.core.grammar import GrammarSpec
from engine.errors import InvalidParameterError
from tests.engine.grammar.spelled import compiler, matches

SUITE = json.loads((Path(__file__).parents[2] / "data" / "json_schema_test_suite.json").read_text())
# How many of the suite's schemas are refused, by what they test.
REFUSED = {
    "additionalProperties": 2,
    "allOf": 2,
    "anyOf": 1,
    "boolean_schema": 1,
    "contains": 7,
    "defs": 1,
    "dependentRequired": 4,
    "dependentSchemas": 4,
    "dynamicRef": 2,
    "enum": 1,
    "if-then-else": 12,
    "maxContains": 5,
    "maxItems": 1,
    "maxLength": 1,
    "maxProperties": 1,
    "minContains": 8,
    "minItems": 1,
    "minLength": 1,
    "minProperties": 1,
    "multipleOf": 1,
    "not": 9,
    "oneOf": 9,
    "patternProperties": 3,
    "propertyNames": 6,
    "ref": 6,
    "refRemote": 2,
    "unevaluatedItems": 2,
    "unevaluatedProperties": 2,
    "uniqueItems": 3,
}
# Valid answers that are not allowed: keys in another order than the schema's, other spellings of a number, and formats, which
# JSON Schema only notes down.
STRICTER = {
    ("allOf", "allOf"),
    ("allOf", "valid"),
    ("const", "float -2.0 is valid"),
    ("const", "float is valid"),
    ("const", "float one is valid"),
    ("const", "float zero is valid"),
    ("const", "same object with different property order is valid"),
    ("enum", "[0.0] is valid"),
    ("enum", "[1.0] is valid"),
    ("enum", "float one is valid"),
    ("enum", "float zero is valid"),
    ("format", "invalid date string is only an annotation by default"),
    ("format", "invalid date-time string is only an annotation by default"),
    ("format", "invalid duration string is only an annotation by default"),
    ("format", "invalid email string is only an annotation by default"),
    ("format", "invalid hostname string is only an annotation by default"),
    ("format", "invalid ipv4 string is only an annotation by default"),
    ("format", "invalid ipv6 string is only an annotation by default"),
    ("format", "invalid time string is only an annotation by default"),
    ("format", "invalid uri string is only an annotation by default"),
    ("format", "invalid uuid string is only an annotation by default"),
    ("type", "a float with zero fractional part is an integer"),
    ("vocabulary", "no validation: invalid number, but it still validates"),
}


def test_what_is_accepted_is_enforced_and_what_is_refused_is_listed():
    refused: Counter[str] = Counter()
    stricter = set()
    num_right = 0
    for group in SUITE:
        spec = GrammarSpec.json_schema(group["schema"])
        try:
            compiler().compile(spec)
        except InvalidParameterError:
            refused[group["keyword"]] += 1
            continue
        for description, instance, is_valid in group["tests"]:
            spellings = [json.dumps(instance, separators=separators) for separators in ((",", ":"), (", ", ": "))]
            spellings.append(json.dumps(instance, ensure_ascii=False))
            is_allowed = any(matches(spec, text) for text in spellings)
            assert is_valid or not is_allowed, (group["schema"], description, instance)
            if is_valid and not is_allowed:
                stricter.add((group["keyword"], description))
            num_right += is_valid == is_allowed
    assert dict(refused) == REFUSED
    assert stricter == STRICTER
    assert num_right > 500
