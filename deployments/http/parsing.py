"""From a body's bytes, or a query string, to a checked model, or to an error that names the parameter.

Nothing is accepted and then ignored silently: what is unknown is refused, or its name is told. Knows no endpoint.

    Body     strict, closed, immutable; null is the same as absent everywhere, and 5.0 is 5
    Query    the same for query strings, whose values come as text
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, ValidationInfo, model_validator
from pydantic.config import ExtraValues
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
# Of the unknown parameters of one request that are ignored.
MAX_IGNORED_NAMES = 16
UTF8_BOM = b"\xef\xbb\xbf"


class Body(BaseModel):
    """Strict, closed, immutable. Subclasses say which parameters they know and do not implement.

    not_implemented: what would change the answer, each with the values that ask for nothing.
    ignored: what changes no answer; docs/http_api.md says why.
    """

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
        integers = _fields_of(cls).integers
        return {
            name: _integral(value) if name in integers else value
            for name, value in data.items()
            if value is not None and name not in cls.not_implemented and name not in cls.ignored
        }

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
    return value is None or any(
        isinstance(value, bool) == isinstance(other, bool) and value == other for other in neutral
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """What has to be known of the fields of one kind of body.

    integers: those that hold integers, as clients call them. bodies: those that hold other bodies, and as what.
    """

    integers: frozenset[str]
    bodies: Mapping[str, str]


@cache
def _fields_of(kind: type[Body]) -> _Fields:
    integers, bodies = set(), {}
    for name, field in kind.model_fields.items():
        held, wire_name = tuple(_types_in(field.annotation)), field.alias or name
        if int in held and float not in held:
            integers.add(wire_name)
        if any(isinstance(one, type) and issubclass(one, Body) for one in held):
            bodies[name] = wire_name
    return _Fields(frozenset(integers), bodies)


def _types_in(annotation: Any) -> Iterator[Any]:
    """A type, or all that it is made of."""
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        inner = inner[:1]  # the others say what is right
    if not inner:
        yield annotation
    for one in inner:
        yield from _types_in(one)


def _integral(value: Any) -> Any:
    """A number without a fraction as an integer, also in lists: many clients have no other numbers than 5.0."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    return list(map(_integral, value)) if isinstance(value, list) else value


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


def parse_request(kind: type[BodyT], raw: bytes, ignored: list[str] | None = None) -> tuple[BodyT, dict[str, Any]]:
    """The request, and the plain data that it was made of.

    ignored: see validated. Raises RequestError for the first thing that is wrong.
    """
    if _num_parts(raw) > MAX_PARTS:
        raise InvalidParameterError(f"the body has more than {MAX_PARTS} lists, objects and fields")
    try:
        data = from_json(raw.removeprefix(UTF8_BOM), allow_inf_nan=False)
    except ValueError as error:
        raise MalformedBodyError(f"the body is not valid JSON in UTF-8: {error}") from None
    if not isinstance(data, dict):
        raise MalformedBodyError("the body must be a JSON object")
    return validated(kind, data, ignored), data


_ALL_BUT_MARKS = bytes(set(range(256)) - set(b'"[{:'))


def _num_parts(raw: bytes) -> int:
    """Count lists, objects and fields in a JSON text, outside of its strings.

    Not exact while they are few. Linear in the text, and makes no object of any of them.
    """
    if sum(map(raw.count, (b"[", b"{", b":"))) <= MAX_PARTS:
        return 0
    marks = raw.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _ALL_BUT_MARKS)
    return sum(map(len, marks.split(b'"')[::2]))  # every other piece is what a string holds


def validated(kind: type[BodyT], data: dict[str, Any], ignored: list[str] | None = None) -> BodyT:
    """The checked model. Raises RequestError for the first thing that is wrong.

    ignored: gets the names of unknown parameters, MAX_IGNORED_NAMES at most; None = they are refused.
    """
    try:
        body = _made(kind, data, None if ignored is None else "allow")
    except ValidationError as error:
        raise _request_error(error.errors(include_url=False, include_input=False)[0]) from None
    if ignored is not None:
        named: dict[tuple[str, ...], tuple[str | int, ...]] = {}  # one of each kind: a list may have thousands of them
        for path in _take_unknown(body, ()):
            if len(named) < MAX_IGNORED_NAMES:
                named.setdefault(tuple(step for step in path if isinstance(step, str)), path)
        ignored.extend(map(_path_name, named.values()))
    return body


def validated_within(kind: type[BodyT], value: Any, info: ValidationInfo) -> BodyT:
    """A body in another one, whose validator chose its kind: unknown parameters are taken as in the whole."""
    return _made(kind, value, info.context)


def _made(kind: type[BodyT], value: Any, extra: ExtraValues | None) -> BodyT:
    """extra: what is done with unknown parameters at all levels; None = refused."""
    return kind.model_validate(value, extra=extra, context=extra)


def _take_unknown(body: Body, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """Takes what no field has out of a body and those in it, and gives the path of each."""
    if unknown := body.__pydantic_extra__:
        yield from ((*path, name) for name in list(unknown))
        unknown.clear()
    for name, wire_name in _fields_of(type(body)).bodies.items():
        held = getattr(body, name)
        if isinstance(held, Body):
            yield from _take_unknown(held, (*path, wire_name))
        elif isinstance(held, list | tuple):
            for index, one in enumerate(held):
                if isinstance(one, Body):
                    yield from _take_unknown(one, (*path, wire_name, index))


def _request_error(error: ErrorDetails) -> RequestError:
    inner = error.get("ctx", {}).get("param")
    param = _path_name((*error["loc"], *(() if inner is None else (inner,))))
    reason = _REASONS.get(error["type"], error["msg"])
    kind = _KINDS.get(error["type"], InvalidParameterError)
    return kind(f"{param}: {reason}" if param else reason, param or None)


def _path_name(path: Iterable[str | int]) -> str:
    """As in messages[0].content."""
    name = ""
    for step in path:
        part = str(step)[:MAX_NAME_CHARS]
        name += f"[{part}]" if isinstance(step, int) else f".{part}" if name else part
    return name


def parse_query(kind: type[BodyT], pairs: Iterable[tuple[str, str]], ignored: list[str] | None = None) -> BodyT:
    """The checked model. Raises RequestError for the first thing that is wrong.

    ignored: see validated.
    """
    data: dict[str, Any] = {}
    repeated = None
    for name, value in pairs:
        repeated = name if name in data else repeated
        data[name] = value
    query = validated(kind, data, ignored)
    if repeated is not None:
        raise InvalidParameterError(f"{repeated}: given twice", repeated)
    return query
