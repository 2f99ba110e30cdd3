"""What was measured of one turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """One request and its answer. All times are seconds since the run began.

    turn: its place in the session, from 0.
    due_s: when it should have been sent: the session's start, or the end of the answer before plus the pause.
    sent_s, first_s, end_s: when it was sent, said its first token, and ended. first_s is None if it said nothing.
    num_prompt_tokens, num_cached_tokens: as the server counts them; None if it does not say.
    num_output_tokens: as the server counts them; if it does not say, the pieces that came (is_counted is False then).
    cached_by: the cached ones by where they were, if the server says that.
    max_gap_s: the longest time between two pieces of the answer.
    error: what went wrong; empty = nothing.
    replica: which one of the server's answered, if it says that.
    """

    session_id: str
    turn: int
    kind: str
    due_s: float
    sent_s: float
    first_s: float | None
    end_s: float
    num_prompt_tokens: int | None = None
    num_output_tokens: int = 0
    is_counted: bool = False
    num_cached_tokens: int | None = None
    cached_by: tuple[tuple[str, int], ...] = ()
    max_gap_s: float = 0.0
    finish_reason: str = ""
    error: str = ""
    replica: str = ""

    @property
    def is_good(self) -> bool:
        """Whether there is an answer to measure."""
        return not self.error and self.first_s is not None and self.num_output_tokens > 0

    @property
    def lag_s(self) -> float:
        """How late the client was."""
        return self.sent_s - self.due_s

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.sent_s

    @property
    def total_s(self) -> float:
        return self.end_s - self.sent_s

    @property
    def s_per_token(self) -> float | None:
        """Of the tokens after the first; None if there are none."""
        if self.first_s is None or self.num_output_tokens < 2:
            return None
        return (self.end_s - self.first_s) / (self.num_output_tokens - 1)

    @property
    def normalised_s(self) -> float:
        """The whole time over the tokens of the answer: the paper's measure."""
        return self.total_s / self.num_output_tokens


class LoopLag(NamedTuple):
    """How late the client's event loop was, by a task that wakes regularly: 99th percentile and maximum."""

    p99_s: float
    max_s: float
