"""How an answer came about, for who asks: where its time went, what of its prompt was cached, and why the rest was not.

Plain data, without a word of what was said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.core.retention import Miss
from engine.core.stats import RequestStats

# Before the phases: the prompt is read as tokens, and what else is known of the conversation is looked for.
PREPARE = "prepare"
DIGITS = 6  # of seconds as JSON: microseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A replica was lost, or gave the request up, before its answer was complete.

    at_s: when that was noticed, Unix time. kind: the name of the error. num_output_tokens: that had come by then.
    """

    at_s: float
    kind: str
    num_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The way of a request to the replica that completed the answer, and back.

    begun_s: when a replica was looked for, Unix time.
    replica_rank: of the replica. is_home: whether its session belongs there; None = it was not known then.
    seconds: on the way, without the replica's own time and without what was lost.
    lost_s: with replicas that were full, or did not complete the answer.
    losses: of replicas that had accepted the request, in order.
    """

    begun_s: float
    replica_rank: int
    is_home: bool | None
    seconds: float
    lost_s: float = 0.0
    losses: tuple[Loss, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """How one engine made an answer, or the part of it since another engine was lost.

    begun_s: when the engine was asked, Unix time. prepare_s: from then until the request could run.
    stats: the account of the request, with its phases.
    computed_by_reason: tokens of the prompt that were computed, by reason; see Miss.
    route: how the request came to this engine, of a server with several.
    """

    begun_s: float
    prepare_s: float
    stats: RequestStats
    computed_by_reason: Mapping[str, int]
    route: Route | None = None

    def seconds(self) -> dict[str, float]:
        """The engine's time by phase, in the order in which they begin at first."""
        phases = self.stats.phases
        return {
            PREPARE: self.prepare_s,
            "queue": phases.queue_s,
            "load": phases.load_s,
            "prefill": phases.prefill_s,
            "decode": phases.decode_s,
            "suspended": phases.suspended_s,
        }

    def as_json(self, recomputed: tuple[str, int] | None = None) -> dict[str, Any]:
        """As clients and the log are told. Without a route (an engine alone), nothing is said of replicas.

        recomputed: see OutputDelta.
        """
        route, stats = self.route, self.stats
        told: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        if route is not None:
            told = {"replica": route.replica_rank, "home": route.is_home, "lost_replicas": len(route.losses)}
            seconds = {"lost": route.lost_s, "route": route.seconds}
        told |= {
            "seconds": {name: round(value, DIGITS) for name, value in (seconds | self.seconds()).items()},
            "cached_tokens_by_tier": dict(stats.cached_by_tier),
            "computed_tokens_by_reason": dict(self.computed_by_reason),
            "suspensions": stats.num_suspensions,
        }
        return told | ({"recomputed": dict([recomputed])} if recomputed is not None else {})

    def unix_spans(self) -> Iterator[tuple[str, float, float]]:
        """(phase, start, end) in order, in Unix time."""
        offset_s = self.begun_s + self.prepare_s - self.stats.arrival_s
        yield PREPARE, self.begun_s, self.begun_s + self.prepare_s
        for phase, start_s, end_s in self.stats.phases.spans:
            yield phase.value, start_s + offset_s, end_s + offset_s


def explain(begun_s: float, prepare_s: float, stats: RequestStats, misses: Sequence[Miss]) -> Explanation:
    """The explanation of an answer that is complete. misses: why tokens of its prompt were computed."""
    reasons: Counter[str] = Counter()
    for miss in misses:
        reasons[miss.reason] += miss.end - miss.start
    return Explanation(begun_s=begun_s, prepare_s=prepare_s, stats=stats, computed_by_reason=dict(reasons))
