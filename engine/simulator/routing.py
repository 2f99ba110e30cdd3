"""Where a turn goes: the protocol of a router, and baselines to compare a cluster's own with.

The router that serves is handed in; see deployments/simulate.py.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Protocol


class Router(Protocol):
    """Knows the ranks of the replicas that take requests, and their loads as far as an ingress hears of them."""

    def place(self, session_id: str, is_first_turn: bool, ranks: Sequence[int], loads: Mapping[int, int]) -> list[int]:
        """The replicas to ask for a turn: the first choice, then those that are asked if the ones before are full.

        ranks: ascending, at least one. loads: open requests, by rank, as of the last news.
        """
        ...

    def forget(self, session_id: str) -> None:
        """The session has ended."""
        ...


class LeastLoaded:
    """A session goes to the least loaded replica when it begins, and stays there: what a table of all sessions gives.

    If its replica has gone, it begins anew.
    """

    def __init__(self) -> None:
        self._homes: dict[str, int] = {}

    def place(self, session_id: str, is_first_turn: bool, ranks: Sequence[int], loads: Mapping[int, int]) -> list[int]:
        home = self._homes.get(session_id)
        if home is None or home not in ranks:
            home = self._homes[session_id] = min(ranks, key=lambda rank: (loads.get(rank, 0), rank))
        return [home]

    def forget(self, session_id: str) -> None:
        self._homes.pop(session_id, None)


class PowerOfTwo:
    """Each turn goes to the less loaded of two replicas drawn at random, wherever its cache is."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)

    def place(self, session_id: str, is_first_turn: bool, ranks: Sequence[int], loads: Mapping[int, int]) -> list[int]:
        drawn = self._rng.sample(ranks, k=min(2, len(ranks)))
        return [min(drawn, key=lambda rank: loads.get(rank, 0))]

    def forget(self, session_id: str) -> None:
        pass
