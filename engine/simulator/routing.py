"""Where a turn goes: the protocol of a router, and baselines to compare a cluster's own with.

The router that serves is handed in; see deployments/simulated_routing.py.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """What a replica tells ingresses of itself: all that a router may know of it.

    replica_id: another one for each that starts, whatever its rank. num_ended: requests, since it started.
    compute_s, pull_s: see EngineCore.token_compute_s and token_pull_s.
    """

    replica_id: int
    num_running: int
    num_waiting: int
    num_ended: int
    max_num_seqs: int
    compute_s: tuple[float, float] | None
    pull_s: float | None

    @property
    def num_requests(self) -> int:
        return self.num_running + self.num_waiting


class Router(Protocol):
    """The router of one ingress. What it knows of the replicas is what it has heard, and what it has sent since.

    keeps_sessions: a session goes to one replica as long as that takes requests.
    """

    keeps_sessions: bool

    def another(self) -> Self:
        """One for a further ingress. It shares what all ingresses know."""
        ...

    def hear(self, states: Mapping[int, ReplicaState], now: float) -> None:
        """News of the replicas that take requests, by rank."""
        ...

    def place(self, session_id: str, is_first_turn: bool, ranks: Sequence[int]) -> list[int]:
        """The replicas to ask for a turn: the first choice, then those that are asked if the ones before are full.

        ranks: of the replicas that take requests, ascending, at least one; the same object as long as they are the same.
        """
        ...

    def note_end(self, session_id: str, num_tokens: int, rank: int) -> None:
        """A turn that came in here has ended there; so long is its context."""
        ...

    def next_home(self, session_id: str, ranks: Sequence[int]) -> int | None:
        """Where a session goes when its replica, which is not among `ranks`, has ended; None = that is not known."""
        ...

    def next_choices(self, session_id: str, ranks: Sequence[int]) -> Sequence[int]:
        """Where its next turn may go, as far as its replica knows: these hear at once of what a turn leaves there."""
        ...

    def forget(self, session_id: str) -> None:
        """The session has ended."""
        ...


class LeastLoaded:
    """A session goes to the least loaded replica when it begins, and stays there: what a table of all sessions gives.

    If its replica has gone, it begins anew. All ingresses share the table; each knows the loads as any other router does.
    """

    keeps_sessions = True

    def __init__(self, homes: dict[str, int] | None = None) -> None:
        self._homes: dict[str, int] = {} if homes is None else homes
        self._loads: dict[int, int] = {}

    def another(self) -> LeastLoaded:
        return LeastLoaded(self._homes)

    def hear(self, states: Mapping[int, ReplicaState], now: float) -> None:
        self._loads = {rank: state.num_requests for rank, state in states.items()}

    def place(self, session_id: str, is_first_turn: bool, ranks: Sequence[int]) -> list[int]:
        home = self._homes.get(session_id)
        if home is None or home not in ranks:
            home = self._homes[session_id] = self._least_loaded(ranks)
        else:
            self._loads[home] = self._loads.get(home, 0) + 1
        return [home]

    def note_end(self, session_id: str, num_tokens: int, rank: int) -> None:
        pass

    def next_home(self, session_id: str, ranks: Sequence[int]) -> int | None:
        home = self._homes.get(session_id)
        if home in ranks:
            return home
        new_home = self._least_loaded(ranks)
        if home is not None:  # else the session has ended, which its replica does not know
            self._homes[session_id] = new_home
        return new_home

    def next_choices(self, session_id: str, ranks: Sequence[int]) -> Sequence[int]:
        return ()

    def forget(self, session_id: str) -> None:
        self._homes.pop(session_id, None)

    def _least_loaded(self, ranks: Sequence[int]) -> int:
        """The least loaded replica, with one more request until the next news."""
        loads = self._loads
        chosen = min(ranks, key=lambda rank: (loads.get(rank, 0), rank))
        loads[chosen] = loads.get(chosen, 0) + 1
        return chosen


class PowerOfTwo:
    """Each turn goes to the less loaded of two replicas drawn at random, wherever its cache is."""

    keeps_sessions = False

    def __init__(self, seed: int | str = 0) -> None:
        self._seed = seed
        self._rng = random.Random(seed)
        self._loads: dict[int, int] = {}
        self._num_others = 0

    def another(self) -> PowerOfTwo:
        self._num_others += 1
        return PowerOfTwo(f"{self._seed}/{self._num_others}")

    def hear(self, states: Mapping[int, ReplicaState], now: float) -> None:
        self._loads = {rank: state.num_requests for rank, state in states.items()}

    def place(self, session_id: str, is_first_turn: bool, ranks: Sequence[int]) -> list[int]:
        drawn = self._rng.sample(ranks, k=min(2, len(ranks)))
        chosen = min(drawn, key=lambda rank: self._loads.get(rank, 0))
        self._loads[chosen] = self._loads.get(chosen, 0) + 1
        return [chosen]

    def note_end(self, session_id: str, num_tokens: int, rank: int) -> None:
        pass

    def next_home(self, session_id: str, ranks: Sequence[int]) -> int | None:
        return None

    def next_choices(self, session_id: str, ranks: Sequence[int]) -> Sequence[int]:
        return ()

    def forget(self, session_id: str) -> None:
        pass
