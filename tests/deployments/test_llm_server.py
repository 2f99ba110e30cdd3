"""The engine replica over a fake engine: what it streams, what becomes of errors, what a cancellation reaches."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from traceback import format_exception
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from deployments import llm_server
from deployments.cluster.replica_feed import PEER_ADDRESS
from deployments.cluster.start_failure import EngineStartError, read_start_error
from deployments.errors import InternalError, ModelReplacedError
from deployments.generation import DeltaItem, ErrorItem, GenerationItem, GenerationRequest, ModelCard
from deployments.llm_server import LLMServer
from deployments.routing.load import ReplicaLoad
from deployments.routing.peers import Member
from deployments.routing.session_router import RANK
from engine.config import EngineConfig
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.request import SamplingParams
from engine.errors import ContextLengthError, EngineStoppedError, ExecutorError, ModelLoadError
from engine.generation import Generation
from engine.peer_network import PeerNetwork
from engine.tenant import Tenant
from engine.text.output import OutputDelta
from engine.text.prompt import AnswerBeginning, TextPrompt
from engine.text.transcript import Transcript

SECRET = "the prompt"
CONFIG = EngineConfig(max_num_seqs=96, max_num_queued_reqs=32)
TRANSCRIPT = Transcript(array("I", [7, 8]), "said")
NETWORK = PeerNetwork(b"secret", "10.0.0.1", "replica-4")


class FakeEngine:
    """Has AsyncEngine's face. Says `num_tokens` tokens as fast as it is asked, then raises `error` or ends."""

    model_name = "tiny"
    identity = "tiny's weights and tokenizer"
    max_model_len = 100
    adapter_names: tuple[str, ...] = ()
    token_compute_s = (0.5, 0.25)
    token_pull_s = 0.125

    def __init__(self) -> None:
        self.num_tokens = 3
        self.error: Exception | None = None
        self.hangs = False
        self.is_healthy = True
        self.calls: list[Generation] = []
        self.num_closed = 0
        self.is_shut_down = False
        self.drained_s: float | None = None
        self.handed_over_s: float | None = None
        self.next_home: Callable[[str], str | None] | None = None
        self.peer_address: tuple[str, int] | None = None
        self.peers: Mapping[str, tuple[str, int]] = {}
        self.next_peers: Callable[[str], Sequence[str]] = lambda _: ()
        self.problems: dict[str, str] = {}

    def identity_with(self, adapter: str) -> str:
        return f"{self.identity} {adapter}".strip()

    async def generate(self, generation: Generation) -> AsyncIterator[OutputDelta]:
        self.calls.append(generation)
        try:
            for i in range(self.num_tokens):
                await asyncio.sleep(0)
                is_last = i == self.num_tokens - 1 and self.error is None and not self.hangs
                reason, transcript = ("stop", TRANSCRIPT) if is_last else (None, None)
                yield OutputDelta(f"{i} ", (i,), num_output_tokens=i + 1, finish_reason=reason, transcript=transcript)
            if self.hangs:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
        finally:
            self.num_closed += 1

    def check_health(self) -> None:
        if not self.is_healthy:
            raise EngineStoppedError("dead")

    def get_statistics(self) -> dict[str, Any]:
        core = EngineCore(CacheConfig(num_gpu_blocks=1), SchedulingConfig(max_model_len=32))
        return core.get_statistics() | {
            "num_requests": len(self.calls),
            "num_swap_in_bytes": 0,
            "num_swap_out_bytes": 0,
            "num_awaited_swap_out_bytes": 0,
        }

    async def check_integrity(self) -> None:
        raise AssertionError("a block is lost")

    def tier_problems(self) -> dict[str, str]:
        return self.problems

    def set_peers(self, peers: Mapping[str, tuple[str, int]], next_peers: Callable[[str], Sequence[str]]) -> None:
        self.peers, self.next_peers = peers, next_peers

    async def hand_over(self, timeout_s: float, next_home: Callable[[str], str | None]) -> None:
        self.check_health()
        self.handed_over_s, self.next_home = timeout_s, next_home

    async def drain(self, timeout_s: float, next_home: Callable[[str], str | None] | None = None) -> None:
        self.check_health()
        assert not self.is_shut_down
        self.drained_s, self.next_home = timeout_s, next_home

    async def shutdown(self) -> None:
        self.is_shut_down = True


