"""Random JSON schemas of all that is enforced, so bounded that an answer of a model that says anything comes to an end."""

from __future__ import annotations

import random
from typing import Any

WORDS = ("a", "name", "in stock", "größe", 'x"y', "back\\slash", "naïve", "0", "an_id")


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """An object at the top, as clients have it."""
    schema = _object(rng, depth)
    if rng.random() < 0.2:
        schema["$defs"] = {"shared": _any(rng, 1)}
        for name in list(schema["properties"])[:2]:
            schema["properties"][name] = {"$ref": "#/$defs/shared"}
    return schema


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    leaves = [_string, _string, _integer, _number, _constant, _of_simple_type]
    makers = leaves + ([_object, _object, _array, _alternatives, _nullable] if depth > 0 else [])
    return rng.choice(makers)(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }
    if rng.random() < 0.1:
        schema = {"type": "object", "additionalProperties": _any(rng, 0), "maxProperties": 3, "properties": {}}
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    schema: dict[str, Any] = {
        "type": "array",
        "items": _any(rng, depth),
        "minItems": least,
        "maxItems": least + rng.randint(0, 2),
    }
    if rng.random() < 0.2:
        schema = {"type": "array", "prefixItems": [_any(rng, 0), _any(rng, 0)], "items": False, "minItems": 2}
    return schema


def _string(rng: random.Random, _: int) -> dict[str, Any]:
    least = rng.randint(0, 3)
    return rng.choice(
        [
            {"type": "string", "maxLength": 6},
            {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)},
            {"type": "string", "enum": rng.sample(WORDS, 3)},
            {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"},
            {"type": "string", "pattern": "^(\\d\\d:)?\\w{1,3}$"},
            {"type": "string", "format": rng.choice(["date", "ipv4", "uuid"])},
        ]
    )


def _integer(rng: random.Random, _: int) -> dict[str, Any]:
    least = rng.randint(-200, 200)
    return rng.choice(
        [
            {"type": "integer", "minimum": least, "maximum": least + rng.choice([0, 3, 977])},
            {"type": "integer", "exclusiveMinimum": least, "maximum": least + 50_000},
            {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 5},
        ]
    )


def _number(rng: random.Random, _: int) -> dict[str, Any]:
    least = rng.uniform(-5, 5)
    return rng.choice(
        [{"type": "number", "minimum": least, "maximum": least + 7.5}, {"type": "number", "exclusiveMaximum": 2.5}]
    )


def _constant(rng: random.Random, _: int) -> dict[str, Any]:
    values = [None, True, 0, -1.5, "x", [], {"a": [1, "b"]}, rng.choice(WORDS)]
    return {"const": rng.choice(values)} if rng.random() < 0.5 else {"enum": rng.sample(values, 3)}


def _of_simple_type(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"]])}


def _alternatives(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"anyOf": [_any(rng, depth), _any(rng, 0)]}
    kinds = [
        {
            "type": "object",
            "properties": {"kind": {"const": name}, "value": _any(rng, 0)},
            "required": ["kind", "value"],
            "additionalProperties": False,
        }
        for name in ("cat", "dog")
    ]
    return {"oneOf": kinds}


def _nullable(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth), {"type": "null"}]}
