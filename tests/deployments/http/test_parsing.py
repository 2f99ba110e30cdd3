"""What every body has in common: unknown parameters, null, numbers without a fraction, and how a body is encoded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

import pytest
from pydantic import Field

from deployments import openapi  # noqa: F401  imports every kind of body
from deployments.completions.requests import ChatCompletionBody, CompletionBody
from deployments.http.parsing import (
    MAX_FIELDS,
    MAX_IGNORED_NAMES,
    MAX_NAME_CHARS,
    UTF8_BOM,
    Body,
    Query,
    parse_query,
    parse_request,
    validated,
)
from deployments.responses.requests import ResponseBody
from engine.errors import RequestError
from tests.deployments.refusals import refusal


class Inner(Body):
    ignored = frozenset({"label"})

    level: int = 0


class Outer(Body):
    not_implemented: ClassVar[Mapping[str, tuple[Any, ...]]] = {"magic": (1,), "beams": (False,)}

    count: Annotated[int, Field(ge=1)] = 1
    share: float = 0.0
    counts: list[int] = Field(default=[])
    either: list[int] | str = ""
    inner: Inner | None = None
    listed: Annotated[list[Inner], Field(alias="list")] = Field(default=[])


def parse(data: dict[str, Any]) -> tuple[Outer, list[str]]:
    ignored: list[str] = []
    return parse_request(Outer, json.dumps(data).encode(), ignored)[0], ignored


def test_unknown_parameters_are_ignored_by_name_at_every_level_or_refused() -> None:
    data = {"count": 2, "x": [1], "inner": {"level": 3, "y": {}, "label": 1}, "list": [{}, {"z": 1}, {"z": 2, "y": 0}]}
    body, ignored = parse(data)
    assert body == Outer.model_validate({"count": 2, "inner": {"level": 3}, "list": [{}, {}, {}]})
    assert ignored == ["x", "inner.y", "list[1].z", "list[2].y"]  # the first of each kind
    assert refusal(lambda: validated(Outer, {"count": 2, "x": 1})) == ("x", "unknown_parameter")
    assert refusal(lambda: validated(Outer, {"list": [{}, {"z": 1}]})) == ("list[1].z", "unknown_parameter")


def test_what_is_not_implemented_is_refused_however_unknown_parameters_are_taken() -> None:
    assert refusal(lambda: parse({"magic": 2, "x": 1})) == ("magic", "unsupported_parameter")
    assert refusal(lambda: parse({"magic": True})) == ("magic", "unsupported_parameter")
    assert refusal(lambda: parse({"beams": 0})) == ("beams", "unsupported_parameter")
    assert parse({"beams": False}) == (Outer(), [])
    assert parse({"magic": 1.0}) == parse({"magic": None}) == (Outer(), [])


def test_null_is_absent_whatever_its_name_is() -> None:
    nothing = {"count": None, "inner": None, "x": None, "list": [{"level": None, "y": None, "label": None}]}
    assert validated(Outer, nothing) == validated(Outer, {"list": [{}]})
    assert parse(nothing) == (validated(Outer, {"list": [{}]}), [])


def test_the_names_are_few_and_short() -> None:
    _, ignored = parse({f"{number}" * 100: 1 for number in range(MAX_FIELDS)})
    assert len(ignored) == MAX_IGNORED_NAMES
    assert all(len(name) <= MAX_NAME_CHARS for name in ignored)


def test_numbers_without_a_fraction_are_integers_where_integers_are_meant() -> None:
    body = validated(Outer, {"count": 5.0, "share": 1.0, "counts": [1.0, 2], "either": [3.0], "inner": {"level": -0.0}})
    assert body == validated(Outer, {"count": 5, "share": 1, "counts": [1, 2], "either": [3], "inner": {"level": 0}})
    assert [type(number) for number in (body.count, body.share, *body.counts)] == [int, float, int, int]
    for wrong in (5.5, True, "5", 1e400, -1.0):
        assert refusal(lambda value=wrong: validated(Outer, {"count": value})) == ("count", "invalid_value")  # type: ignore[misc]


def kinds(kind: type[Body]) -> Iterator[type[Body]]:
    for one in kind.__subclasses__():
        yield one
        yield from kinds(one)


KINDS = {
    f"{kind.__module__}.{kind.__name__}": kind for kind in kinds(Body) if kind.__module__.startswith("deployments.")
}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_no_kind_of_body_falls_over_a_number_or_an_unknown_null(name: str) -> None:
    """Each parameter alone: 7.0 is taken like 7."""
    kind = KINDS[name]

    def outcome(data: dict[str, Any]) -> Any:
        try:
            return validated(kind, data)
        except RequestError as error:
            return type(error), error.param

    names = {field.alias or name for name, field in kind.model_fields.items()}
    assert all(outcome({name: 7}) == outcome({name: 7.0}) for name in names)
    assert outcome({"frobnicate": None}) == outcome({})


TOOL = {"type": "function", "name": "look", "parameters": {"type": "object"}}
CHAT_TOOL = {"type": "function", "function": {"name": "look"}}
DEEP_BODIES: dict[str, tuple[type[Body], dict[str, Any]]] = {
    "chat": (
        ChatCompletionBody,
        {
            "model": "m",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
                },
            ],
            "tools": [CHAT_TOOL],
            "tool_choice": CHAT_TOOL,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "form": (
        CompletionBody,
        {"model": "m", "prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
    ),
    "responses": (
        ResponseBody,
        {
            "model": "m",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "a"}]},
                {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "a"}]},
            ],
            "tools": [TOOL],
            "tool_choice": {"type": "function", "name": "look"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
            "reasoning": {"effort": "low"},
            "conversation": {"id": "conv_1"},
        },
    ),
}
NOT_LOOKED_INTO = {"parameters", "schema"}


def objects_in(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All objects that have names of the API, and where each of them is."""
    if isinstance(value, dict):
        yield path, value
        for name, inner in value.items():
            if name not in NOT_LOOKED_INTO:
                yield from objects_in(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from objects_in(inner, f"{path}[{index}]")


@pytest.mark.parametrize("name", DEEP_BODIES)
def test_unknown_parameters_anywhere_in_a_real_body(name: str) -> None:
    kind, data = DEEP_BODIES[name]
    plain = json.dumps(data)
    expected = parse_request(kind, plain.encode())[0]
    places = [path for path, _ in objects_in(data)]
    assert len(places) > 2
    for place in places:
        changed = json.loads(plain)
        dict(objects_in(changed))[place]["frobnicate"] = {"x": 1}
        unknown = f"{place}.frobnicate" if place else "frobnicate"
        ignored: list[str] = []
        assert parse_request(kind, json.dumps(changed).encode(), ignored)[0] == expected
        assert ignored == [unknown]
        assert refusal(lambda raw=changed: validated(kind, raw)) == (unknown, "unknown_parameter")  # type: ignore[misc]
        dict(objects_in(changed))[place]["frobnicate"] = None
        assert parse_request(kind, json.dumps(changed).encode())[0] == expected


def test_a_query_is_taken_like_a_body() -> None:
    class Some(Query):
        limit: Annotated[int, Field(ge=1)] = 20

    ignored: list[str] = []
    assert parse_query(Some, [("limit", "5"), ("api-version", "1")], ignored) == Some(limit=5)
    assert ignored == ["api-version"]
    assert refusal(lambda: parse_query(Some, [("api-version", "1")])) == ("api-version", "unknown_parameter")


def test_encodings() -> None:
    text = json.dumps({"either": "gr\u00fc\u00df"}, ensure_ascii=False)
    assert parse_request(Outer, UTF8_BOM + text.encode())[0].either == "gr\u00fc\u00df"
    for encoding in ("latin-1", "utf-16", "utf-32"):
        assert refusal(lambda name=encoding: parse_request(Outer, text.encode(name))) == (None, None)  # type: ignore[misc]
