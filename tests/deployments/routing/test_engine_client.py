"""The ingress's side of the handle.

Sessions are passed on, Ray's exceptions become items, and what is read no more is cancelled.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator
from contextvars import Context
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayActorError
from ray.serve.context import _get_serve_request_context
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from deployments.errors import (
    InternalError,
    ModelNotLoadedError,
    NoReplicaError,
    ReplicaLostError,
    ReplicaNotPlacedError,
)
from deployments.generation import CacheHold, DeltaItem, ErrorItem, GenerationRequest, ModelCard, ReplicaCache
from deployments.origin import Origin
from deployments.routing import engine_client, presence, resumption
from deployments.routing.engine_client import EngineClient
from deployments.routing.load import ReplicaLoad
from deployments.routing.rendezvous import rank_replicas
from engine.cache_view import CacheQuery, CacheView
from engine.core.request import SamplingParams
from engine.errors import EngineStoppedError, OverloadedError, RequestError
from engine.text.output import OutputDelta
from engine.text.prompt import AnswerBeginning, TextPrompt
from engine.text.transcript import Transcript
from tests.deployments.test_request_log import EXPLANATION

REQUEST = GenerationRequest("id-1", "session-1", TextPrompt("hi"), SamplingParams(temperature=0.0), stream=True)
ITEM = DeltaItem(OutputDelta("a"), 0)
CARD = ModelCard("tiny", 100, 128)


def load(num_requests: int, num_ahead: int = -9, turn_s: float = 0.0) -> ReplicaLoad:
    return ReplicaLoad(num_requests, num_ahead, turn_s, (0.001, 0.0))


class FakeHandle:
    """A DeploymentHandle as far as EngineClient uses it, and the response generator in one.

    Raises `error` after ITEM; or waits for ever.
    """

    def __init__(
        self, error: Exception | None = None, *, hangs: bool = False, answers: list[Any] | None = None
    ) -> None:
        self.error = error
        self.hangs = hangs
        self.answers = answers
        self.option_calls: list[dict[str, Any]] = []
        self.num_cancelled = 0
        self.num_broadcasts = 0
        self._items = self._stream()

    def options(self, **options: Any) -> FakeHandle:
        self.option_calls.append(options)
        return self

    @property
    def generate(self) -> FakeHandle:
        return self

    def remote(self, request: GenerationRequest) -> FakeHandle:
        assert request is REQUEST or request.sampling.seed is not None
        return self

    async def _stream(self) -> AsyncIterator[DeltaItem]:
        yield ITEM
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error

    def __aiter__(self) -> AsyncIterator[DeltaItem]:
        return self._items

    def cancel(self) -> None:
        self.num_cancelled += 1

    def broadcast(self, method: str, *arguments: Any) -> FakeHandle:
        assert method in ("describe", "get_load", "map_cache", "hold_back")
        self.broadcast_arguments = arguments
        self.num_broadcasts += 1
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        if self.answers is None:
            raise TimeoutError
        return self.answers


async def test_routes_by_session_and_passes_items_on() -> None:
    handle = FakeHandle()
    assert [item async for item in EngineClient(handle).generate(REQUEST)] == [ITEM]
    assert handle.option_calls == [{"stream": True, "session_id": "0|session-1"}]
    assert handle.num_cancelled == 0


async def test_what_ray_raises_becomes_an_item() -> None:
    handle = FakeHandle(RayServeException("odd"))
    first, last = [item async for item in EngineClient(handle).generate(REQUEST)]
    assert first == ITEM
    assert isinstance(last, ErrorItem)
    assert last.is_a(InternalError)
    assert last.retry_after_s is None
    assert handle.num_cancelled == 0  # it is over already


async def test_cancelling_cancels_the_call() -> None:
    handle = FakeHandle(hangs=True)

    async def consume() -> None:
        async for _ in EngineClient(handle).generate(REQUEST):
            pass

    consumer = asyncio.create_task(consume())
    for _ in range(5):
        await asyncio.sleep(0)
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert handle.num_cancelled == 1


async def test_closing_between_two_items_cancels_the_call() -> None:
    handle = FakeHandle(hangs=True)
    items = EngineClient(handle).generate(REQUEST)
    assert await anext(items) == ITEM
    await items.aclose()
    assert handle.num_cancelled == 1


async def test_one_replica_that_answers_is_enough() -> None:
    client = EngineClient(FakeHandle(answers=[ActorDiedError(), CARD]))
    assert await client.describe() == CARD


@pytest.mark.parametrize("answers", [None, [], [ActorDiedError()]])
async def test_no_replica_that_answers(answers: list[Any] | None) -> None:
    with pytest.raises(EngineStoppedError):
        await EngineClient(FakeHandle(answers=answers)).describe()


async def test_why_there_is_no_replica_is_said_and_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "LOOK_PERIOD_S", 0.0)
    waiting = EngineClient(FakeHandle(answers=[]), why_absent=lambda: ReplicaNotPlacedError("no room"))
    for _ in range(2):
        with pytest.raises(ReplicaNotPlacedError, match="no room") as info:
            await waiting.describe()
        assert type(info.value) is ReplicaNotPlacedError
    assert [record.getMessage() for record in caplog.records] == ["no room"]


async def test_all_who_ask_at_once_share_one_look() -> None:
    handle = FakeHandle(answers=[CARD])
    client = EngineClient(handle)
    assert await asyncio.gather(*(client.describe() for _ in range(20))) == [CARD] * 20
    assert handle.num_broadcasts == 1


async def test_the_model_card_is_known_without_replicas_and_follows_a_deploy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "LOOK_PERIOD_S", 0.0)
    handle = FakeHandle(answers=[CARD])
    client = EngineClient(handle)
    assert await client.model_card() == await client.model_card() == CARD
    assert handle.num_broadcasts == 1
    handle.answers = []
    monkeypatch.setattr(presence, "CARD_PERIOD_S", 0.0)
    assert await client.model_card() == CARD
    await asyncio.sleep(0.01)
    handle.answers = [replace(CARD, max_model_len=200)]
    assert await client.model_card() == CARD  # beside the requests
    await asyncio.sleep(0.01)
    assert (await client.model_card()).max_model_len == 200


# -- without replicas --------------------------------------------------------------------------------------------------


class Deploying(FakeHandle):
    """Has no replica at first: a request waits in the router, as Serve's do. `num_looks` looks later there is one."""

    def __init__(self, num_looks: int) -> None:
        super().__init__(answers=[])
        self.num_looks = num_looks
        self._is_up = asyncio.Event()

    async def _stream(self) -> AsyncIterator[DeltaItem]:
        await self._is_up.wait()
        yield DeltaItem(OutputDelta("a", (1,), finish_reason="stop"), 0)

    def broadcast(self, method: str) -> FakeHandle:
        if method == "get_load":
            return FakeHandle(answers=[])
        if self.num_broadcasts == self.num_looks:
            self.answers = [CARD]
            self._is_up.set()
        return super().broadcast(method)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "LOOK_PERIOD_S", 0.001)


