"""What is known of the next use of a chunk: stated with a request, kept with the chunks that the request leaves.

Eviction policies go by it, if they want to; nothing else does. Without a statement nothing is known (NO_REUSE).
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

from engine.errors import InvalidParameterError

# A weight is a factor on what keeping a chunk is worth; soft, hence bounded.
MIN_WEIGHT, MAX_WEIGHT = 1 / 64, 64.0
# Values of reuse_class: 0 = nothing is known, these others are tools.
NUM_TOOL_CLASSES = 16


@dataclass(frozen=True, slots=True)
class Reuse:
    """A statement about the next use of chunks. Raises InvalidParameterError.

    Times are in seconds: of a request's statement from the request's end on, of a chunk's on the engine's clock; `since`
    makes the one from the other.

    reuse_class: what kind of use follows, a small number; policies that learn do it class by class. 0 = unknown.
    expected_use_s: when the next use is expected; infinite = never, None = unknown.
    weight: factor on the retention value.
    keep_until_s: until when the weight holds, afterwards it is 1; None = it does not end.
    """

    reuse_class: int = 0
    expected_use_s: float | None = None
    weight: float = 1.0
    keep_until_s: float | None = None

    def __post_init__(self) -> None:
        if not MIN_WEIGHT <= self.weight <= MAX_WEIGHT:
            raise InvalidParameterError(
                f"weight must be from {MIN_WEIGHT} to {MAX_WEIGHT}, got {self.weight}", param="weight"
            )
        if self.reuse_class < 0:
            raise InvalidParameterError(f"reuse_class must be 0 or more, got {self.reuse_class}", param="reuse_class")
        for name in ("expected_use_s", "keep_until_s"):
            value = getattr(self, name)
            if value is not None and math.isnan(value):
                raise InvalidParameterError(f"{name} must be a number, got {value}", param=name)

    def since(self, now: float) -> Reuse:
        """A request's statement, as of its end at `now`, on the engine's clock."""
        if self.expected_use_s is None and self.keep_until_s is None:
            return self
        return Reuse(
            self.reuse_class,
            None if self.expected_use_s is None else now + self.expected_use_s,
            self.weight,
            None if self.keep_until_s is None else now + self.keep_until_s,
        )

    def merged(self, newer: Reuse, now: float) -> Reuse:
        """Of a chunk that several conversations share: the most useful of what was said before and what is said now.

        The soonest expected use that has not passed, unknown rather than never; the largest weight that still holds, of
        equal ones that which holds for longest; the class that was stated last.
        """
        if self is newer:
            return self
        uses = [each for each in (self.expected_use_s, newer.expected_use_s) if each is not None and each > now]
        expected_use_s = min(uses, default=None)
        if expected_use_s == math.inf and len(uses) < 2:
            expected_use_s = None
        older = self if self.keep_until_s is None or self.keep_until_s > now else NO_REUSE
        kept = max(older, newer, key=_weight_and_end)
        return Reuse(newer.reuse_class, expected_use_s, kept.weight, kept.keep_until_s)


def _weight_and_end(reuse: Reuse) -> tuple[float, float]:
    return reuse.weight, math.inf if reuse.keep_until_s is None else reuse.keep_until_s


NO_REUSE = Reuse()


def tool_class(name: str) -> int:
    """The reuse_class of a context whose next turn is the result of a call of that tool; tools may share one."""
    return 1 + zlib.crc32(name.encode()) % (NUM_TOOL_CLASSES - 1)
