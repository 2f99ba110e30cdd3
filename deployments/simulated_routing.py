"""The routers that serve, as a simulated ingress asks them: rendezvous hashing, and the price of leaving home."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deployments.routing.load import LoadMeter, ReplicaLoad, SessionSizes, pass_over
from deployments.routing.rendezvous import choose_session_id, rank_replicas
from engine.simulator.routing import ReplicaState

# Ids of which a new conversation that the server keeps gets one.
NUM_ID_CHOICES = 2


class Affinity:
    """The order of SessionRouter: a session's home by rendezvous hashing, then its next choices.

    A full replica refuses, and the next choice is asked: all that a router can do that hears no loads.
    """

    keeps_sessions = True

    def __init__(self, num_fallback_replicas: int, *, of_two: bool, names: dict[str, str] | None = None) -> None:
        """of_two: the session's name is the better of two, as for stored conversations, whose ids the server chooses.

        names: of the sessions, if another ingress's router shares them.
        """
        self._num_fallbacks = num_fallback_replicas
        self._of_two = of_two
        self._names: dict[str, str] = {} if names is None else names
        self._num_requests: dict[int, int] = {}
        # By session; they hold as long as the ranks are the same.
        self._orders: dict[str, list[int]] = {}
        self._ranks: Sequence[int] = ()

    def another(self) -> Affinity:
        return Affinity(self._num_fallbacks, of_two=self._of_two, names=self._names)

    def hear(self, states: Mapping[int, ReplicaState], now: float) -> None:
        if self._of_two:
            self._num_requests = {rank: state.num_requests for rank, state in states.items()}

    def place(self, session_id: str, is_first_turn: bool, ranks: Sequence[int]) -> list[int]:
        return self._order(session_id, ranks)

    def note_end(self, session_id: str, num_tokens: int, rank: int) -> None:
        pass

    def next_home(self, session_id: str, ranks: Sequence[int]) -> int | None:
        return ranks[rank_replicas(self._names.get(session_id, session_id), ranks)[0]]

    def next_choices(self, session_id: str, ranks: Sequence[int]) -> Sequence[int]:
        return self._order(session_id, ranks)

    def forget(self, session_id: str) -> None:
        self._names.pop(session_id, None)
        self._orders.pop(session_id, None)

    def _order(self, session_id: str, ranks: Sequence[int]) -> list[int]:
        """The session's home, and its other choices."""
        if ranks is not self._ranks:
            self._orders.clear()
            self._ranks = ranks
        order = self._orders.get(session_id)
        if order is None:
            indices = rank_replicas(self._name(session_id), ranks)[: 1 + self._num_fallbacks]
            order = self._orders[session_id] = [ranks[index] for index in indices]
        return order

    def _name(self, session_id: str) -> str:
        """By which its home is found."""
        if not self._of_two:
            return session_id
        name = self._names.get(session_id)
        if name is None:
            candidates = [f"{session_id}/{number}" for number in range(NUM_ID_CHOICES)]
            name = self._names[session_id] = choose_session_id(candidates, self._num_requests)
            ranks = sorted(self._num_requests)
            if ranks:  # until the next news, it is where we sent it
                self._num_requests[ranks[rank_replicas(name, ranks)[0]]] += 1
        return name


class PriceOfMoving(Affinity):
    """What serves: affinity, unless another choice begins earlier by more than it costs to have the session's KV there."""

    keeps_sessions = False

    def __init__(self, num_fallback_replicas: int, *, of_two: bool, names: dict[str, str] | None = None) -> None:
        super().__init__(num_fallback_replicas, of_two=of_two, names=names)
        self._sizes = SessionSizes()
        self._loads: dict[int, ReplicaLoad] = {}
        self._meters: dict[int, LoadMeter] = {}  # by replica

    def another(self) -> PriceOfMoving:
        return PriceOfMoving(self._num_fallbacks, of_two=self._of_two, names=self._names)

    def hear(self, states: Mapping[int, ReplicaState], now: float) -> None:
        super().hear(states, now)
        known = self._meters
        self._meters = {each.replica_id: known.get(each.replica_id) or LoadMeter() for each in states.values()}
        self._loads = {
            rank: self._meters[state.replica_id].load(
                num_running=state.num_running,
                num_waiting=state.num_waiting,
                num_ended=state.num_ended,
                max_num_seqs=state.max_num_seqs,
                compute_s=state.compute_s,
                pull_s=state.pull_s,
                now=now,
            )
            for rank, state in states.items()
        }

    def place(self, session_id: str, is_first_turn: bool, ranks: Sequence[int]) -> list[int]:
        order = self._order(session_id, ranks)
        num_passed = pass_over(session_id, order, self._loads, self._num_fallbacks, self._sizes)
        # If that one is full as well: home, and on as if it had not been asked.
        return [order[num_passed], *order] if num_passed else order

    def note_end(self, session_id: str, num_tokens: int, rank: int) -> None:
        self._sizes.note(session_id, num_tokens, rank)