@pytest.mark.usefixtures("soon")
async def test_a_request_without_a_replica_waits_for_one() -> None:
    handle = Deploying(3)
    client = EngineClient(handle, engine_wait_s=60)
    assert await client.model_card() == CARD
    handle = Deploying(3)
    client = EngineClient(handle, engine_wait_s=60)
    (item,) = [item async for item in client.generate(REQUEST)]
    assert isinstance(item, DeltaItem)
    assert handle.num_cancelled == 0


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("error", "wait_s"),
    [(NoReplicaError("starting"), 0.05), (ModelNotLoadedError("no such folder", is_final=True), 60.0)],
    ids=["bounded", "not where it is no use"],
)
async def test_waiting_has_an_end(error: NoReplicaError, wait_s: float) -> None:
    handle = Deploying(10**9)
    client = EngineClient(handle, why_absent=lambda: error, engine_wait_s=wait_s)
    async with asyncio.timeout(10):
        (item,) = [item async for item in client.generate(REQUEST)]
        with pytest.raises(NoReplicaError):
            await client.model_card()
    assert isinstance(item, ErrorItem)
    assert item == ErrorItem.of(error)
    assert item.retry_after_s == error.retry_after_s
    assert handle.num_cancelled == 1


@pytest.mark.usefixtures("soon")
async def test_a_busy_replica_is_waited_for_as_long_as_it_takes() -> None:
    handle = Deploying(20)
    handle.answers = None  # describe times out
    (item,) = [item async for item in EngineClient(handle, engine_wait_s=0).generate(REQUEST)]
    assert isinstance(item, DeltaItem)


