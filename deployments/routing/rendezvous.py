"""Rendezvous (highest random weight) hashing: which replica a session belongs to.

A pure function, so that every ingress replica decides alike without talking to the others. Knows no Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

# Sessions whose order is remembered: 8 MB with 256 replicas.
MAX_REMEMBERED = 4096


def rank_replicas(session_id: str, ranks: Sequence[int]) -> list[int]:
    """Indices into `ranks`, the session's home first, then where it goes while those before are full or gone.

    The order depends on the set of ranks alone: one more rank takes its share of sessions from each of the
    others and moves no session between them; one less gives each of its sessions to that session's second
    choice. Equal ranks (seen for a moment while a replica is replaced) keep the order in which they were
    given.
    """
    return list(_order(session_id, tuple(ranks)))


@lru_cache(maxsize=MAX_REMEMBERED)
def _order(session_id: str, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """See rank_replicas. Remembered, because it takes a hash for each rank, and a session asks turn by turn."""
    return tuple(sorted(range(len(ranks)), key=lambda index: _weight(session_id, ranks[index]), reverse=True))


def routing_name(session_id: str, num_refusals: int) -> str:
    """What the router is told of a session whose first `num_refusals` choices have rejected the request."""
    return f"{num_refusals}|{session_id}"


def read_routing_name(name: str) -> tuple[str, int]:
    """The session, and how many of its choices are to be passed over."""
    num_refusals, _, session_id = name.partition("|")
    return session_id, int(num_refusals)


def choose_session_id(candidates: Sequence[str], loads: Mapping[int, int]) -> str:
    """Of ids that a new session may be given, the one whose home has the smallest load.

    The first of equals, and the first if no load is known. So a new session goes to the less loaded of two replicas,
    and every ingress finds it there by its id alone.

    loads: by rank.
    """
    ranks = sorted(loads)
    if not ranks:
        return candidates[0]
    return min(candidates, key=lambda session_id: loads[ranks[rank_replicas(session_id, ranks)[0]]])


def _weight(session_id: str, rank: int) -> int:
    digest = hashlib.blake2b(f"{rank}|{session_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
