"""What is simulated, as values: replicas and what is between them, and what happens to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from engine.core.engine_core import EngineCore
from engine.simulator.links import Link
from engine.simulator.network import NetworkSpec
from engine.simulator.routing import Router
from engine.simulator.step_cost import StepCost

# As live: how old an ingress lets the loads of the replicas become, how soon a client asks again if all that were asked are
# full, how soon a lost replica's requests are sent elsewhere, how soon a replica that drains offers what it has, and what it
# needs to end, of graceful_shutdown_timeout_s.
LOADS_PERIOD_S = 0.5
RETRY_AFTER_S = 2.0
LOSS_NOTICED_S = 1.0
LEAVE_S = 1.0
SHUTDOWN_S = 2.0


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """A slow tier's way to the CPU tier, for each replica: bytes a second in each direction, and seconds."""

    read_bytes_per_s: float
    write_bytes_per_s: float
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Change:
    """Something that happens to the cluster.

    add: one more replica, with the lowest rank that is free, after `start_s`. drain: the replica of that rank takes no more
    requests, and goes when it has none and has handed over what it can (Cluster.drain_s). lose: it is gone at once; another
    one takes its rank after `restart_s`, empty. roll: every replica is replaced, as Serve does it for a change of
    options; not simulated.
    """

    time_s: float
    what: Literal["add", "drain", "lose", "roll"]
    rank: int = 0
    restart_s: float = 60.0
    start_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What is simulated.

    make_core: an engine core for one replica. cost: of its steps. bytes_per_block: of all tiers. links: by slow tier.
    network: between replicas that hand over; then cores have a tier of peers. None = they do not.
    drain_s: how long a replica that drains hands over at most, beside its last requests and after them. Requests that run for
        longer, by SHUTDOWN_S, go on elsewhere, as if it were lost.
    num_ingresses: each hears of the loads by itself; turns come in at one after the other.
    kv_hints: as of the cores; whether clients say anything, or the cluster learns it.
    """

    make_core: Callable[[], EngineCore]
    cost: StepCost
    router: Router
    num_replicas: int = 1
    bytes_per_block: float = 0.0
    links: tuple[tuple[str, LinkSpec], ...] = ()
    network: NetworkSpec | None = None
    kv_hints: str = "off"
    drain_s: float = 18.0
    num_ingresses: int = 1
    changes: tuple[Change, ...] = ()


def make_links(links: Iterable[tuple[str, LinkSpec]]) -> dict[str, tuple[Link, Link]]:
    """From and to each slow tier, for one replica."""
    return {
        name: (Link(spec.read_bytes_per_s, spec.latency_s), Link(spec.write_bytes_per_s, spec.latency_s))
        for name, spec in links
    }