@pytest.mark.usefixtures("soon")
async def test_what_a_busy_replica_serves_is_waited_for_and_not_for_ever() -> None:
    """The first request to an ingress that is new, while a replica of the engine moves to another node."""
    handle = Deploying(3)
    handle.answers = None  # describe times out
    assert await EngineClient(handle, engine_wait_s=60).model_card() == CARD
    handle = Deploying(10**9)
    handle.answers = None
    async with asyncio.timeout(10):
        with pytest.raises(EngineStoppedError, match="no engine replica answered"):
            await EngineClient(handle, engine_wait_s=0.05).model_card()
    assert handle.num_broadcasts > 1


@pytest.mark.usefixtures("soon")
async def test_a_lost_request_waits_for_the_replacement_and_is_told_why_none_comes() -> None:
    handle = FakeReplicas([2], [ActorDiedError()])
    handle.answers = []
    client = EngineClient(
        handle, why_absent=lambda: ModelNotLoadedError("no such file", is_final=True), engine_wait_s=60
    )
    items = [item async for item in client.generate(REQUEST)]
    assert [item.delta.text for item in items if isinstance(item, DeltaItem)] == ["a", "b"]
    assert (items[-1].kind, items[-1].message) == (ModelNotLoadedError.__name__, "no such file")
    assert len(handle.requests) == 1


async def test_new_sessions_go_where_less_is_going_on() -> None:
    handle = FakeHandle(answers=[(0, load(0)), ActorDiedError(), (1, load(3))])
    client = EngineClient(handle)
    ids = [f"id-{i}" for i in range(200)]
    home = {name: rank_replicas(name, [0, 1])[0] for name in ids}
    assert client.choose_session_id(ids) == ids[0]  # nothing is known, and no request waits for it
    await asyncio.sleep(0.01)
    chosen = [home[client.choose_session_id(ids)] for _ in range(7)]
    assert (chosen.count(0), chosen.count(1)) == (5, 2)  # 3 more than the other had, then in turn
    assert handle.num_broadcasts == 1


async def test_replicas_whose_load_is_not_known_are_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "LOADS_PERIOD_S", 0.0)
    handle = FakeHandle(answers=None)  # a timeout
    client = EngineClient(handle)
    for num_broadcasts in (1, 2):
        assert client.choose_session_id(["a", "b"]) == "a"
        await asyncio.sleep(0.01)
        assert handle.num_broadcasts == num_broadcasts


# -- lost replicas -----------------------------------------------------------------------------------------------------


class FakeReplicas(FakeHandle):
    """Replicas that say "abcdef", a token a letter, from where they are told to begin.

    An attempt ends after its number of `cuts` tokens by its one of `errors`; the last one by itself.
    """

    def __init__(self, cuts: list[int], errors: list[Exception | ErrorItem]) -> None:
        super().__init__()
        self.cuts, self.errors = cuts, errors
        self.requests: list[GenerationRequest] = []

    def remote(self, request: GenerationRequest) -> FakeHandle:
        self.requests.append(request)
        self._items = self._say(request)
        return self

    async def _say(self, request: GenerationRequest) -> AsyncIterator[Any]:
        begun = 0 if request.beginning is None else len(request.beginning.token_ids)
        attempt = len(self.requests) - 1
        cut = self.cuts[attempt] if attempt < len(self.cuts) else 6
        for position in range(begun, min(6, begun + cut)):
            prompt_token_ids = (8, 9) if position == begun else ()
            last = "stop" if position == 5 else None
            text = "abcdef"[position]
            delta = OutputDelta(text, (position,), prompt_token_ids=prompt_token_ids, finish_reason=last)
            if last is not None and request.explains:
                delta = replace(delta, explanation=EXPLANATION)
            yield DeltaItem(delta, attempt, "the model")
        if attempt < len(self.errors):
            error = self.errors[attempt]
            if isinstance(error, ErrorItem):
                yield error
            else:
                raise error


