"""The engine replica: one AsyncEngine behind a Serve deployment.

Turns its output into few, plain items and its errors into values. Knows no HTTP; decides nothing about scheduling or
caching.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from ray import serve

from deployments.cluster.adapters import wanted_adapters
from deployments.cluster.autoscaling import KV_USE, SEATS, WAITING_TOKENS
from deployments.cluster.coalesced import Coalesced
from deployments.cluster.replica_feed import PEER_ADDRESS, follow_replicas, join_network
from deployments.cluster.start_failure import start_error
from deployments.engine_log import log_engine_with_serve, named
from deployments.errors import InternalError, ModelReplacedError
from deployments.generation import (
    CacheHold,
    DeltaItem,
    ErrorItem,
    GenerationItem,
    GenerationRequest,
    KeptConversation,
    ModelCard,
    ReplicaCache,
)
from deployments.metrics import EngineMetrics, MetricsNames
from deployments.routing.load import LoadMeter, ReplicaLoad
from deployments.routing.peers import Address, Member, Peers
from deployments.routing.session_router import RANK
from deployments.traces import ReplicaTraces, start_tracing
from engine.cache_view import CacheQuery
from engine.config import EngineConfig
from engine.core.retention import ConversationCache, RetentionHint
from engine.errors import EngineStoppedError, PensieveError
from engine.peer_network import PeerNetwork
from engine.text.output import OutputDelta, merge_deltas, with_unix_time

if TYPE_CHECKING:
    from engine.async_engine import AsyncEngine

# Serve writes this logger to the replica's own file, with the HTTP request id on each line.
logger = logging.getLogger("ray.serve")

# What the way of one message through Serve costs, about, in seconds of several processes' time. The streams of a replica
# together send no more than one in that time: with many of them each has to bring more, or the engine would starve.
MESSAGE_INTERVAL_S = 0.002
# A replica that is not among those that run for so long, in seconds, is stopped, and not only told new options.
LEAVE_S = 1.0
# How long a replica that is asked what it serves waits for adapters that it still loads, in seconds.
DESCRIBE_WAIT_S = 2.0


def start_engine(config: EngineConfig, number: int, network: PeerNetwork | None) -> AsyncEngine:
    # Here and not above: what builds the application, and the ingress, need neither torch nor its 300 MB.
    from engine.async_engine import AsyncEngine

    if config.tensor_parallel_size == 1:
        return AsyncEngine(config, number=number, network=network)
    from deployments.cluster.tp_group import start_group

    return AsyncEngine(config, start_group, number, network)


class LLMServer:
    """One engine and its stream of answers.

    stream_interval_s: the first token of an answer goes out at once, later ones at most this often, and less often with
    many streams; one Serve message a token would cost more than the token.
    drain_s: how long KV is brought to the disk tier, if there is one, and to other replicas, when this one is stopped; from
        the time on at which Serve stops it.
    traces: of requests; see WatchOptions.
    metrics_names: see EngineMetrics.
    num_fallback_replicas: besides its home, that the ingress may ask for a session's request.
    """

    def __init__(
        self,
        config: EngineConfig,
        stream_interval_s: float,
        start_engine: Callable[[EngineConfig, int, PeerNetwork | None], AsyncEngine] = start_engine,
        drain_s: float = 0.0,
        join_network: Callable[[], PeerNetwork] = join_network,
        traces: str = "off",
        wanted_adapters: Callable[[], dict[str, str]] = wanted_adapters,
        metrics_names: MetricsNames = "pensieve",
        num_fallback_replicas: int = 1,
    ) -> None:
        """Blocking. Raises EngineStartError; Serve tries again, keeps the replicas that it has, and tells the reason."""
        self._is_started = False
        self._config = config
        self._stream_interval_s = stream_interval_s
        self._num_speaking = 0
        self._drain_s = drain_s
        self._load_meter = LoadMeter()
        log_engine_with_serve()
        self._traces = None if traces == "off" else ReplicaTraces(start_tracing(traces))
        start_s = time.monotonic()
        try:
            network = join_network() if config.may_hand_over else None
            self._engine = start_engine(config, self.replica_rank(), network)
        except Exception as error:
            if isinstance(error, PensieveError):
                logger.error("the engine cannot start: %s", error)
            else:
                logger.exception("the engine cannot start")
            raise start_error(error) from error
        self._log_start(time.monotonic() - start_s)
        self._metrics = EngineMetrics(self._engine.get_statistics, metrics_names, self._engine.model_name)
        self._metrics.start()
        self._peers: Peers | None = None
        if network is not None and self._engine.peer_address is not None:
            self._peers = Peers(network.peer_id, drain_s, num_fallback_replicas, self._set_peers)
        # Of those that were loaded at run time: their folders, and why some are not there.
        self._run_time_adapters: dict[str, str] = {}
        self._adapter_problems: dict[str, str] = {}
        self._adjusting = asyncio.Lock()
        self._adjusted = Coalesced(self.adjust_adapters, 0.0)
        self._wanted_adapters = wanted_adapters
        self._following: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._is_started = True

    def _log_start(self, load_s: float) -> None:
        statistics = self._engine.get_statistics()
        logger.info(
            "%s is ready after %.1f s: window of %d tokens, %d blocks in the GPU tier and %d in the CPU tier, "
            "%d requests may run and %d wait",
            self._engine.model_name,
            load_s,
            self._engine.max_model_len,
            statistics["num_gpu_blocks"],
            statistics["num_cpu_blocks"],
            self._config.max_num_seqs,
            self._config.max_num_queued_reqs,
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        """The answer as DeltaItems, or what was got of it and an ErrorItem. Closing or cancelling aborts the request.

        Pieces come fewer and larger than the engine makes them: in the pauses the engine merges what comes.
        """
        if request.adapter and request.adapter not in self._engine.adapter_names:
            await self.adjust_adapters()  # it was loaded while this replica was not there
        identity = self._engine.identity_with(request.adapter)
        if request.beginning is not None and request.begun_by != identity:
            yield ErrorItem.of(ModelReplacedError("a deploy replaced the model during this answer; ask again"))
            return
        answer = self._engine.generate(request)
        rank = self.replica_rank()
        observe = self._metrics.observe_answer(is_resumed=request.beginning is not None)
        parts: list[OutputDelta] = []  # of an answer that goes out whole
        is_speaking = False
        try:
            # aclosing: the engine has to hear of it now, and not when garbage is collected.
            async with aclosing(cast(AsyncGenerator[OutputDelta, None], answer)) as deltas:
                async for delta in deltas:
                    if not (request.only_encodes or request.prewarms):  # for which no client waits
                        observe(delta)
                    if delta.explanation is not None and self._traces is not None:
                        self._traces.add_phases(request.origin, delta.explanation, rank)
                    if not request.stream:
                        parts.append(delta)
                        continue
                    if not is_speaking:
                        is_speaking = True
                        self._num_speaking += 1
                    yield self._item(delta, request, rank, identity)
                    if delta.finish_reason is None:
                        await asyncio.sleep(max(self._stream_interval_s, self._num_speaking * MESSAGE_INTERVAL_S))
            if parts:
                whole = replace(merge_deltas(parts), prompt_transcript=None)  # nothing of it will be resumed
                yield self._item(whole, request, rank, identity)
        except PensieveError as error:
            yield ErrorItem.of(error)
        except Exception:
            # Never the prompt: logs are read by more people than conversations are.
            logger.exception("request %s failed", request.request_id, extra=named(request.origin.request_id))
            yield ErrorItem.of(InternalError(f"internal error while serving {request.request_id}"))
        finally:
            self._num_speaking -= is_speaking

    @staticmethod
    def _item(delta: OutputDelta, request: GenerationRequest, rank: int, identity: str) -> DeltaItem:
        """A piece as it travels. A transcript is as long as the conversation: it stays here unless the ingress keeps it."""
        if delta.transcript is not None and not request.returns_transcript:
            delta = replace(delta, transcript=None)
        return DeltaItem(delta, rank, identity)

    async def describe(self) -> ModelCard:
        """Also the sign of life that readiness asks for. Raises EngineStoppedError if the engine is dead."""
        self._engine.check_health()
        max_num_requests = self._config.max_num_seqs + self._config.max_num_queued_reqs
        warnings = tuple(
            f"replica {self.replica_rank()}: the {tier} tier is not used at present, and is tried again: {why}"
            for tier, why in self._engine.tier_problems().items()
        )
        with suppress(TimeoutError):  # it serves meanwhile
            async with asyncio.timeout(DESCRIBE_WAIT_S):
                await self._adjusted()
        warnings += tuple(f"replica {self.replica_rank()}: {why}" for why in self._adapter_problems.values())
        names = self._engine.adapter_names
        return ModelCard(
            self._engine.model_name,
            self._engine.max_model_len,
            max_num_requests,
            warnings,
            names,
            may_load_adapters=self._config.adapter_folder is not None,
        )

    async def adjust_adapters(self) -> dict[str, str]:
        """Load and unload adapters until they are those that the application is to have; why some could not be, by name.

        Which these are lies in Ray's control store, so that a replica that starts later has them, too. Goes on to its end
        when its caller is cancelled: a thread that loads cannot be.
        """
        if self._config.adapter_folder is None:
            return {}
        return await asyncio.shield(asyncio.create_task(self._adjust_adapters()))

    async def _adjust_adapters(self) -> dict[str, str]:
        async with self._adjusting:
            wanted, configured = await asyncio.to_thread(self._wanted_adapters), self._config.adapters or {}
            self._adapter_problems = {}
            for name in self._engine.adapter_names:
                if name not in configured and wanted.get(name) != self._run_time_adapters.get(name):
                    await self._engine.unload_adapter(name)
                    del self._run_time_adapters[name]
            for name, folder in wanted.items():
                if name in self._engine.adapter_names:
                    continue
                try:
                    await self._engine.load_adapter(name, folder)
                    self._run_time_adapters[name] = folder
                except PensieveError as error:
                    self._adapter_problems[name] = error.message
                except Exception:  # one adapter is not to keep the others, and the replica, from serving
                    logger.exception("the adapter %r could not be loaded", name)
                    self._adapter_problems[name] = f"internal error while loading the adapter {name!r}"
            return dict(self._adapter_problems)

    async def get_statistics(self) -> dict[str, Any]:
        replica_id = serve.get_replica_context().replica_id.unique_id
        return {"replica_rank": self.replica_rank(), "replica_id": replica_id, **self._engine.get_statistics()}

    async def get_load(self) -> tuple[int, ReplicaLoad]:
        """The rank, and how busy the replica is."""
        statistics = self._engine.get_statistics()
        return self.replica_rank(), self._load_meter.load(
            num_running=statistics["num_requests_running"],
            num_waiting=statistics["num_requests_waiting"],
            num_ended=statistics["num_finished"] + statistics["num_aborted"] + statistics["num_failed"],
            max_num_seqs=self._config.max_num_seqs,
            compute_s=self._engine.token_compute_s,
            pull_s=self._engine.token_pull_s,
            now=time.monotonic(),
        )

    async def map_cache(self, query: CacheQuery) -> ReplicaCache:
        """Where the chunks are, for watchers. Raises EngineStoppedError."""
        return ReplicaCache(self.replica_rank(), await self._engine.map_cache(query))

    async def keep(
        self, conversation_id: str, hint: RetentionHint | None, *, even_unknown: bool = False
    ) -> KeptConversation | None:
        """Keeps a conversation as the hint says, or only looks at it; None if it is not known here.

        even_unknown: it may come later. Raises EngineStoppedError.
        """
        found = await self._engine.cache_state(conversation_id)
        if found is None and not even_unknown:
            return None
        outcome = None
        if hint is not None:
            outcome = with_unix_time(await self._engine.retain(conversation_id, hint))
            found = await self._engine.cache_state(conversation_id)
        return KeptConversation(self.replica_rank(), found or ConversationCache(0, {}, hint), outcome)

    async def hold_back(self, hold: CacheHold) -> int:
        """Makes the tiers smaller, or gives back what was taken; returns the rank. Raises EngineStoppedError."""
        await self._engine.hold_back(gpu_blocks_left=hold.gpu_blocks, cpu_blocks_left=hold.cpu_blocks)
        return self.replica_rank()

    async def check_integrity(self) -> None:
        """Raises AssertionError if an invariant of the cache does not hold."""
        await self._engine.check_integrity()

    def replica_rank(self) -> int:
        """Asked each time: Serve may change it after a scale-down."""
        return int(serve.get_replica_context().rank.rank)

    def _set_peers(self, addresses: Mapping[str, Address]) -> None:
        assert self._peers is not None
        self._engine.set_peers(addresses, self._peers.next_peers)

    def _note_members(self, peers: Peers, members: Sequence[Member]) -> None:
        peers.update(members, time.monotonic())
        if peers.left_s is not None and self._leaving is None:
            self._leaving = asyncio.create_task(self._leave(peers))
        elif peers.left_s is None and self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    async def _leave(self, peers: Peers) -> None:
        """Hand KV over while the last requests are answered: that may take all the time that Serve gives."""
        await asyncio.sleep(LEAVE_S)
        with suppress(EngineStoppedError):
            await self._engine.hand_over(self._drain_s, peers.next_home)

    # -- what Serve calls by name ------------------------------------------------------------------

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Serve asks once, when the replica is ready, and tells the others."""
        if self._peers is None:
            return {RANK: self.replica_rank()}
        if self._following is None:
            peers = self._peers
            self._following = asyncio.create_task(follow_replicas(lambda members: self._note_members(peers, members)))
        return {RANK: self.replica_rank(), PEER_ADDRESS: self._engine.peer_address}

    def record_routing_stats(self) -> dict[str, Any]:
        return {RANK: self.replica_rank()}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For TokensAndKV; Serve asks if there is an autoscaling_config."""
        statistics = self._engine.get_statistics()
        first = statistics["tiers"][0]
        return {
            WAITING_TOKENS: float(statistics["num_tokens_waiting"]),
            KV_USE: statistics[f"num_{first}_blocks_pinned"] / statistics[f"num_{first}_blocks"],
            SEATS: statistics["num_requests_running"] / self._config.max_num_seqs,
        }

    def check_health(self) -> None:
        """Raises EngineStoppedError, and Serve replaces the replica."""
        self._engine.check_health()

    async def __del__(self) -> None:
        if not self._is_started:  # Serve calls this also when the constructor has failed
            return
        self._metrics.stop()
        drain_s, next_home = self._drain_s, None
        if self._peers is not None:
            next_home = self._peers.next_home
            if self._peers.left_s is not None:  # Serve has waited for requests since
                drain_s = max(0.0, drain_s - (time.monotonic() - self._peers.left_s))
        if self._leaving is not None:
            self._leaving.cancel()
        with suppress(EngineStoppedError):  # it is dead, and that is why the replica is stopped
            await self._engine.drain(drain_s, next_home)
        if self._following is not None:
            self._following.cancel()
        await self._engine.shutdown()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)
