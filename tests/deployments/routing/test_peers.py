"""Who the other replicas are, as one of them sees it, and where a conversation goes without it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from deployments.routing.peers import Address, Member, Peers
from deployments.routing.rendezvous import rank_replicas

KEEP_S = 10.0


def member(rank: int, *, hands_over: bool = True) -> Member:
    return Member(f"replica-{rank}", rank, ("10.0.0.1", 7000 + rank) if hands_over else None)


class Seen:
    """Peers of replica-1, and what they told the engine."""

    def __init__(self) -> None:
        self.told: list[Mapping[str, Address]] = []
        self.peers = Peers("replica-1", KEEP_S, 1, self.told.append)

    def update(self, *ranks: int, now: float = 0.0) -> None:
        self.peers.update([member(rank) for rank in ranks], now)

    @property
    def last(self) -> set[str]:
        return set(self.told[-1])


def test_the_engine_hears_of_the_others_when_they_change() -> None:
    seen = Seen()
    seen.update(0, 1)
    assert seen.told == [{"replica-0": ("10.0.0.1", 7000)}]
    seen.update(1, 0)
    assert len(seen.told) == 1
    seen.update(0, 1, 2)
    assert seen.last == {"replica-0", "replica-2"}


def test_one_that_has_left_may_be_asked_while_it_ends() -> None:
    seen = Seen()
    seen.update(0, 1, 2)
    seen.update(0, 1, now=5.0)
    assert len(seen.told) == 1
    seen.update(0, 1, now=14.9)
    assert len(seen.told) == 1
    seen.update(0, 1, now=15.0)
    assert seen.last == {"replica-0"}


def test_one_that_comes_back_is_there_for_good() -> None:
    seen = Seen()
    seen.update(0, 1)
    seen.update(1, now=1.0)
    seen.update(0, 1, now=2.0)
    seen.update(0, 1, now=50.0)
    assert len(seen.told) == 1


def test_one_without_an_address_is_no_peer() -> None:
    seen = Seen()
    seen.peers.update([member(0, hands_over=False), member(1), member(2)], 0.0)
    assert seen.last == {"replica-2"}
    sessions = [f"session-{number}" for number in range(50)]
    homes = {(0, 2)[rank_replicas(session, (0, 2))[0]]: session for session in sessions}
    assert seen.peers.next_home(f"tenant\n{homes[0]}") is None
    assert seen.peers.next_home(f"tenant\n{homes[2]}") == "replica-2"


def test_a_replica_knows_when_it_has_left() -> None:
    seen = Seen()
    seen.update(0)
    assert seen.peers.left_s is None, "it has not come yet"
    seen.update(0, 1, now=1.0)
    assert seen.peers.left_s is None
    seen.update(0, now=3.0)
    seen.update(0, 2, now=4.0)
    assert seen.peers.left_s == 3.0
    seen.update(0, 1, now=5.0)
    assert seen.peers.left_s is None


@pytest.mark.parametrize("own_is_listed", [True, False])
def test_a_conversation_goes_where_the_router_sends_it_without_this_replica(own_is_listed: bool) -> None:
    seen = Seen()
    ranks = (0, 2, 3)
    seen.update(*ranks, *((1,) if own_is_listed else ()))
    for session in (f"session-{number}" for number in range(100)):
        expected = ranks[rank_replicas(session, ranks)[0]]
        assert seen.peers.next_home(f"tenant\n{session}") == f"replica-{expected}"
        order = rank_replicas(session, (0, 1, 2, 3))
        assert expected == next(rank for rank in order if rank != 1), "the first of its choices that stays"


def test_the_next_turn_may_come_to_those_that_the_router_asks() -> None:
    """The session's home and its next choice, as soon as they are there, but not this replica itself."""
    seen = Seen()
    sessions = [f"session-{number}" for number in range(100)]
    for ranks in ((0, 1, 2, 3), (0, 2, 3), (1,), ()):  # in the third and fourth, what is left ends
        seen.update(*ranks)
        for session in sessions:
            order = [ranks[index] for index in rank_replicas(session, ranks)][:2]
            expected = [f"replica-{rank}" for rank in order if rank != 1]
            assert seen.peers.next_peers(f"tenant\n{session}") == expected
    seen.peers.update([member(0, hands_over=False), member(1)], 0.0)
    assert {tuple(seen.peers.next_peers(f"tenant\n{session}")) for session in sessions} == {()}


def test_without_others_there_is_no_next_home() -> None:
    seen = Seen()
    assert seen.peers.next_home("tenant\nsession") is None
    seen.update(1)
    assert seen.peers.next_home("tenant\nsession") is None
