"""Where sessions go: evenly, always alike, and as few as possible move when a replica comes or goes."""

import itertools
from collections import Counter

import pytest

from deployments.routing.rendezvous import choose_session_id, rank_replicas, read_routing_name, routing_name

SESSIONS = [f"session-{i}" for i in range(3000)]


def home(session_id: str, ranks: list[int]) -> int:
    return ranks[rank_replicas(session_id, ranks)[0]]


def test_order_is_part_of_the_contract() -> None:
    # Every ingress replica, of every release, must agree: a change here moves every session away from its cache.
    assert [rank_replicas(s, [0, 1, 2]) for s in ("a", "b", "c", "d")] == [[1, 0, 2], [0, 1, 2], [2, 1, 0], [1, 0, 2]]


def test_order_depends_on_ranks_not_on_their_positions() -> None:
    for session_id in SESSIONS[:100]:
        ranks = [3, 1, 0, 2]
        order = [ranks[i] for i in rank_replicas(session_id, ranks)]
        assert order == rank_replicas(session_id, [0, 1, 2, 3])


@pytest.mark.parametrize("num_replicas", [2, 3, 8])
def test_sessions_are_spread_evenly(num_replicas: int) -> None:
    counts = Counter(home(s, list(range(num_replicas))) for s in SESSIONS)
    fair = len(SESSIONS) / num_replicas
    assert all(0.8 * fair < counts[rank] < 1.2 * fair for rank in range(num_replicas))


def test_one_more_replica_takes_its_share_and_moves_nothing_else() -> None:
    before = {s: home(s, [0, 1, 2]) for s in SESSIONS}
    after = {s: home(s, [0, 1, 2, 3]) for s in SESSIONS}
    moved = [s for s in SESSIONS if before[s] != after[s]]
    assert all(after[s] == 3 for s in moved)
    assert 0.2 < len(moved) / len(SESSIONS) < 0.3


def test_sessions_of_a_lost_replica_go_to_their_second_choice() -> None:
    for session_id in SESSIONS[:300]:
        order = rank_replicas(session_id, [0, 1, 2])
        without_home = [rank for rank in (0, 1, 2) if rank != order[0]]
        assert home(session_id, without_home) == order[1]


def test_equal_ranks_keep_their_order_and_none_is_lost() -> None:
    assert rank_replicas("a", [5, 5]) == [0, 1]
    assert rank_replicas("a", []) == []


def test_a_new_session_gets_the_id_whose_home_has_less_to_do() -> None:
    loads = {0: 5, 2: 0, 3: 9}
    ranks = sorted(loads)
    ids = [f"id-{i}" for i in range(40)]
    home = {name: ranks[rank_replicas(name, ranks)[0]] for name in ids}
    assert set(home.values()) == set(ranks)
    for first, second in itertools.pairwise(ids):
        chosen = choose_session_id([first, second], loads)
        assert loads[home[chosen]] == min(loads[home[first]], loads[home[second]])
        if home[first] == home[second]:
            assert chosen == first
    assert choose_session_id(ids, {}) == ids[0]


def test_two_choices_even_out_what_one_leaves_uneven() -> None:
    """The longest queue over the mean, by sessions that never end: far nearer to 1 with a choice."""

    def longest(num_choices: int) -> float:
        loads = dict.fromkeys(range(8), 0)
        for number in range(4000):
            candidates = [f"{number}-{choice}" for choice in range(num_choices)]
            chosen = choose_session_id(candidates, loads)
            loads[rank_replicas(chosen, range(8))[0]] += 1
        return max(loads.values()) / 500

    assert longest(2) < 1.01 < longest(1)


@pytest.mark.parametrize("session_id", ["a", "", "1|b", "|", "conv_\u00e9\n2"])
def test_a_name_for_the_router_tells_session_and_refusals(session_id: str) -> None:
    for num_refusals in (0, 1, 12):
        assert read_routing_name(routing_name(session_id, num_refusals)) == (session_id, num_refusals)
