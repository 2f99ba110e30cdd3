"""Times of turns -> figures: of one run, and of its repeats with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.bench.turns import LoopLag, TurnRecord

# A client that is later than this, or than this share of the median time to first token, measures itself.
MAX_LAG_S, MAX_LAG_SHARE = 0.025, 0.1
# Two-sided 95 % of Student's t by degrees of freedom; beyond them the normal one is 2 % less.
_T_95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
)
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
# What is measured of a turn, and how: names of TurnRecord's properties.
MEASURES = {"ttft": "ttft_s", "s_per_token": "s_per_token", "normalised": "normalised_s", "latency": "total_s"}
MAX_ERROR_KINDS = 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What a turn has to keep to be good. None = no limit.

    ttft_s: seconds to the first token. s_per_token: of the later ones. normalised_s: the whole time over the tokens.
    latency_s: the whole time.
    """

    ttft: float | None = None
    s_per_token: float | None = None
    normalised: float | None = None
    latency: float | None = None

    def keep(self, record: TurnRecord) -> bool:
        """Whether a turn keeps them all. One without later tokens has no time for each of them, and keeps that."""
        if not record.is_good:
            return False
        limits = ((getattr(self, name), getattr(record, attribute)) for name, attribute in MEASURES.items())
        return all(limit is None or value is None or value <= limit for limit, value in limits)

    @property
    def is_any(self) -> bool:
        return any(getattr(self, name) is not None for name in MEASURES)


@dataclass(frozen=True, slots=True)
class Lag:
    """How late the client was, in seconds: behind its own schedule, and behind its own clock."""

    schedule_p99_s: float
    schedule_max_s: float
    loop_p99_s: float
    loop_max_s: float

    @classmethod
    def of(cls, records: Sequence[TurnRecord], loops: Sequence[LoopLag]) -> Lag:
        lags = np.array([record.lag_s for record in records] or [0.0])
        return cls(
            float(np.quantile(lags, 0.99)),
            float(lags.max()),
            max((loop.p99_s for loop in loops), default=0.0),
            max((loop.max_s for loop in loops), default=0.0),
        )

    def why_refused(self, records: Sequence[TurnRecord], max_lag_s: float | None = None) -> str:
        """Why figures of this run would be of the client; empty = they are of the server.

        max_lag_s: what is allowed; None = 25 ms, or a tenth of the median time to first token if that is more.
        """
        if max_lag_s is None:
            firsts = [record.ttft_s for record in records if record.is_good]
            max_lag_s = max(MAX_LAG_S, MAX_LAG_SHARE * statistics.median(firsts)) if firsts else MAX_LAG_S
        for what, lag_s in (("sent turns", self.schedule_p99_s), ("noticed events", self.loop_p99_s)):
            if lag_s > max_lag_s:
                return (
                    f"the client {what} {lag_s * 1e3:.0f} ms late (99th percentile; {max_lag_s * 1e3:.0f} ms are allowed): "
                    "use more --processes, another machine or a lower load, or allow it with --max-lag"
                )
        return ""


def figures_of(records: Sequence[TurnRecord], limits: Limits) -> dict[str, float]:
    """The figures of one run by name; those that cannot be told are left out. Times are in seconds."""
    good = [record for record in records if record.is_good]
    figures: dict[str, float] = {
        "turns": len(good),
        "errors": len(records) - len(good),
        "sessions": len({record.session_id for record in records}),
    }
    if not good:
        return figures
    seconds = max(record.end_s for record in records) - min(record.due_s for record in records)
    figures["seconds"] = seconds
    figures["turns_per_s"] = len(good) / seconds
    figures["output_tokens_per_s"] = sum(record.num_output_tokens for record in good) / seconds
    figures["output_tokens_mean"] = statistics.fmean(record.num_output_tokens for record in good)
    figures |= cached_share(good)
    for name, attribute in MEASURES.items():
        figures |= spread_of(name, (getattr(record, attribute) for record in good))
    figures |= spread_of("max_gap", (record.max_gap_s for record in good))
    if limits.is_any:
        num_kept = sum(map(limits.keep, records))
        figures["goodput_turns_per_s"] = num_kept / seconds
        figures["goodput_share"] = num_kept / len(records)
    return figures


def spread_of(name: str, values: Iterable[float | None]) -> dict[str, float]:
    """Mean and quantiles of what there is."""
    known = np.array([value for value in values if value is not None])
    if not known.size:
        return {}
    quantiles = np.quantile(known, list(QUANTILES.values()))
    return {
        f"{name}_mean": float(known.mean()),
        **{f"{name}_{label}": float(value) for label, value in zip(QUANTILES, quantiles, strict=True)},
    }


def cached_share(good: Sequence[TurnRecord]) -> dict[str, float]:
    """Prompt tokens a turn, and which share was cached and where, as far as the server tells."""
    counted = [record for record in good if record.num_prompt_tokens]
    if not counted:
        return {}
    shares = {"prompt_tokens_mean": statistics.fmean(record.num_prompt_tokens or 0 for record in counted)}
    telling = [record for record in counted if record.num_cached_tokens is not None]
    if telling:
        prompt = sum(record.num_prompt_tokens or 0 for record in telling)
        shares["cached_share"] = sum(record.num_cached_tokens or 0 for record in telling) / prompt
        by: Counter[str] = Counter()
        for record in telling:
            by.update(dict(record.cached_by))
        shares |= {f"cached_share_{name}": count / prompt for name, count in sorted(by.items())}
    return shares


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over repeats, with the 95 % confidence interval of it; without one if there is one repeat."""

    mean: float
    half_width: float | None
    num_repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        if len(values) < 2:
            return cls(values[0], None, len(values))
        t = _T_95[len(values) - 2] if len(values) - 2 < len(_T_95) else 1.96
        return cls(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values)), len(values))


def intervals_of(repeats: Sequence[Mapping[str, float]]) -> dict[str, Interval]:
    """The figures of several runs of the same, those that all of them have."""
    names = [name for name in repeats[0] if all(name in figures for figures in repeats)] if repeats else []
    return {name: Interval.of([figures[name] for figures in repeats]) for name in names}


def rows_by(records: Sequence[TurnRecord], key_of: Callable[[TurnRecord], int | None]) -> list[dict[str, float]]:
    """Figures of the turns with the same key, in order of it; turns without a key are left out."""
    groups: dict[int, list[TurnRecord]] = {}
    for record in records:
        key = key_of(record) if record.is_good else None
        if key is not None:
            groups.setdefault(key, []).append(record)
    return [{"key": key, "turns": len(group), **_row(group)} for key, group in sorted(groups.items())]


def _row(group: Sequence[TurnRecord]) -> dict[str, float]:
    row = cached_share(group)
    for name, attribute in MEASURES.items():
        row |= spread_of(name, (getattr(record, attribute) for record in group))
    return row


def turn_of(record: TurnRecord) -> int:
    """From 1."""
    return record.turn + 1


def position_of(record: TurnRecord) -> int | None:
    """Where in the context its answer begins: the power of two up to which the prompt is long, at least 128."""
    if not record.num_prompt_tokens:
        return None
    return max(128, 1 << (record.num_prompt_tokens - 1).bit_length())


def errors_of(records: Iterable[TurnRecord]) -> dict[str, int]:
    """How often what went wrong, the most frequent first."""
    counts = Counter(record.error for record in records if record.error)
    return dict(counts.most_common(MAX_ERROR_KINDS))