STOPPED = ErrorItem.of(EngineStoppedError("dead"))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumption, "RESUME_BACKOFF_S", 0.0)


async def answer(handle: FakeHandle, request: GenerationRequest = REQUEST) -> tuple[str, list[Any]]:
    items = [item async for item in EngineClient(handle).generate(request)]
    return "".join(item.delta.text for item in items if isinstance(item, DeltaItem)), items


@pytest.mark.parametrize("error", [ActorDiedError(), RayActorError(), STOPPED], ids=repr)
@pytest.mark.parametrize("cut", range(6))
async def test_another_replica_goes_on_where_the_first_was_lost(cut: int, error: Any) -> None:
    handle = FakeReplicas([cut], [error])
    text, items = await answer(handle)
    assert text == "abcdef"
    assert [token for item in items for token in item.delta.token_ids] == list(range(6))
    assert [item.delta.prompt_token_ids for item in items] == [(8, 9), *[()] * 5]
    first, second = handle.requests
    assert first == REQUEST
    assert second.request_id != first.request_id
    expected = AnswerBeginning(tuple(range(cut)), cut) if cut else None
    begun_by = "the model" if cut else ""
    assert second == replace(REQUEST, request_id=second.request_id, beginning=expected, begun_by=begun_by)
    assert {tuple(call.items()) for call in handle.option_calls} == {(("stream", True), ("session_id", "0|session-1"))}


async def test_an_explanation_tells_the_way_and_what_was_lost_on_it() -> None:
    asked = replace(REQUEST, explains=True, origin=Origin("mine-1"))
    handle = FakeReplicas([2], [ActorDiedError()])
    handle.answers = [(0, load(0)), (1, load(0)), CARD]
    client = EngineClient(handle)
    client.choose_session_id(["any"])  # asks for the loads
    await asyncio.sleep(0.01)
    items = [item async for item in client.generate(asked)]
    assert [item.delta.explanation is None for item in items] == [*[True] * 5, False]
    route = items[-1].delta.explanation.route
    assert (route.replica_rank, route.is_home) == (1, rank_replicas("session-1", [0, 1])[0] == 1)
    assert [(loss.kind, loss.num_output_tokens) for loss in route.losses] == [("ReplicaLostError", 2)]
    assert route.begun_s <= route.losses[0].at_s
    assert route.lost_s > 0
    assert {request.origin for request in handle.requests} == {asked.origin}

    items = [item async for item in EngineClient(FakeReplicas([], [])).generate(asked)]
    assert items[-1].delta.explanation.route.is_home is None, "nothing is known of the replicas yet"


async def test_calls_in_a_context_of_their_own_have_the_id_of_the_request() -> None:
    """As those of several choices; else Serve makes them ids, and the replica's log lines have these."""
    seen = []

    class Handle(FakeReplicas):
        def remote(self, request: GenerationRequest) -> FakeHandle:
            seen.append(_get_serve_request_context().request_id)
            return super().remote(request)

    async def consume(client: EngineClient, name: str) -> None:
        async for _ in client.generate(replace(REQUEST, origin=Origin(name))):
            pass

    client = EngineClient(Handle([], []))
    for name in ("mine-1", "mine-2"):
        await asyncio.create_task(consume(client, name), context=Context())
    assert seen == ["mine-1", "mine-2"]


async def test_as_often_as_it_gets_on() -> None:
    text, _ = await answer(FakeReplicas([1, 0, 0, 2, 0, 1, 1], [ActorDiedError()] * 7))
    assert text == "abcdef"


