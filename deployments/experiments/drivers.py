"""Actors on the nodes that send the load, each to the HTTP proxy of its own node, so that the client is not one machine."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine.bench.apis import Content, make_conversation
from engine.bench.client import Client, ClientFault, Endpoint
from engine.bench.driver import Driver, Load
from engine.bench.probe import probe
from engine.bench.processes import SESSIONS_PER_PROCESS
from engine.bench.turns import LoopLag, TurnRecord
from engine.errors import ConfigError
from engine.workloads.session import Session, Span, Turn

# From the order to the first session: all actors have it by then.
START_DELAY_S = 1.0
# How long an actor may take to start, and a proxy to answer, in seconds.
START_TIMEOUT_S = 120.0
PROXY_TIMEOUT_S = 10.0
# A replica is warm when it has answered so many requests; and so many are sent for that, for each replica, at most.
WARM_REQUESTS, MOST_WARM_REQUESTS = 2, 40
WARM_TOKENS = 48


class ReplicasNotWarmError(ConfigError):
    """Some replicas have not answered."""


@dataclass(frozen=True, slots=True)
class Driven:
    """What the actors sent. fault: why one of them could not."""

    records: tuple[TurnRecord, ...]
    lags: tuple[LoopLag, ...]
    fault: str = ""


class LoadDriver:
    """One process of the client."""

    def reaches(self, url: str) -> bool:
        """Whether there is a proxy on this node."""
        try:
            return httpx.get(f"{url}/-/healthz", timeout=PROXY_TIMEOUT_S, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def probe(self, endpoint: Endpoint, content: Content) -> Endpoint:
        """See engine/bench/probe.py. Raises ConfigError."""
        return asyncio.run(probe(endpoint, content)).endpoint

    def warm(self, endpoint: Endpoint, content: Content, num_replicas: int) -> int:
        """Ask until each replica has answered WARM_REQUESTS times. Returns how many have."""
        return asyncio.run(_warm(endpoint, content, num_replicas))

    def drive(
        self, endpoint: Endpoint, load: Load, sessions: Sequence[Session], start_s: float
    ) -> tuple[list[TurnRecord], LoopLag] | str:
        """All turns of these sessions, or what was wrong with the client. start_s: of the wall clock."""
        return asyncio.run(_drive(endpoint, load, sessions, start_s))


class Drivers:
    """The actors of an experiment: on each node with a proxy, `per_node` of them."""

    def __init__(self, url: str, per_node: int) -> None:
        """url: of the proxy, as its own node reaches it. Raises ConfigError if no node does."""
        actor = ray.remote(num_cpus=0)(LoadDriver)
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        made = [
            actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
            for node in nodes
            for _ in range(per_node)
        ]
        found = ray.get([each.reaches.remote(url) for each in made], timeout=START_TIMEOUT_S)
        self._actors = [each for each, is_there in zip(made, found, strict=True) if is_there]
        for each, is_there in zip(made, found, strict=True):
            if not is_there:
                ray.kill(each)
        if not self._actors:
            raise ConfigError(f"no node has an HTTP proxy at {url}; see http_options and proxy_location", param="port")

    def __len__(self) -> int:
        return len(self._actors)

    def probe(self, endpoint: Endpoint, content: Content) -> Endpoint:
        """The endpoint with its model and the fields that it takes. Raises ConfigError."""
        probed: Endpoint = ray.get(self._actors[0].probe.remote(endpoint, content))
        return probed

    def warm(self, endpoint: Endpoint, content: Content, num_replicas: int) -> None:
        """Raises ReplicasNotWarmError."""
        num_warm = ray.get(self._actors[0].warm.remote(endpoint, content, num_replicas))
        if num_warm < num_replicas:
            raise ReplicasNotWarmError(
                f"{num_warm} of {num_replicas} replicas have answered; the others get no requests"
            )

    def start(self, endpoint: Endpoint, load: Load, sessions: Sequence[Session]) -> tuple[list[Any], float]:
        """What to wait for, and when the load begins, by the wall clock."""
        count = min(len(self._actors), len(sessions), load.num_active or len(sessions))
        start_s = time.time() + START_DELAY_S
        references = []
        for number, each in enumerate(self._actors[:count]):
            own = load
            if load.num_active is not None:
                own = replace(load, num_active=load.num_active // count + (number < load.num_active % count))
            references.append(each.drive.remote(endpoint, own, list(sessions[number::count]), start_s))
        return references, start_s

    def collect(self, references: Sequence[Any]) -> Driven:
        """Of drives that are over."""
        records: list[TurnRecord] = []
        lags, fault = [], ""
        for answer in ray.get(list(references)):
            if isinstance(answer, str):
                fault = answer
                continue
            records += answer[0]
            lags.append(answer[1])
        return Driven(tuple(sorted(records, key=lambda record: record.end_s)), tuple(lags), fault)

    def close(self) -> None:
        for each in self._actors:
            ray.kill(each)


def num_drivers_per_node(num_sessions: int, num_nodes: int) -> int:
    """As few as drive so many sessions at once with ease."""
    return max(1, math.ceil(num_sessions / SESSIONS_PER_PROCESS / num_nodes))


async def _drive(
    endpoint: Endpoint, load: Load, sessions: Sequence[Session], start_s: float
) -> tuple[list[TurnRecord], LoopLag] | str:
    records: list[TurnRecord] = []
    indices = iter(range(len(sessions) + (load.num_active or 0)))  # each loop asks once more than there are
    client = Client(endpoint)
    driver = Driver(client, load, time.perf_counter() + start_s - time.time(), records.append)
    try:
        lag = await driver.run(sessions, lambda: next(indices))
        return records, lag
    except ClientFault as fault:
        return str(fault)
    finally:
        await client.close()


async def _warm(endpoint: Endpoint, content: Content, num_replicas: int) -> int:
    """Sessions of their own, so that the router spreads them."""
    client = Client(endpoint)
    answered: dict[str, int] = {}
    try:
        for number in range(MOST_WARM_REQUESTS * num_replicas):
            session = Session(f"warm.{number}", (Turn((Span(number, WARM_TOKENS),), 4),))
            conversation = make_conversation(endpoint.api, session, content)
            turn = session.turns[0]
            name = f"warm.{content.seed}.{number}"
            heard = await client.ask(client.request(conversation.ask(turn), turn.output_tokens, name), conversation)
            if heard.first_s is not None:
                answered[heard.replica] = answered.get(heard.replica, 0) + 1
            if sum(count >= WARM_REQUESTS for count in answered.values()) >= num_replicas:
                break
    finally:
        await client.close()
    return len(answered)
