"""What requests to the Responses and Conversations API say beside what is to be computed: labels, and what to show."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from deployments.http.parsing import MAX_NAME_CHARS
from deployments.responses.input_items import unsupported

# What a client may want to see more of: of tools and inputs that are not here, so that there is nothing to show.
INCLUDABLE = frozenset(
    [
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
    ]
)
MAX_INCLUDED = 16
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512


def _check_included(include: Any) -> Any:
    for index, name in enumerate(include if isinstance(include, list) else []):
        if not isinstance(name, str) or name not in INCLUDABLE:
            raise unsupported(f"{repr(name)[:MAX_NAME_CHARS]} is not supported; leave it out", param=index)
    return include


def _check_few_pairs(metadata: Any) -> Any:
    """Before their values are looked at: each wrong one would become an error."""
    if isinstance(metadata, dict) and len(metadata) > MAX_METADATA_PAIRS:
        raise PydanticCustomError("invalid", f"at most {MAX_METADATA_PAIRS} pairs")
    return metadata


def _check_metadata(metadata: dict[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if len(key) > MAX_METADATA_KEY_CHARS:
            message = f"a key has at most {MAX_METADATA_KEY_CHARS} characters"
            raise PydanticCustomError("invalid", message, {"param": key})
        if len(value) > MAX_METADATA_VALUE_CHARS:
            message = f"a value has at most {MAX_METADATA_VALUE_CHARS} characters"
            raise PydanticCustomError("invalid", message, {"param": key})
    return metadata


METADATA_SCHEMA = {  # _check_metadata's rules, for the served document
    "type": "object",
    "maxProperties": MAX_METADATA_PAIRS,
    "propertyNames": {"maxLength": MAX_METADATA_KEY_CHARS},
    "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE_CHARS},
}
Metadata = Annotated[
    dict[str, str],
    BeforeValidator(_check_few_pairs, json_schema_input_type=dict[str, str]),
    AfterValidator(_check_metadata),
    WithJsonSchema(METADATA_SCHEMA),
]
Include = Annotated[
    list[str],
    BeforeValidator(
        _check_included,
        json_schema_input_type=Annotated[list[str], Field(json_schema_extra={"items": {"enum": sorted(INCLUDABLE)}})],
    ),
    Field(max_length=MAX_INCLUDED),
]