async def test_what_kills_every_replica_is_given_up() -> None:
    handle = FakeReplicas([2], [ActorDiedError()])
    handle.cuts, handle.errors = [2, *[0] * 50], [ActorDiedError()] * 50
    text, items = await answer(handle)
    assert text == "ab"
    assert items[-1].is_a(ReplicaLostError)
    assert len(handle.requests) == 1 + resumption.MAX_LOSSES_IN_A_ROW


async def test_a_replica_lost_after_the_last_token_is_not_missed() -> None:
    text, items = await answer(FakeReplicas([6], [ActorDiedError()]))
    assert (text, len(items)) == ("abcdef", 6)


async def test_an_error_of_the_request_is_not_tried_again() -> None:
    handle = FakeReplicas([0], [ErrorItem.of(RequestError("no"))])
    _, items = await answer(handle)
    assert [item.kind for item in items] == [RequestError.__name__]
    assert len(handle.requests) == 1


async def test_all_attempts_sample_with_one_seed() -> None:
    handle = FakeReplicas([2, 1], [ActorDiedError()] * 2)
    await answer(handle, replace(REQUEST, sampling=SamplingParams(temperature=1.0)))
    seeds = {request.sampling.seed for request in handle.requests}
    assert len(seeds) == 1
    assert None not in seeds
    await answer(handle, REQUEST)
    assert handle.requests[-1].sampling.seed is None


# -- full replicas -----------------------------------------------------------------------------------------------------

FULL = ErrorItem.of(OverloadedError("full"))


def asked(handle: FakeReplicas) -> list[str]:
    return [call["session_id"] for call in handle.option_calls]


async def test_the_next_choice_is_asked_where_the_home_is_full() -> None:
    handle = FakeReplicas([0], [FULL])
    text, items = await answer(handle)
    assert (text, len(items)) == ("abcdef", 6)
    assert asked(handle) == ["0|session-1", "1|session-1"]
    assert len({request.request_id for request in handle.requests}) == 2


@pytest.mark.parametrize(
    ("full", "retry_after_s"), [(FULL, 1.0), (BackPressureError(5, 5, 429, 2.0), 2.0)], ids=["engine", "serve"]
)
@pytest.mark.parametrize("num_fallbacks", [0, 1, 2])
async def test_no_more_are_asked_than_may_be(
    num_fallbacks: int, full: ErrorItem | Exception, retry_after_s: float
) -> None:
    handle = FakeReplicas([0] * 9, [full] * 9)
    items = [item async for item in EngineClient(handle, num_fallbacks).generate(REQUEST)]
    assert [(item.kind, item.retry_after_s) for item in items] == [(OverloadedError.__name__, retry_after_s)]
    assert asked(handle) == [f"{number}|session-1" for number in range(1 + num_fallbacks)]


async def test_a_replica_lost_after_a_spill_is_resumed_where_the_spill_went() -> None:
    handle = FakeReplicas([0, 3], [FULL, ActorDiedError()])
    text, _ = await answer(handle)
    assert text == "abcdef"
    assert asked(handle) == ["0|session-1", "1|session-1", "1|session-1"]


async def test_whoever_was_lost_is_patient_with_full_replicas() -> None:
    """They are full of those that were lost with it: its answer has begun, and must not end for that."""
    handle = FakeReplicas([2, *[0] * 5], [ActorDiedError(), *[FULL] * 5])
    text, items = await answer(handle)
    assert text == "abcdef"
    assert all(isinstance(item, DeltaItem) for item in items)
    home_and_next = ["0|session-1", "1|session-1"]
    assert asked(handle) == ["0|session-1", *home_and_next * 3]


async def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumption, "RESUME_PATIENCE_S", 0.0)
    text, items = await answer(FakeReplicas([2, *[0] * 5], [ActorDiedError(), *[FULL] * 5]))
    assert (text, items[-1].kind) == ("ab", OverloadedError.__name__)


