"""The network between replicas: who is there, and messages that take their time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from engine.simulator.directory import Directory
from engine.simulator.events import ARRIVAL, Events


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """Between replicas.

    bytes_per_s: out of each replica, and into it. latency_s: of a message. rate_bytes_per_s: what kv_transfer_rate allows,
    out and in; None = all. A replica that ends is not bound by it.
    """

    bytes_per_s: float = 12.5e9
    latency_s: float = 0.0005
    rate_bytes_per_s: float | None = None


class Member(Protocol):
    """A replica's end of the network."""

    def note_gone(self, peer_id: int, now: float) -> None:
        """Another replica has gone."""
        ...

    def give_up(self, now: float) -> None:
        """This replica has gone."""
        ...


class Network:
    """The replicas that hand over to each other, and the messages between them."""

    def __init__(self, spec: NetworkSpec, events: Events, bytes_per_block: float) -> None:
        self.spec = spec
        self.events = events
        self.bytes_per_block = bytes_per_block
        self.directory = Directory()
        self._members: dict[int, Member] = {}

    def join(self, peer_id: int, member: Member, now: float) -> None:
        """A replica has started. peer_id: no other one has had it."""
        self._members[peer_id] = member
        self.directory.join(peer_id, now)

    def leave(self, peer_id: int, now: float) -> None:
        """A replica has gone, with all that it was about to send."""
        gone = self._members.pop(peer_id)
        self.directory.forget_peer(peer_id)
        gone.give_up(now)
        for member in self._members.values():
            member.note_gone(peer_id, now)

    def has(self, peer_id: int) -> bool:
        return peer_id in self._members

    def post(self, time_s: float, receiver_id: int, method: Callable[..., None], *arguments: Any) -> None:
        """A message that leaves then: `method` of the receiver with the time of its arrival, if that one is there by then."""
        self.events.add(time_s + self.spec.latency_s, ARRIVAL, self._deliver, (receiver_id, method, arguments))

    def _deliver(self, now: float, message: tuple[int, Callable[..., None], tuple[Any, ...]]) -> None:
        receiver_id, method, arguments = message
        member = self._members.get(receiver_id)
        if member is not None:
            method(member, now, *arguments)
