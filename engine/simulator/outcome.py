"""What came of a simulation: a row for each turn, and figures of the cluster; and the statistics of both."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np


class TurnRow(NamedTuple):
    """One turn; times in seconds from the beginning, counts in tokens as in RequestStats.

    is_tool: the turn is the result of a call. is_moved: another replica had answered the session's turn before.
    sent_s: before any retry.
    num_known_tokens: of the prompt, those that the session had before, wherever they were computed; with an oracle, those
        that any session had before.
    num_recomputed_tokens, recompute_s: of these, what had to be computed again, and what that cost.
    """

    session: int
    number: int
    is_tool: int
    is_moved: int
    rank: int
    sent_s: float
    first_token_s: float
    finished_s: float
    num_prompt_tokens: int
    num_known_tokens: int
    num_cached_tokens: int
    num_loaded_tokens: int
    num_not_loaded_tokens: int
    num_dropped_tokens: int
    num_new_tokens: int
    num_output_tokens: int
    num_suspensions: int
    num_retries: int
    num_recomputed_tokens: int
    recompute_s: float


class TurnTable:
    """Rows of turns, as columns of numbers: some 150 bytes a turn."""

    def __init__(self) -> None:
        self._columns: list[array[Any]] = [array("d" if name.endswith("_s") else "q") for name in TurnRow._fields]

    def __len__(self) -> int:
        return len(self._columns[0])

    def append(self, row: TurnRow) -> None:
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)

    def __iter__(self) -> Iterator[TurnRow]:
        return (TurnRow(*values) for values in zip(*self._columns, strict=True))

    def column(self, name: str) -> np.ndarray:
        """A copy."""
        return np.array(self._columns[TurnRow._fields.index(name)])


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """What one replica did: counters of its core, and time. pulled_bytes: of KV that it got from other replicas."""

    rank: int
    started_s: float
    ended_s: float
    busy_s: float
    recompute_s: float
    num_recomputed_tokens: int
    pulled_bytes: float
    counters: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Statistics of the turns that were sent after the warm-up; times in seconds.

    turns_per_s: finished, within the time measured. s_per_token: from sending to the end of the answer, over its tokens, as
    the paper measures. hit_rate: of the tokens that sessions had before, the part that was found and used, in any tier.
    recompute_s, num_recomputed_tokens: of these turns, what had been computed before and was computed again. busy: share of
    the replicas' time in steps. balance: of the replicas' busy time, the largest over the mean. requests_balance: the same of
    the requests that are open at each replica, on average over time after the warm-up.
    moved_share: of the turns that follow another one, those that another replica answers than that one. moved_hit_rate,
    moved_first_token_p90_s: of these alone; 0 if there are none. pulled_gb: KV that replicas got from others, over the whole
    run, in 10^9 bytes.
    """

    num_turns: int
    num_unfinished: int
    num_refused: int
    measured_s: float
    turns_per_s: float
    output_tokens_per_s: float
    s_per_token_mean: float
    s_per_token_p50: float
    s_per_token_p90: float
    s_per_token_p99: float
    first_token_p50_s: float
    first_token_p90_s: float
    first_token_p99_s: float
    prompt_tokens_mean: float
    hit_rate: float
    loaded_share: float
    recompute_s: float
    num_recomputed_tokens: int
    num_suspensions: int
    busy: float
    balance: float
    requests_balance: float
    moved_share: float
    moved_hit_rate: float
    moved_first_token_p90_s: float
    pulled_gb: float

    def as_dict(self) -> dict[str, float]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a simulation gives.

    loads: (time, open requests of each replica that there was), sampled. num_unfinished: turns under way at the end.
    num_refused: turns that were sent again because all replicas asked were full. num_too_long: sessions that ended because a
    turn did not fit the window. messages: what happened to the cluster, in order.
    """

    turns: TurnTable
    replicas: Sequence[ReplicaRow]
    loads: Sequence[tuple[float, Mapping[int, int]]]
    ended_s: float
    num_unfinished: int = 0
    num_refused: int = 0
    num_too_long: int = 0
    messages: Sequence[str] = ()

    def summary(self, warm_up_s: float = 0.0) -> Summary:
        """Raises ValueError if no turn was sent and finished after the warm-up."""
        turns = self.turns
        finished_s = turns.column("finished_s")
        is_counted = turns.column("sent_s") >= warm_up_s
        if not is_counted.any():
            raise ValueError("no turn ended that was sent after the warm-up; simulate a longer time")

        def counted(name: str) -> np.ndarray:
            return turns.column(name)[is_counted]

        measured_s = max(self.ended_s - warm_up_s, 1e-9)
        within = finished_s >= warm_up_s
        latency = (finished_s[is_counted] - counted("sent_s")) / counted("num_output_tokens")
        first_token = counted("first_token_s") - counted("sent_s")
        num_cached, num_known = counted("num_cached_tokens"), counted("num_known_tokens")
        s_50, s_90, s_99 = np.percentile(latency, [50, 90, 99])
        t_50, t_90, t_99 = np.percentile(first_token, [50, 90, 99])
        lives = [max(row.ended_s - row.started_s, 1e-9) for row in self.replicas]
        busy = [row.busy_s / life for row, life in zip(self.replicas, lives, strict=True)]
        mean_busy = float(np.mean(busy))
        is_moved = counted("is_moved").astype(bool)
        num_following = int((counted("number") > 0).sum())
        num_found = np.minimum(num_cached, num_known)
        return Summary(
            num_turns=int(is_counted.sum()),
            num_unfinished=self.num_unfinished,
            num_refused=self.num_refused,
            measured_s=measured_s,
            turns_per_s=float(within.sum()) / measured_s,
            output_tokens_per_s=float(turns.column("num_output_tokens")[within].sum()) / measured_s,
            s_per_token_mean=float(latency.mean()),
            s_per_token_p50=float(s_50),
            s_per_token_p90=float(s_90),
            s_per_token_p99=float(s_99),
            first_token_p50_s=float(t_50),
            first_token_p90_s=float(t_90),
            first_token_p99_s=float(t_99),
            prompt_tokens_mean=float(counted("num_prompt_tokens").mean()),
            hit_rate=_share(num_found, num_known),
            loaded_share=float(counted("num_loaded_tokens").sum() / num_cached.sum()) if num_cached.sum() else 0.0,
            recompute_s=float(counted("recompute_s").sum()),
            num_recomputed_tokens=int(counted("num_recomputed_tokens").sum()),
            num_suspensions=int(counted("num_suspensions").sum()),
            busy=mean_busy,
            balance=max(busy) / mean_busy if mean_busy else 1.0,
            requests_balance=self._requests_balance(warm_up_s),
            moved_share=float(is_moved.sum()) / num_following if num_following else 0.0,
            moved_hit_rate=_share(num_found[is_moved], num_known[is_moved]),
            moved_first_token_p90_s=float(np.percentile(first_token[is_moved], 90)) if is_moved.any() else 0.0,
            pulled_gb=sum(row.pulled_bytes for row in self.replicas) / 1e9,
        )

    def _requests_balance(self, warm_up_s: float) -> float:
        """Over the replicas that there were at some time after the warm-up, each over its own time."""
        samples: dict[int, list[int]] = {}
        for time_s, loads in self.loads:
            if time_s >= warm_up_s:
                for rank, num_requests in loads.items():
                    samples.setdefault(rank, []).append(num_requests)
        means = [float(np.mean(each)) for each in samples.values()]
        return max(means) / float(np.mean(means)) if any(means) else 1.0


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return float(part.sum() / whole.sum()) if whole.any() else 0.0
