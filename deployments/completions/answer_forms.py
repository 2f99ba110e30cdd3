"""The form that a client wants its answer to have: `response_format`, and vLLM's `structured_outputs`.

As plain models, and as the grammar that the engine holds the answer to. Knows no HTTP library, no engine and no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.http.generation_body import GenerationBody
from deployments.http.json_form import JsonSchemaFormat, Schema
from deployments.http.parsing import Body
from engine.core.grammar import GrammarSpec
from engine.errors import InvalidParameterError

MAX_CHOICES = 1024


class ResponseFormat(Body):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema_is_there(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            message = "has to be there if, and only if, type is json_schema"
            raise PydanticCustomError("invalid", message, {"param": "json_schema"})
        return self

    def grammar(self) -> GrammarSpec | None:
        """None = any text. Raises InvalidParameterError."""
        if self.json_schema is not None:
            return self.json_schema.grammar()
        return GrammarSpec.json_object() if self.type == "json_object" else None


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`; exactly one of them."""

    not_implemented: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "disable_additional_properties": (False,),
        "disable_any_whitespace": (False,),
        "structural_tag": (),
        "whitespace_pattern": (),
    }
    ignored = frozenset({"disable_fallback"})

    json_: Annotated[Schema | None, Field(alias="json")] = None
    json_object: bool = False
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)
        ]
        | None
    ) = None
    grammar_: Annotated[Annotated[str, Field(min_length=1)] | None, Field(alias="grammar")] = None

    @model_validator(mode="after")
    def _check_is_one(self) -> Self:
        given = [value for value in (self.json_, self.regex, self.choice, self.grammar_) if value is not None]
        if len(given) + self.json_object != 1:
            raise PydanticCustomError("invalid", "has to have exactly one of json, json_object, regex, choice, grammar")
        return self

    def grammar(self) -> GrammarSpec:
        """Raises InvalidParameterError."""
        if self.regex is not None:
            return GrammarSpec("regex", self.regex)
        if self.choice is not None:
            return GrammarSpec.choice(self.choice)
        if self.grammar_ is not None:
            return GrammarSpec("gbnf" if "::=" in self.grammar_ else "lark", self.grammar_)
        return GrammarSpec.json_object() if self.json_object else GrammarSpec.json_schema(self.json_)


class FormedBody(GenerationBody):
    """A body that may say what form the answer is to have."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _check_one_form(self) -> Self:
        if self.structured_outputs is not None and self.asks_for_format:
            raise PydanticCustomError(
                "mutually_exclusive_parameters",
                "cannot be combined with response_format; give only one of them",
                {"param": "structured_outputs"},
            )
        self._grammar()  # refuses one that is too large here, where large bodies are parsed, and not in the event loop
        return self

    @property
    def asks_for_format(self) -> bool:
        """Whether `response_format` asks for more than a text."""
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def form_param(self) -> str | None:
        """This request's name for what the engine calls `grammar`; None = it has none."""
        if self.structured_outputs is not None:
            return "structured_outputs"
        return "response_format" if self.asks_for_format else None

    def _grammar(self) -> GrammarSpec | None:
        """What the answer is held to. Raises InvalidParameterError."""
        form = self.structured_outputs or self.response_format
        try:
            return None if form is None else form.grammar()
        except InvalidParameterError as error:
            raise InvalidParameterError(error.message, self.form_param) from None
