"""What clients and the engine may say about how long the KV of a context is worth keeping, and what came of it.

Values only. A hint is soft: a factor in the order of eviction until some time, never a pin. Done by cache/retention.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

from engine.core.reuse import Reuse
from engine.errors import InvalidParameterError

# Values of the option kv_hints.
HINT_MODES = ("off", "client", "learned")
MAX_SPANS = 64
# No hint holds for longer, in seconds.
MAX_TTL_S = 86_400.0
# Without a hint a chunk has this priority. Each 100/6 of priority is a factor of 4 on what a chunk is worth.
NEUTRAL_PRIORITY, MAX_PRIORITY = 50, 100
# The priority of what is to be kept, if the hint does not say it: 16 times as long as without a hint.
KEPT_PRIORITY = 80
_STEPS = 3
_NEVER = Reuse(expected_use_s=math.inf)


@dataclass(frozen=True, slots=True)
class KeptSpan:
    """Tokens [start, end) of a context and what they are worth. Raises InvalidParameterError.

    end: None = to the end of the context, answer included.
    priority: 0 = it may go first, 50 = as without a hint, 100 = the most that there is.
    ttl_s: how long that holds, in seconds from the end of the request; None = until the next use.
    """

    start: int = 0
    end: int | None = None
    priority: int = KEPT_PRIORITY
    ttl_s: float | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.end is not None and self.end <= self.start):
            raise InvalidParameterError(
                f"a span to keep must begin at token 0 or later and end behind its beginning, got {self.start} to {self.end}",
                param="retention",
            )
        _check_priority(self.priority)
        _check_seconds(self.ttl_s, "ttl_s")


@dataclass(frozen=True, slots=True)
class RetentionHint:
    """What is to become of a context after its request. Raises InvalidParameterError.

    spans: in order, without overlaps; any part of the context may be kept without what is before it.
    rest_priority: of the tokens in no span.
    expected_return_s: when the next request of the conversation is expected, in seconds from the end of this one.
    """

    spans: tuple[KeptSpan, ...] = ()
    rest_priority: int = NEUTRAL_PRIORITY
    expected_return_s: float | None = None

    def __post_init__(self) -> None:
        if len(self.spans) > MAX_SPANS:
            raise InvalidParameterError(
                f"a hint may name at most {MAX_SPANS} spans to keep, got {len(self.spans)}", param="retention"
            )
        for span, following in zip(self.spans, self.spans[1:], strict=False):
            if span.end is None or span.end > following.start:
                raise InvalidParameterError(
                    f"spans to keep must be in order and not overlap; one begins at token {following.start}, but the one "
                    f"before it goes to {'the end' if span.end is None else span.end}",
                    param="retention",
                )
        _check_priority(self.rest_priority)
        _check_seconds(self.expected_return_s, "expected_return_s")

    @classmethod
    def of(
        cls,
        *,
        ttl_s: float | None = None,
        priority: int | None = None,
        expected_return_s: float | None = None,
        release: bool = False,
    ) -> Self:
        """A hint on the whole context.

        ttl_s: None = it holds until the next use. priority: None = KEPT_PRIORITY if there is a ttl_s, else as without a hint.
        release: it may go first.
        """
        if release:
            return cls(rest_priority=0)
        if priority is None:
            priority = NEUTRAL_PRIORITY if ttl_s is None else KEPT_PRIORITY
        spans = () if priority == NEUTRAL_PRIORITY else (KeptSpan(priority=priority, ttl_s=ttl_s),)
        return cls(spans, expected_return_s=expected_return_s)

    @property
    def is_release(self) -> bool:
        """Whether nothing of the context is to be kept."""
        return self.rest_priority == 0 and all(span.priority == 0 for span in self.spans)

    def span_at(self, start: int, end: int) -> KeptSpan:
        """The span with the highest priority that has a token in [start, end)."""
        rest = KeptSpan(priority=self.rest_priority)
        touching = [span for span in self.spans if span.start < end and (span.end is None or span.end > start)]
        return max(touching, key=lambda span: span.priority, default=rest)


def reuse_of(span: KeptSpan, expected_return_s: float | None) -> Reuse:
    """The span's statement for eviction policies; times count from the request's end."""
    if span.priority == 0:
        return _NEVER
    step = round((span.priority - NEUTRAL_PRIORITY) * _STEPS / (MAX_PRIORITY - NEUTRAL_PRIORITY))
    ttl_s = None if span.ttl_s is None else min(span.ttl_s, MAX_TTL_S)
    if step > 0 and ttl_s is None:
        ttl_s = MAX_TTL_S
    return Reuse(expected_use_s=expected_return_s, weight=4.0**step, keep_until_s=ttl_s)


@dataclass(frozen=True, slots=True)
class RetentionOutcome:
    """What became of a hint.

    outcome: "accepted"; "clipped", it holds for a part, or for less time; "refused", it does nothing.
    reason: why not all of it, and what to do; empty if it was accepted.
    num_tokens: that it keeps, which counts against the tenant's budget.
    until_s: when it ends at the latest, on the engine's clock; None = it keeps nothing.
    """

    outcome: str
    reason: str = ""
    num_tokens: int = 0
    until_s: float | None = None


@dataclass(frozen=True, slots=True)
class ConversationCache:
    """What is cached of a conversation now.

    num_tokens: of its context, as far as it is remembered.
    tokens_by_tier: the cached ones, by the fastest tier that has them.
    hint: the one that holds for it; None = there is none.
    """

    num_tokens: int
    tokens_by_tier: Mapping[str, int]
    hint: RetentionHint | None = None


class Miss(NamedTuple):
    """Tokens [start, end) of a prompt that were computed, and why.

    reason: "new", they were never cached, as far as is remembered; "not_loaded", they were there, but computing them is
        cheaper; or that of the end of their KV, see index.Drop.
    time_s: when that was, on the engine's clock; None = the reason has no time.
    """

    start: int
    end: int
    reason: str
    time_s: float | None = None


def _check_priority(priority: int) -> None:
    if not 0 <= priority <= MAX_PRIORITY:
        raise InvalidParameterError(f"priority must be from 0 to {MAX_PRIORITY}, got {priority}", param="priority")


def _check_seconds(value: float | None, name: str) -> None:
    if value is not None and not 0 < value < math.inf:
        raise InvalidParameterError(f"{name} must be a finite number of seconds above 0, got {value}", param=name)
