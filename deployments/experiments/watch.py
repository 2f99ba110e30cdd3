"""What the engine replicas say while a load runs: who is there, and their counters from the load's beginning to its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deployments.experiments.figures import summed_counters

Statistics = Mapping[str, Any]


@dataclass(slots=True)
class _Life:
    """A replica. first: its statistics when the load began, None if it came later; last: the latest ones."""

    start_s: float
    end_s: float
    rank: str
    first: Statistics | None = None
    last: Statistics | None = None


@dataclass(slots=True)
class Watch:
    """Told at times of the run, from 0 on. A replica that is lost keeps what it said last."""

    _lives: dict[str, _Life] = field(default_factory=dict)
    _has_begun: bool = False

    def look(self, now: float, replica_ids: Iterable[str], statistics: Iterable[Statistics]) -> None:
        """replica_ids: of all that there are. statistics: of those that answer. The first call is the beginning."""
        for replica_id in replica_ids:
            life = self._lives.setdefault(replica_id, _Life(now, now, replica_id))
            life.end_s = now
        for each in statistics:
            life = self._lives.setdefault(each["replica_id"], _Life(now, now, ""))
            life.rank, life.last = str(each["replica_rank"]), each
            if not self._has_begun:
                life.first = each
        self._has_begun = True

    @property
    def lives(self) -> list[tuple[str, float, float]]:
        """(rank, from, to), in seconds of the run."""
        return [(life.rank, life.start_s, life.end_s) for life in self._lives.values()]

    def counters(self) -> dict[str, float]:
        """What all replicas together counted since the beginning."""
        total = summed_counters(life.last for life in self._lives.values() if life.last is not None)
        before = summed_counters(life.first for life in self._lives.values() if life.first is not None)
        return {name: count - before.get(name, 0) for name, count in total.items()}

    def replicas(self) -> list[dict[str, Any]]:
        """For the cell's file: each replica with its counters of the load."""
        rows = []
        for replica_id, life in self._lives.items():
            of_load: dict[str, float] = {}
            if life.last is not None:
                before = {} if life.first is None else summed_counters([life.first])
                of_load = {
                    name: count - before.get(name, 0) for name, count in summed_counters([life.last]).items() if count
                }
            rows.append(
                {"replica_id": replica_id, "rank": life.rank, "from_s": life.start_s, "to_s": life.end_s, **of_load}
            )
        return rows
