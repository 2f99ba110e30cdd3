"""JSON schemas on their way to a grammar: what of them says which values are valid. Knows no library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Between the parts of a JSON text: nothing, a space, or a line break with its indentation. A model that knows no end to
# whitespace has to come to one.
JSON_WHITESPACE = r" |\n {0,16}|\n\t{1,8}"
# Keywords for readers, of which agents' schemas mostly consist.
NOTES = frozenset(("description", "title", "examples", "default", "$comment", "deprecated"))
# Those whose value is a schema, a list of schemas, or schemas by name.
ONE_SCHEMA = frozenset(("items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"))
SCHEMA_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems"))
NAMED_SCHEMAS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
# Those that are enforced. To JSON Schema a format is a note, so others ("password", "int32", "path") are left out.
FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))


def without_notes(schema: Any) -> Any:
    """A schema without what bars nothing: grammars are shorter then, and the library refuses some of it."""
    if not isinstance(schema, Mapping):
        return schema
    said = {}
    for keyword, value in schema.items():
        if _is_note(keyword, value):
            continue
        if keyword in ONE_SCHEMA:
            value = without_notes(value)
        elif keyword in SCHEMA_LISTS and isinstance(value, list):
            value = [without_notes(part) for part in value]
        elif keyword in NAMED_SCHEMAS and isinstance(value, Mapping):
            value = {name: without_notes(part) for name, part in value.items()}
        said[keyword] = value
    return said


def _is_note(keyword: str, value: Any) -> bool:
    if keyword == "format":
        return isinstance(value, str) and value not in FORMATS
    return keyword in NOTES or (keyword == "uniqueItems" and value is False)
