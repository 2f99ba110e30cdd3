"""What clients say of the cache in a body, in the words of OpenAI's and Anthropic's APIs, and as the engine takes it.

    cache_control             on a part, a message, a tool or a whole request: keep what is up to there; "skip" is ours:
                              this part may go first
    prompt_cache_breakpoint   on a part: keep what is up to there
    prompt_cache_options      of a request: how long, what of it, what it is compared with; or only have it cached

Knows no HTTP library, no engine and no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from deployments.http.parsing import Body
from engine.dialogue.messages import CacheMark, Message
from engine.text.cache_marks import CacheWish

# Seconds of the times that the two APIs have names for.
TTL_S = {"5m": 300.0, "1h": 3600.0, "30m": 1800.0, "12h": 43_200.0}
RETENTION_S = {"in_memory": None, "24h": 86_400.0}
MAX_ID_CHARS = 512


class CacheControl(Body):
    """Anthropic's mark: what is up to here is to be kept. Clients of OpenAI's API send it to other servers, too."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] = "5m"


class PartCacheControl(Body):
    """The same on what has a text. type: "skip" = it is not worth keeping; an extension of ours."""

    type: Literal["ephemeral", "skip"]
    ttl: Literal["5m", "1h"] = "5m"


class PromptCacheBreakpoint(Body):
    """OpenAI's mark. ttl: the request's, if it is not said here."""

    mode: Literal["explicit"]
    ttl: Literal["30m", "12h"] | None = None


class PromptCacheOptions(Body):
    """OpenAI's options of a whole request. What the answer shows as applied is `shown`."""

    mode: Literal["implicit", "explicit"] = "implicit"
    ttl: Literal["30m", "12h"] | None = None
    prewarm: bool = False
    comparison_response_id: Annotated[str, Field(max_length=MAX_ID_CHARS)] | None = None

    def shown(self) -> dict[str, Any]:
        """As the response repeats them."""
        compared = self.comparison_response_id
        more = {} if compared is None else {"comparison_response_id": compared}
        return {"mode": self.mode, "ttl": self.ttl or "30m", **more}


def wish_of(options: PromptCacheOptions | None, retention: Literal["in_memory", "24h"] | None) -> CacheWish:
    """What the engine is told.

    retention: OpenAI's older word for a time, which counts if the options say none.
    """
    older_s = RETENTION_S.get(retention or "")
    if options is None:
        return CacheWish(ttl_s=older_s)
    ttl_s = older_s if options.ttl is None else TTL_S[options.ttl]
    return CacheWish(ttl_s, options.mode == "explicit", options.comparison_response_id)


class Markable(Body):
    """What may be marked with cache_control."""

    cache_control: CacheControl | None = None

    def marks(self, start: int = 0, end: int | None = None) -> tuple[CacheMark, ...]:
        """Of what has this place in a message's content. end None = to the end of the message."""
        return () if self.cache_control is None else (CacheMark(None, end, TTL_S[self.cache_control.ttl]),)


class MarkablePart(Body):
    """What has a text and may be marked with cache_control."""

    cache_control: PartCacheControl | None = None

    def marks(self, start: int = 0, end: int | None = None) -> tuple[CacheMark, ...]:
        """See Markable.marks."""
        if self.cache_control is None:
            return ()
        if self.cache_control.type == "skip":
            return (CacheMark(start, end),)
        return (CacheMark(None, end, TTL_S[self.cache_control.ttl]),)


class BreakablePart(MarkablePart):
    """What has a text and may be marked with prompt_cache_breakpoint, too."""

    prompt_cache_breakpoint: PromptCacheBreakpoint | None = None

    def marks(self, start: int = 0, end: int | None = None) -> tuple[CacheMark, ...]:
        found = super().marks(start, end)
        if self.prompt_cache_breakpoint is None:
            return found
        ttl = self.prompt_cache_breakpoint.ttl
        return (*found, CacheMark(None, end, None if ttl is None else TTL_S[ttl]))

    def kept_marks(self) -> dict[str, Any]:
        """The fields again, for an item that is kept."""
        fields = {"cache_control": self.cache_control, "prompt_cache_breakpoint": self.prompt_cache_breakpoint}
        return {name: field.model_dump(exclude_none=True) for name, field in fields.items() if field is not None}

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> BreakablePart:
        """The marks of a kept part; see kept_marks."""
        return BreakablePart(**{name: kept[name] for name in BreakablePart.model_fields if name in kept})


class MarkedText(Protocol):
    """A part of a message's content."""

    def marks(self, start: int = 0, end: int | None = None) -> tuple[CacheMark, ...]: ...


def part_marks(
    parts: Sequence[tuple[MarkedText, str]], *, start: int = 0, separator: str = "", ends_message: bool = True
) -> tuple[CacheMark, ...]:
    """The marks of a message whose content has these parts, each with its text there.

    start: characters of the content in front of them. separator: what stands between two.
    ends_message: the last one is the end of the message.
    """
    found: list[CacheMark] = []
    for number, (part, text) in enumerate(parts, 1):
        is_last = number == len(parts) and ends_message
        found += part.marks(start, None if is_last else start + len(text))
        start += len(text) + len(separator)
    return tuple(found)


def with_tools_marks(messages: Sequence[Message], tools: Sequence[Markable]) -> tuple[Message, ...]:
    """The messages, marked where tools are marked: chat templates write these with what the system says."""
    marks = [mark for tool in tools for mark in tool.marks()]
    if not marks or not messages:
        return tuple(messages)
    num_system = next((index for index, each in enumerate(messages) if each.role != "system"), len(messages))
    index, end = (num_system - 1, None) if num_system else (0, 0)
    longest = max(marks, key=lambda mark: mark.ttl_s or 0.0)
    marked = replace(messages[index], cache_marks=(*messages[index].cache_marks, replace(longest, end=end)))
    return (*messages[:index], marked, *messages[index + 1 :])