class CollectableServer(LLMServer):
    """Serve awaits a replica's `__del__`; the garbage collector would not, and warn."""

    def __del__(self) -> None:
        pass


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def server(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LLMServer]:
    context = SimpleNamespace(rank=SimpleNamespace(rank=4), replica_id=SimpleNamespace(unique_id="abc"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(llm_server, "log_engine_with_serve", lambda: None)  # it is for the whole process
    start_engine: Callable[..., Any] = lambda config, number, network: engine  # noqa: E731
    server = CollectableServer(CONFIG, stream_interval_s=0.0, start_engine=start_engine, join_network=lambda: NETWORK)
    yield server
    server._metrics.stop()


def request(*, stream: bool, returns_transcript: bool = False) -> GenerationRequest:
    return GenerationRequest(
        "id-1",
        "session",
        TextPrompt(SECRET),
        SamplingParams(seed=1),
        stream=stream,
        return_prompt_token_ids=True,
        tenant=Tenant("t", 2.0),
        beginning=AnswerBeginning((1,), 1),
        begun_by=FakeEngine.identity,
        returns_transcript=returns_transcript,
    )


async def items_of(server: LLMServer, *, stream: bool) -> list[GenerationItem]:
    return [item async for item in server.generate(request(stream=stream))]


@pytest.mark.parametrize("stream", [True, False])
async def test_transcripts_travel_only_to_whoever_keeps_them(server: LLMServer, stream: bool) -> None:
    for returns_transcript in (True, False):
        generation = request(stream=stream, returns_transcript=returns_transcript)
        *_, last = [item async for item in server.generate(generation)]
        assert isinstance(last, DeltaItem)
        assert last.delta.transcript == (TRANSCRIPT if returns_transcript else None)


async def test_stream_passes_deltas_on_with_the_rank(server: LLMServer, engine: FakeEngine) -> None:
    items = await items_of(server, stream=True)
    assert [(item.delta.text, item.replica_rank) for item in items if isinstance(item, DeltaItem)] == [
        ("0 ", 4),
        ("1 ", 4),
        ("2 ", 4),
    ]
    assert engine.calls == [request(stream=True)]


async def test_stream_waits_between_deltas_but_not_before_the_first_or_after_the_last(
    server: LLMServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    sleep = asyncio.sleep

    async def noted_sleep(delay: float) -> None:
        if delay:
            happened.append(f"sleep {delay}")
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted_sleep)
    server._stream_interval_s = 0.5
    async for item in server.generate(request(stream=True)):
        assert isinstance(item, DeltaItem)
        happened.append(item.delta.text)
    assert happened == ["0 ", "sleep 0.5", "1 ", "sleep 0.5", "2 "]


async def test_the_more_streams_speak_the_longer_each_waits(server: LLMServer, monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []
    sleep = asyncio.sleep

    async def noted_sleep(delay: float) -> None:
        if delay:
            delays.append(round(delay / llm_server.MESSAGE_INTERVAL_S))
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted_sleep)
    others = [server.generate(request(stream=True)) for _ in range(8)]
    for items in others[:7]:
        await anext(items)  # the eighth is waiting, and counts for nothing
    await items_of(server, stream=True)
    for items in others:
        await items.aclose()
    await items_of(server, stream=True)
    assert delays == [8, 8, 1, 1]


async def test_without_stream_one_item_says_all(server: LLMServer) -> None:
    (item,) = await items_of(server, stream=False)
    assert isinstance(item, DeltaItem)
    assert item.delta.text == "0 1 2 "
    assert item.delta.token_ids == (0, 1, 2)
    assert item.delta.finish_reason == "stop"


async def test_another_model_does_not_go_on_with_what_one_has_said(server: LLMServer, engine: FakeEngine) -> None:
    """A deploy that changes the model takes over the requests of replicas that it replaces."""
    begun = replace(request(stream=True), begun_by="another model auto")
    (error,) = [item async for item in server.generate(begun)]
    assert isinstance(error, ErrorItem)
    assert error.is_a(ModelReplacedError)
    assert engine.calls == []
    begun = replace(begun, beginning=None, begun_by="")  # nothing was said yet
    assert all([isinstance(item, DeltaItem) async for item in server.generate(begun)])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_request_is_an_item(server: LLMServer, engine: FakeEngine, stream: bool) -> None:
    engine.num_tokens, engine.error = 0, ContextLengthError("too long")
    assert await items_of(server, stream=stream) == [ErrorItem.of(ContextLengthError("too long"))]


async def test_a_failure_in_mid_stream_comes_after_what_was_said(server: LLMServer, engine: FakeEngine) -> None:
    engine.error = ExecutorError("the step failed")
    *said, error = await items_of(server, stream=True)
    assert len(said) == 3
    assert error == ErrorItem.of(ExecutorError("the step failed"))


async def test_a_stopped_engine_asks_to_come_back(server: LLMServer, engine: FakeEngine) -> None:
    engine.num_tokens, engine.error = 0, EngineStoppedError("stopped")
    (error,) = await items_of(server, stream=False)
    assert isinstance(error, ErrorItem)
    assert (error.kind, error.retry_after_s) == (EngineStoppedError.__name__, 1.0)


async def test_a_bug_is_logged_with_the_request_and_without_the_prompt(
    server: LLMServer, engine: FakeEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    engine.error = KeyError("bug")
    *_, error = await items_of(server, stream=True)
    assert error == ErrorItem.of(InternalError("internal error while serving id-1"))
    assert "request id-1 failed" in caplog.text
    assert "KeyError" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_reaches_the_engine(server: LLMServer, engine: FakeEngine, stream: bool) -> None:
    engine.hangs = True
    consumer = asyncio.create_task(items_of(server, stream=stream))
    for _ in range(20):
        await asyncio.sleep(0)
    assert engine.num_closed == 0
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert engine.num_closed == 1


async def test_closing_reaches_the_engine(server: LLMServer, engine: FakeEngine) -> None:
    items = server.generate(request(stream=True))
    await anext(items)
    await items.aclose()
    assert engine.num_closed == 1


async def test_what_serve_and_the_ingress_ask(server: LLMServer, engine: FakeEngine) -> None:
    assert await server.record_replica_metadata() == server.record_routing_stats() == {RANK: 4}
    assert await server.describe() == ModelCard("tiny", 100, 128)
    assert await server.get_statistics() == {"replica_rank": 4, "replica_id": "abc", **engine.get_statistics()}
    assert await server.get_load() == (4, ReplicaLoad(0, -96, 0.0, (0.5, 0.25), 0.125))
    server.check_health()
    with pytest.raises(AssertionError, match="a block is lost"):
        await server.check_integrity()
    engine.is_healthy = False
    with pytest.raises(EngineStoppedError):
        server.check_health()
    with pytest.raises(EngineStoppedError):
        await server.describe()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModelLoadError("'/data/models/tiny' has no config.json"), "'tiny' has no config.json"),
        (
            RuntimeError("DefaultCPUAllocator:\n  can't allocate memory"),
            "RuntimeError: DefaultCPUAllocator: can't allocate",
        ),
    ],
    ids=["expected", "unexpected"],
)
async def test_an_engine_that_cannot_start_says_why_in_its_log_and_to_serve(
    error: Exception, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_server, "log_engine_with_serve", lambda: None)
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(rank=SimpleNamespace(rank=4)))

    def start_engine(config: EngineConfig, number: int, network: PeerNetwork | None) -> Any:
        raise error

    server = object.__new__(CollectableServer)
    with pytest.raises(EngineStartError, match=reason) as info:
        server.__init__(CONFIG, 0.0, start_engine, join_network=lambda: NETWORK)  # type: ignore[misc]
    await LLMServer.__del__(server)  # as Serve does; what this raised would hide the cause in the log
    assert info.value.__cause__ is error
    assert ("RuntimeError: DefaultCPUAllocator" if isinstance(error, RuntimeError) else str(error)) in caplog.text
    # What Serve makes of it; see its replica.py and deployment_state.py.
    told = f"A replica failed to start with exception. Retrying. Error:\n{''.join(format_exception(info.value))}\n"
    assert str(read_start_error(told)).startswith(reason)


