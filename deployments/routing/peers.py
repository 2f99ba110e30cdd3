"""Who the other engine replicas of a deployment are, and which of them a conversation goes to without this one.

Told from outside, whenever Serve's set of replicas changes. Knows no Ray; time is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deployments.routing.rendezvous import rank_replicas

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Member:
    """An engine replica that runs.

    address: where it hands KV over; None = it does not.
    """

    replica_id: str
    rank: int
    address: Address | None


class Peers:
    """The replicas of one deployment, as one of them sees them."""

    def __init__(
        self,
        own_id: str,
        keep_s: float,
        num_fallback_replicas: int,
        on_change: Callable[[Mapping[str, Address]], None],
    ) -> None:
        """Nothing is known yet.

        keep_s: how long a replica that has left may still be asked, in seconds: it ends its requests meanwhile, and its KV
            goes with it.
        num_fallback_replicas: besides its home, that may be asked for a request.
        on_change: called with the others' addresses by replica id, from `update`.
        """
        self._own_id = own_id
        self._keep_s = keep_s
        self._num_choices = 1 + num_fallback_replicas
        self._on_change = on_change
        self._members: dict[str, Member] = {}
        self._departed: dict[str, tuple[Address, float]] = {}  # address, and until when it may be asked
        self._told: Mapping[str, Address] = {}
        self.left_s: float | None = None  # when this replica was no longer among them; None = it is, or was never

    def update(self, members: Sequence[Member], now: float) -> None:
        """Take in who runs. now: of a monotonic clock, in seconds."""
        before = self._members
        self._members = {member.replica_id: member for member in members}
        if self._own_id in self._members:
            self.left_s = None
        elif self._own_id in before:
            self.left_s = now
        for replica_id, member in before.items():
            if replica_id not in self._members and member.address is not None:
                self._departed[replica_id] = (member.address, now + self._keep_s)
        self._departed = {
            replica_id: (address, until_s)
            for replica_id, (address, until_s) in self._departed.items()
            if now < until_s and replica_id not in self._members
        }
        addresses = {replica_id: address for replica_id, (address, _) in self._departed.items()}
        addresses |= {
            member.replica_id: member.address for member in self._members.values() if member.address is not None
        }
        addresses.pop(self._own_id, None)
        if addresses != self._told:
            self._told = addresses
            self._on_change(addresses)

    def next_home(self, conversation_id: str) -> str | None:
        """The id of the replica that a conversation goes to when this one ends; None if there is none, or it takes no KV.

        conversation_id: as Generation.conversation_id says it.
        """
        others = [member for member in self._members.values() if member.replica_id != self._own_id]
        home = next(iter(_order(conversation_id, others)), None)
        return None if home is None or home.address is None else home.replica_id

    def next_peers(self, conversation_id: str) -> list[str]:
        """The ids of the others that the router may ask for a conversation's next turn, and that take KV.

        Any thread may ask. conversation_id: as Generation.conversation_id says it.
        """
        choices = _order(conversation_id, list(self._members.values()))[: self._num_choices]
        return [each.replica_id for each in choices if each.address is not None and each.replica_id != self._own_id]


def _order(conversation_id: str, members: Sequence[Member]) -> list[Member]:
    """The members in the order in which the router prefers them for a conversation."""
    session_id = conversation_id.partition("\n")[2]
    by_id = sorted(
        members, key=lambda member: member.replica_id
    )  # as the router does: equal ranks are seen for a moment
    return [by_id[index] for index in rank_replicas(session_id, [member.rank for member in by_id])]
