"""From a body's bytes, or a query string, to a checked model, or to an error that names the parameter.

Nothing is accepted and then ignored silently. Knows no endpoint.

    Body     strict, closed, immutable; null is the same as absent everywhere
    Query    the same for query strings, whose values come as text
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, from_json

from deployments.errors import (
    ExclusiveParametersError,
    MalformedBodyError,
    MissingParameterError,
    UnknownParameterError,
    UnsupportedParameterError,
)
from engine.errors import InvalidParameterError, RequestError

# Bounds on what a body is made of: each part becomes an object of some hundred bytes, and most parts have one byte or two.
MAX_PARTS = 100_000  # lists, objects and fields in a whole body
MAX_FIELDS = 128  # of one object: each unknown one would become an error
MAX_NAME_CHARS = 64


class Body(BaseModel):
    """Strict, closed, immutable. Subclasses say which parameters they know and do not implement."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    not_implemented: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _sort_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise PydanticCustomError("invalid", f"must have at most {MAX_FIELDS} fields")
        for name, neutral in cls.not_implemented.items():
            if not _is_neutral(data.get(name), neutral):
                passing = "".join(f" or {value!r}" for value in neutral)
                raise PydanticCustomError(
                    "unsupported_parameter",
                    f"not supported; omit it (null{passing} is accepted)",
                    {"param": name},
                )
        known_none = {name for name, value in data.items() if value is None and name in cls._names()}
        return {
            name: value
            for name, value in data.items()
            if name not in cls.not_implemented and name not in cls.ignored and name not in known_none
        }

    @classmethod
    def _names(cls) -> frozenset[str]:
        """The fields as clients call them."""
        return frozenset(field.alias or name for name, field in cls.model_fields.items())

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """For the served document: what _sort_out lets pass, besides the fields."""
        schema = handler(core_schema)
        whole = handler.resolve_ref_schema(schema)
        fields = whole.get("properties", {})
        known: dict[str, Any] = {
            name: field
            if name in whole.get("required", ()) or {"type": "null"} in field.get("anyOf", ())
            else _or_null(field)
            for name, field in fields.items()
        }
        for name, neutral in cls.not_implemented.items():
            known[name] = {"enum": [None, *neutral], "description": "not supported; these values ask for nothing"}
        for name in sorted(cls.ignored):
            known[name] = {"description": "ignored"}
        whole["properties"] = known
        return schema


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    default = {"default": field["default"]} if "default" in field else {}
    return {"anyOf": [{name: value for name, value in field.items() if name != "default"}, {"type": "null"}], **default}


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    # True == 1, but {"n": true} is a mistake.
    return value is None or any(type(value) is type(other) and value == other for other in neutral)


class Query(Body):
    """Query parameters; their values come as text."""

    model_config = ConfigDict(strict=False)


BodyT = TypeVar("BodyT", bound=Body)
# By pydantic's error types, and those of our own validators; what is not here is an InvalidParameterError.
_KINDS: Mapping[str, type[RequestError]] = {
    "missing": MissingParameterError,
    "extra_forbidden": UnknownParameterError,
    "mutually_exclusive_parameters": ExclusiveParametersError,
    "unsupported_parameter": UnsupportedParameterError,
}
_REASONS = {"extra_forbidden": "unknown parameter", "model_type": "must be an object"}


def parse_request(kind: type[BodyT], raw: bytes) -> tuple[BodyT, dict[str, Any]]:
    """The request, and the plain data that it was made of.

    Raises RequestError for the first thing that is wrong.
    """
    if _num_parts(raw) > MAX_PARTS:
        raise InvalidParameterError(f"the body has more than {MAX_PARTS} lists, objects and fields")
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise MalformedBodyError(f"the body is not valid JSON in UTF-8: {error}") from None
    if not isinstance(data, dict):
        raise MalformedBodyError("the body must be a JSON object")
    return validated(kind, data), data


_ALL_BUT_MARKS = bytes(set(range(256)) - set(b'"[{:'))


def _num_parts(raw: bytes) -> int:
    """Count lists, objects and fields in a JSON text, outside of its strings.

    Not exact while they are few. Linear in the text, and makes no object of any of them.
    """
    if sum(map(raw.count, (b"[", b"{", b":"))) <= MAX_PARTS:
        return 0
    marks = raw.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _ALL_BUT_MARKS)
    return sum(map(len, marks.split(b'"')[::2]))  # every other piece is what a string holds


def validated(kind: type[BodyT], data: dict[str, Any]) -> BodyT:
    """The checked model. Raises RequestError for the first thing that is wrong."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _request_error(error.errors(include_url=False, include_input=False)[0]) from None


def _request_error(error: ErrorDetails) -> RequestError:
    inner = error.get("ctx", {}).get("param")
    param = ""
    for step in (*error["loc"], *(() if inner is None else (inner,))):
        name = str(step)[:MAX_NAME_CHARS]
        param += f"[{name}]" if isinstance(step, int) else f".{name}" if param else name
    reason = _REASONS.get(error["type"], error["msg"])
    kind = _KINDS.get(error["type"], InvalidParameterError)
    return kind(f"{param}: {reason}" if param else reason, param or None)


def parse_query(kind: type[BodyT], pairs: Iterable[tuple[str, str]]) -> BodyT:
    """The checked model. Raises RequestError for the first thing that is wrong."""
    data: dict[str, Any] = {}
    repeated = None
    for name, value in pairs:
        repeated = name if name in data else repeated
        data[name] = value
    query = validated(kind, data)
    if repeated is not None:
        raise InvalidParameterError(f"{repeated}: given twice", repeated)
    return query