async def test_shutdown(server: LLMServer, engine: FakeEngine) -> None:
    num_tasks = len(asyncio.all_tasks())
    await LLMServer.__del__(server)
    assert engine.is_shut_down
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == num_tasks - 1, "the metrics keep the replica's event loop busy"


async def test_a_tier_that_is_not_used_is_told_where_readiness_is_asked_for(
    server: LLMServer, engine: FakeEngine
) -> None:
    assert (await server.describe()).warnings == ()
    engine.problems = {"disk": "No space left on device"}
    (warning,) = (await server.describe()).warnings
    assert warning == "replica 4: the disk tier is not used at present, and is tried again: No space left on device"


@pytest.mark.parametrize("is_healthy", [True, False])
async def test_kv_is_brought_to_the_disk_before_a_replica_ends(
    server: LLMServer, engine: FakeEngine, is_healthy: bool
) -> None:
    server._drain_s = 18.0
    engine.is_healthy = is_healthy
    await LLMServer.__del__(server)
    assert engine.drained_s == (18.0 if is_healthy else None)
    assert engine.is_shut_down


class FakeServe:
    """Tells a replica which replicas run."""

    def __init__(self) -> None:
        self.tell: Callable[[Sequence[Member]], None] = lambda members: None

    async def follow(self, on_members: Callable[[Sequence[Member]], None]) -> None:
        self.tell = on_members
        await asyncio.Event().wait()


