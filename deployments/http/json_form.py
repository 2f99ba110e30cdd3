"""JSON that a client wants as its answer: a schema with a name, as several endpoints take it.

Knows no HTTP library, no engine and no Ray.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from deployments.http.parsing import Body
from engine.core.grammar import GrammarSpec


def _check_schema(schema: Any) -> Any:
    """One error instead of one for each type that it could be."""
    if not isinstance(schema, (dict, bool)):
        raise PydanticCustomError("invalid", "must be a JSON schema: an object, or true or false")
    return schema


Schema = Annotated[
    Any, BeforeValidator(_check_schema), WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "boolean"}]})
]


class JsonSchemaFormat(Body):
    """A schema with a name.

    strict: what of the schema cannot be enforced is an error; else it is left out.
    """

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")] = True
    strict: bool = False

    def grammar(self) -> GrammarSpec:
        """What the answer is held to. Raises InvalidParameterError."""
        return GrammarSpec.json_schema(self.schema_, is_lenient=not self.strict)