async def test_the_next_replica_is_told_the_prompt_as_it_was_tokenised() -> None:
    """The first one knew tokens of the history that no tokenizer would give; without them, the rest would not be the rest."""
    history = Transcript(array("I", [7, 8, 9]), "hi")

    class Remembers(FakeReplicas):
        async def _say(self, request: GenerationRequest) -> AsyncIterator[Any]:
            is_first = True
            async for item in super()._say(request):
                if is_first and isinstance(item, DeltaItem):
                    item = replace(item, delta=replace(item.delta, prompt_transcript=history))
                is_first = False
                yield item

    handle = Remembers([2, 0, 2], [ActorDiedError()] * 3)
    text, items = await answer(handle)
    assert text == "abcdef"
    assert [request.history for request in handle.requests] == [None, history, history, history]
    assert [request.beginning.prompt for request in handle.requests[1:] if request.beginning] == [history] * 3
    assert {item.delta.prompt_transcript for item in items} == {None}


async def test_deployment_that_failed_to_start() -> None:
    from ray.serve._private.common import DeploymentID

    errors = [DeploymentUnavailableError(DeploymentID(name="LLMServer"))] * 50
    *_, last = (await answer(FakeReplicas([0] * 50, errors)))[1]
    assert isinstance(last, ErrorItem)
    assert last.is_a(ReplicaLostError)


async def test_the_cache_is_that_of_the_replicas_that_answer_in_the_order_of_their_ranks() -> None:
    view = CacheView(32, (), {}, (), ())
    handle = FakeHandle(answers=[ReplicaCache(2, view), ActorDiedError(), ReplicaCache(0, view)])
    query = CacheQuery(("acme",))
    assert await EngineClient(handle).map_cache(query) == [ReplicaCache(0, view), ReplicaCache(2, view)]
    assert handle.broadcast_arguments == (query,)
    assert await EngineClient(FakeHandle()).map_cache(query) == []  # none answers in time


async def test_all_replicas_are_told_to_hold_back_blocks() -> None:
    handle = FakeHandle(answers=[1, ActorDiedError(), 0])
    assert await EngineClient(handle).hold_back(CacheHold(8, 4)) == [0, 1]
    assert handle.broadcast_arguments == (CacheHold(8, 4),)


# -- busy replicas -----------------------------------------------------------------------------------------------------


class BusyReplicas(FakeReplicas):
    """Its home has a queue that takes `wait_s`; the other choice has room."""

    def __init__(self, cuts: list[int], errors: list[Exception | ErrorItem], wait_s: float) -> None:
        super().__init__(cuts, errors)
        home = rank_replicas(REQUEST.session_id, [0, 1])[0]
        self.answers = [(home, load(20, 10, wait_s / 10)), (1 - home, load(0))]


@pytest.mark.parametrize(("wait_s", "passed"), [(2.0, "1"), (0.5, "0")])
async def test_a_session_does_not_wait_where_another_replica_has_room(wait_s: float, passed: str) -> None:
    handle = BusyReplicas([], [], wait_s)
    client = EngineClient(handle)
    for expected in ("0", passed):
        items = [item async for item in client.generate(REQUEST)]
        assert len(items) == 6
        assert asked(handle)[-1] == f"{expected}|session-1"
        await asyncio.sleep(0.01)  # the loads are known from now on


async def test_one_that_has_no_room_after_all_was_not_asked() -> None:
    handle = BusyReplicas([6, 0, 0, 0], [STOPPED, FULL, FULL, FULL], 2.0)
    client = EngineClient(handle)
    assert len([item async for item in client.generate(REQUEST)]) == 6
    await asyncio.sleep(0.01)
    (item,) = [item async for item in client.generate(REQUEST)]
    assert item.is_a(OverloadedError)
    assert [name.partition("|")[0] for name in asked(handle)] == ["0", "1", "0", "1"]


async def test_without_fallbacks_a_session_is_only_at_home() -> None:
    handle = BusyReplicas([], [], 100.0)
    client = EngineClient(handle, num_fallback_replicas=0)
    for _ in range(2):
        assert len([item async for item in client.generate(REQUEST)]) == 6
        await asyncio.sleep(0.01)
    assert set(asked(handle)) == {"0|session-1"}