@pytest.fixture
async def serve_and_server(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[FakeServe, LLMServer]]:
    """A replica that hands KV over, and has told Serve so."""
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(rank=SimpleNamespace(rank=4)))
    monkeypatch.setattr(llm_server, "log_engine_with_serve", lambda: None)
    fake = FakeServe()
    monkeypatch.setattr(llm_server, "follow_replicas", fake.follow)
    engine.peer_address = ("10.0.0.1", 7004)
    networks: list[PeerNetwork | None] = []

    def start_engine(config: EngineConfig, number: int, network: PeerNetwork | None) -> Any:
        networks.append(network)
        return engine

    server = CollectableServer(CONFIG, 0.0, start_engine, drain_s=18.0, join_network=lambda: NETWORK)
    assert networks == [NETWORK]
    assert await server.record_replica_metadata() == {RANK: 4, PEER_ADDRESS: ("10.0.0.1", 7004)}
    await asyncio.sleep(0)
    yield fake, server
    server._metrics.stop()


OTHER = Member("replica-0", 0, ("10.0.0.2", 7000))


async def test_the_engine_hears_of_its_peers_and_where_conversations_go(
    serve_and_server: tuple[FakeServe, LLMServer], engine: FakeEngine
) -> None:
    fake, server = serve_and_server
    fake.tell([OTHER, Member("replica-4", 4, ("10.0.0.1", 7004))])
    assert engine.peers == {"replica-0": ("10.0.0.2", 7000)}
    assert engine.next_peers("tenant\nsession") == ["replica-0"]
    num_tasks = len(asyncio.all_tasks())
    await LLMServer.__del__(server)
    assert engine.drained_s == 18.0
    assert engine.next_home is not None
    assert engine.next_home("tenant\nsession") == "replica-0"
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == num_tasks - 2, "it still follows, or measures"


async def test_a_drain_ends_in_the_time_that_serve_gives_from_the_stop_on(
    serve_and_server: tuple[FakeServe, LLMServer], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, server = serve_and_server
    now = 100.0
    monkeypatch.setattr(llm_server.time, "monotonic", lambda: now)
    fake.tell([OTHER, Member("replica-4", 4, ("10.0.0.1", 7004))])
    fake.tell([OTHER])
    now = 105.0  # its requests have ended
    await LLMServer.__del__(server)
    assert engine.drained_s == 13.0


@pytest.mark.parametrize(
    "options",
    [{"kv_handover": "off"}, {"mode": "stateless"}],
    ids=["off", "stateless"],
)
async def test_a_replica_that_hands_nothing_over_needs_no_secret(
    options: dict[str, Any], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(rank=SimpleNamespace(rank=4)))
    monkeypatch.setattr(llm_server, "log_engine_with_serve", lambda: None)
    networks: list[PeerNetwork | None] = []

    def start_engine(config: EngineConfig, number: int, network: PeerNetwork | None) -> Any:
        networks.append(network)
        return engine

    def join_network() -> PeerNetwork:
        raise AssertionError("not asked for")

    server = CollectableServer(EngineConfig(**options), 0.0, start_engine, join_network=join_network)
    server._metrics.stop()
    assert networks == [None]
    assert await server.record_replica_metadata() == {RANK: 4}
