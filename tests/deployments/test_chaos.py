"""Engine replicas are killed, again and again, under conversations, and no client sees an error.

Every conversation ends with exactly the answers of an undisturbed run (or, where two tokens were as good as equal, with
the other one). PENSIEVE_CHAOS_S=120: for two minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import jsonschema
import psutil
import pytest
import torch
from ray import serve
from ray.exceptions import ActorDiedError
from transformers import AutoModelForCausalLM

from deployments import app
from deployments.schema import AppArgs
from deployments.store.conversation_store import ConversationStore
from engine.embedded_model import EMBEDDED_MODEL_NAME, embedded_model_path
from engine.executor.sampler import uniform
from engine.tenant import LOCAL_TENANT
from tests.deployments.local_ray import AS_PENSIEVE_SERVE, LocalServe
from tests.nightly import IS_NIGHTLY, nightly

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CHAOS_S = float(os.environ.get("PENSIEVE_CHAOS_S", "30"))
KILL_INTERVAL_S = min(15.0, CHAOS_S / 3)
NUM_CONVERSATIONS = 16
NUM_TURNS = 5
MIN_TOKENS = 60
TEMPERATURE = 1.2
# Batches of another shape round differently: where two tokens are closer than this (design.md), either may be said.
TIE = 1e-4
SHARED_SERVE = AS_PENSIEVE_SERVE  # test_restart and test_routing have Ray's own defaults
APP = "chaos"
KINDS = ("chat", "long chat", "previous", "conversation")
FACTS = ("my cat is called Mia", "my dog is called Rex", "the code of my bike is 4711", "i live in Rome")
QUESTIONS = ("what is my cat called?", "what is my dog called?", "what is the code of my bike?", "where do i live?")
ARGS = AppArgs(
    engine={"model": "embedded", "dtype": "float32", "num_threads": 1, "num_gpu_blocks": 256},
    num_replicas=2,
    num_cpus=0.5,
    num_ingress_replicas=2,
    ingress_num_cpus=0.25,
    # How long Serve waits for the requests of a replica that does not answer before it kills that.
    graceful_shutdown_timeout_s=2,
)


@pytest.fixture(scope="module")
def store_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'conversations.db'}"


@pytest.fixture(scope="module")
def base_url(local_serve: LocalServe, store_url: str) -> Iterator[str]:
    url = local_serve.start(SHARED_SERVE)
    with pytest.MonkeyPatch.context() as patch:
        # Serve gives a replica three of them; half a minute is long to wait for one that is known to hang.
        patch.setattr(app, "HEALTH_CHECK_TIMEOUT_S", 3.0)
        application = app.build(ARGS.model_copy(update={"store_url": store_url}))
    serve.run(application, name=APP, route_prefix="/")
    yield url
    serve.delete(APP)


@pytest.fixture
async def http(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=base_url, timeout=300) as client:
        yield client


def turn_text(conversation: int, turn: int) -> str:
    texts = FACTS if turn % 2 == 0 else QUESTIONS
    return texts[(conversation + turn // 2) % len(texts)]


@dataclass(frozen=True, slots=True)
class Spoken:
    """One answer. token_ids: the prompt's and the answer's; of a response the store has them, and its id is here."""

    text: str
    num_prompt_tokens: int
    response_id: str = field(default="", compare=False)
    token_ids: tuple[int, ...] = ()


def is_sampled(number: int) -> bool:
    return number % 4 != 0


async def hold_conversation(http: httpx.AsyncClient, number: int, name: str) -> list[Spoken]:
    """The answers of all turns; every third conversation does not stream.

    A quarter each: chat that goes on from its answers; chat with long answers, to be cut in the middle, that goes on
    from another text, because bytes that are no UTF-8 do not survive the way through the client; responses, long and
    sampled, by previous response, for which the server knows the tokens; and the same in a conversation.
    """
    kind = KINDS[number % 4]
    headers = {"x-session-id": f"{name}-{number}"} if "chat" in kind else {}
    context: dict[str, Any] = {}
    if kind == "conversation":
        context["conversation"] = (await http.post("/v1/conversations")).json()["id"]
    messages: list[dict[str, str]] = []
    answers: list[Spoken] = []
    for turn in range(NUM_TURNS):
        body: dict[str, Any] = {"model": EMBEDDED_MODEL_NAME, "temperature": 0, "stream": number % 3 != 0}
        if is_sampled(number):
            body |= {"temperature": TEMPERATURE, "seed": number, "min_tokens": MIN_TOKENS}
        if "chat" in kind:
            messages.append({"role": "user", "content": turn_text(number, turn)})
            body |= {"messages": messages, "max_tokens": 80, "return_token_ids": True}
            answers.append(await chat(http, body, headers))
            text = answers[-1].text if kind == "chat" else "i will remember."
            messages.append({"role": "assistant", "content": text})
        else:
            body |= {"input": turn_text(number, turn), "max_output_tokens": 80, **context}
            answers.append(await respond(http, body))
            if kind == "previous":
                context["previous_response_id"] = answers[-1].response_id
    return answers


async def chat(http: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str]) -> Spoken:
    raw = await read_answer(http, "/v1/chat/completions", body, headers)
    if not body["stream"]:
        answer = json.loads(raw)
        (choice,) = answer["choices"]
        prompt_ids, token_ids = answer["prompt_token_ids"], choice["token_ids"]
        return Spoken(choice["message"]["content"], len(prompt_ids), token_ids=(*prompt_ids, *token_ids))
    lines = lines_of(raw)
    assert lines[-1] == "data: [DONE]", lines[-1]
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    prompt_ids = [i for chunk in chunks for i in chunk.get("prompt_token_ids", ())]
    token_ids = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", ())]
    return Spoken(text, len(prompt_ids), token_ids=(*prompt_ids, *token_ids))


async def respond(http: httpx.AsyncClient, body: dict[str, Any]) -> Spoken:
    raw = await read_answer(http, "/v1/responses", body, {})
    if body["stream"]:
        lines = lines_of(raw)
        assert lines[-2] in ("event: response.completed", "event: response.incomplete"), lines[-1]
        response = json.loads(lines[-1][6:])["response"]
    else:
        response = json.loads(raw)
    assert response["status"] in ("completed", "incomplete"), response
    return Spoken(response["output"][0]["content"][0]["text"], response["usage"]["input_tokens"], response["id"])


async def read_answer(http: httpx.AsyncClient, path: str, body: dict[str, Any], headers: dict[str, str]) -> str:
    async with http.stream("POST", path, json=body, headers=headers) as response:
        raw = (await response.aread()).decode()
    assert response.status_code == 200, raw
    return raw


def lines_of(raw: str) -> list[str]:
    return [line for line in raw.split("\n") if line]  # not splitlines: an answer of random bytes may hold other ends


class PlainModel:
    """What transformers alone says of a token: the oracle for answers that differ."""

    def __init__(self) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32)
        self.eos_token_id: int = self._model.generation_config.eos_token_id

    def distance_of(self, token_ids: Sequence[int], place: int, num_prompt_tokens: int, number: int) -> float:
        """How far the token at `place` is from being what follows those before it in conversation `number`.

        In logits from the best, or (sampled) in probability from where the number drawn lies.

        place: one after the last token = the end of the answer.
        """
        token_id = token_ids[place] if place < len(token_ids) else self.eos_token_id
        with torch.no_grad():
            logits = self._model(torch.tensor([list(token_ids[:place])])).logits[0, -1].double()
        if not is_sampled(number):
            return float(logits.max() - logits[token_id])
        if place - num_prompt_tokens < MIN_TOKENS:
            logits[self.eos_token_id] = float("-inf")
        probs = (logits / TEMPERATURE).softmax(-1)
        end = float(probs.cumsum(-1)[token_id])
        drawn = uniform(number, place)
        return max(drawn - end, end - float(probs[token_id]) - drawn, 0.0)


async def assert_equal_but_for_ties(
    expected: Sequence[Spoken],
    answers: Sequence[Spoken],
    number: int,
    token_ids_of: Callable[[Spoken], Any],
    model: PlainModel,
) -> int:
    """How many answers went another way at a tie. What the conversation goes on with goes with them, and is not compared."""
    num_ties = 0
    for turn, (one, other) in enumerate(zip(expected, answers, strict=True)):
        if one == other:
            continue
        assert one.num_prompt_tokens == other.num_prompt_tokens
        ids, other_ids = await token_ids_of(one), await token_ids_of(other)
        # An answer that is over before the other goes on with what ended it.
        pairs = itertools.zip_longest(ids, other_ids, fillvalue=model.eos_token_id)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        assert place is not None, ("the same tokens in other words", number, turn, one, other)
        assert place >= one.num_prompt_tokens, (number, turn)
        for following in (ids, other_ids):
            distance = model.distance_of(following, place, one.num_prompt_tokens, number)
            assert distance < TIE, (number, turn, place - one.num_prompt_tokens, one, other)
        num_ties += 1
        if KINDS[number % 4] != "long chat":
            break
    return num_ties


def pids_of(deployment: str) -> list[int]:
    """Of this cluster: others on the machine may serve an application of the same name."""
    title = f"ray::ServeReplica:{APP}:{deployment}"
    pids = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it is over
            if "".join(process.cmdline()[:1]).startswith(title):
                pids.append(process.pid)
    return pids


async def kill_replicas(until_s: float) -> int:
    """SIGKILL one engine replica in each interval; how many were killed."""
    rng = random.Random(0)
    num_killed = 0
    while time.monotonic() < until_s:
        await asyncio.sleep(KILL_INTERVAL_S / 2)
        pids = pids_of("LLMServer")
        if pids:
            os.kill(rng.choice(pids), signal.SIGKILL)
            num_killed += 1
        await asyncio.sleep(KILL_INTERVAL_S / 2)
    return num_killed


TEXT = {"type": "string", "minLength": 120, "maxLength": 160}
FORM = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "texts": {"type": "array", "items": TEXT, "minItems": 3, "maxItems": 4},
    },
    "required": ["kind", "texts"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "note", "description": "", "parameters": FORM}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "note", "schema": FORM, "strict": True}}
HELD: dict[str, dict[str, Any]] = {
    "call": {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
    "form": {"response_format": SCHEMA},
}
if IS_NIGHTLY:
    HELD |= {
        "calls": {"tools": [TOOL], "tool_choice": "required"},
        "strict": {"tools": [TOOL | {"function": TOOL["function"] | {"strict": True}}]},
        "regex": {"structured_outputs": {"regex": "([a-z]{3,9} ){40,60}"}},
    }
NUM_HELD_ROUNDS = 10 if IS_NIGHTLY else 1


@dataclass(frozen=True, slots=True)
class Held:
    """A streamed answer that a grammar holds. text: its content, and the arguments of its calls."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


async def stream_held(http: httpx.AsyncClient, body: dict[str, Any], session: str, begun: asyncio.Event) -> Held:
    """The whole answer. begun: set when its first token is there."""
    messages = [{"role": "user", "content": "hello"}]
    body = body | {"model": EMBEDDED_MODEL_NAME, "messages": messages, "stream": True}
    body = body | {"max_tokens": 1500, "return_token_ids": True}
    text, finish_reason = "", ""
    token_ids: list[int] = []
    headers = {"x-session-id": session}
    async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            (choice,) = json.loads(line[6:])["choices"]
            token_ids += choice.get("token_ids") or ()
            finish_reason = choice["finish_reason"] or finish_reason
            text += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls") or ():
                text += call["function"]["arguments"]
            if token_ids:
                begun.set()
    return Held(text, tuple(token_ids), finish_reason)


@pytest.mark.timeout(600)
async def test_a_call_and_a_form_go_on_where_the_killed_replica_left_them(http: httpx.AsyncClient) -> None:
    """The other replica replays the grammar over the tokens that were sent. Of each kind there is one on each replica."""
    sessions: dict[str, str] = {}
    for number in itertools.count():
        probe = {"model": EMBEDDED_MODEL_NAME, "prompt": "a", "max_tokens": 1}
        headers = {"x-session-id": f"held-{number}"}
        replica = (await http.post("/v1/completions", json=probe, headers=headers)).headers["x-pensieve-replica"]
        sessions.setdefault(replica, headers["x-session-id"])
        if len(sessions) == ARGS.num_replicas:
            break
    bodies = [body | {"temperature": TEMPERATURE, "seed": seed} for seed, body in enumerate(HELD.values())]
    requests = list(itertools.product(bodies, sessions.values()))
    undisturbed = [await stream_held(http, body, session, asyncio.Event()) for body, session in requests]
    for (body, _), answer in zip(requests, undisturbed, strict=True):
        if "parallel_tool_calls" in body:
            assert answer.finish_reason == "tool_calls"
        if "response_format" in body or "parallel_tool_calls" in body:
            jsonschema.validate(json.loads(answer.text), FORM)
    for _ in range(NUM_HELD_ROUNDS):
        async with asyncio.timeout(180):
            while len(await num_resumed_tokens()) < ARGS.num_replicas:
                await asyncio.sleep(0.1)
        calm = (stream_held(http, body, session, asyncio.Event()) for body, session in requests)
        assert await asyncio.gather(*calm) == undisturbed  # by a new replica, too, which then knows the grammars
        before = await num_resumed_tokens()
        begun = [asyncio.Event() for _ in requests]
        tasks = [
            asyncio.create_task(stream_held(http, body, session, event))
            for (body, session), event in zip(requests, begun, strict=True)
        ]
        await asyncio.gather(*(event.wait() for event in begun))
        os.kill(pids_of("LLMServer")[0], signal.SIGKILL)
        assert await asyncio.gather(*tasks) == undisturbed
        assert max(await num_resumed_tokens()) > min(before)


async def num_resumed_tokens() -> list[int]:
    """Of each replica that lives. A handle that has not heard yet which one was killed asks that one, too: then again."""
    handle = serve.get_deployment_handle("LLMServer", APP)
    async with asyncio.timeout(60):
        while True:
            try:
                statistics = await handle.broadcast("get_statistics").results_async(timeout_s=60)
            except ActorDiedError:
                await asyncio.sleep(0.1)
            else:
                return [int(each["num_resumed_tokens"]) for each in statistics]


@pytest.mark.timeout(max(600, 5 * CHAOS_S))
async def test_killed_replicas_are_not_noticed(http: httpx.AsyncClient, store_url: str) -> None:
    model, store = PlainModel(), ConversationStore(store_url, timeout_s=60)

    async def token_ids_of(answer: Spoken) -> tuple[int, ...]:
        if not answer.response_id:
            return answer.token_ids
        history = await store.get_history(LOCAL_TENANT.tenant_id, previous_response_id=answer.response_id)
        assert history.transcript is not None
        return tuple(history.transcript.token_ids)

    undisturbed = await asyncio.gather(*(hold_conversation(http, n, "calm") for n in range(NUM_CONVERSATIONS)))
    for number in range(4):  # one of each kind: the oracle is right about what nothing disturbed
        last = undisturbed[number][-1]
        token_ids = await token_ids_of(last)
        assert len(token_ids) > last.num_prompt_tokens
        for place in range(last.num_prompt_tokens, len(token_ids)):
            assert model.distance_of(token_ids, place, last.num_prompt_tokens, number) < TIE
    end = time.monotonic() + CHAOS_S
    killer = asyncio.create_task(kill_replicas(end))
    num_rounds = num_ties = 0
    try:
        while time.monotonic() < end:
            name = f"round-{num_rounds}"
            disturbed = await asyncio.gather(*(hold_conversation(http, n, name) for n in range(NUM_CONVERSATIONS)))
            for number, (expected, answers) in enumerate(zip(undisturbed, disturbed, strict=True)):
                num_ties += await assert_equal_but_for_ties(expected, answers, number, token_ids_of, model)
            num_rounds += 1
        num_killed = await killer
    finally:
        killer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await killer
        await store.close()
    assert num_killed >= CHAOS_S // KILL_INTERVAL_S - 1
    assert num_rounds >= 1
    print(f"{num_killed} replicas killed, {num_rounds * NUM_CONVERSATIONS} conversations, {num_ties} ties")


class Stream:
    """One streamed answer under way. Its client waits for the first token."""

    def __init__(self, http: httpx.AsyncClient, session: str) -> None:
        body = {"model": EMBEDDED_MODEL_NAME, "input": "hello", "temperature": 0, "stream": True}
        body |= {"max_output_tokens": 1500, "ignore_eos": True}
        request = http.build_request("POST", "/v1/responses", json=body, headers={"x-session-id": session})
        self.events: list[dict[str, Any]] = []
        self.started = asyncio.Event()
        self.task = asyncio.create_task(self._follow(http, request))

    async def _follow(self, http: httpx.AsyncClient, request: httpx.Request) -> str:
        response = await http.send(request, stream=True)
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                self.events.append(json.loads(line[6:]))
                self.started.set()
        return str(self.events[-1]["type"])


@pytest.mark.timeout(600)
async def test_a_hung_replica_is_replaced_and_its_requests_go_on(http: httpx.AsyncClient) -> None:
    streams = [Stream(http, f"hung-{number}") for number in range(6)]
    for stream in streams:
        await stream.started.wait()
    (pid, *_) = pids_of("LLMServer")
    os.kill(pid, signal.SIGSTOP)
    try:
        ends = await asyncio.gather(*(stream.task for stream in streams))
        async with asyncio.timeout(180):  # its requests may be told of its end before that has come
            while pid in pids_of("LLMServer"):
                await asyncio.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert set(ends) == {"response.incomplete"}
    texts = {stream.events[-1]["response"]["output"][0]["content"][0]["text"] for stream in streams}
    assert len(texts) == 1


@nightly
@pytest.mark.timeout(600)
async def test_an_ingress_that_dies_loses_its_open_connections_only(http: httpx.AsyncClient) -> None:
    streams = [Stream(http, f"ingress-{number}") for number in range(8)]
    for stream in streams:
        await stream.started.wait()
    ids = [stream.events[0]["response"]["id"] for stream in streams]
    os.kill(pids_of("Ingress")[0], signal.SIGKILL)
    ends = await asyncio.gather(*(stream.task for stream in streams), return_exceptions=True)
    kept = [index for index, end in enumerate(ends) if end == "response.incomplete"]
    assert 0 < len(kept) < len(streams)

    async def state_of(response_id: str) -> dict[str, Any]:
        async with asyncio.timeout(60):
            while True:
                response = await http.get(f"/v1/responses/{response_id}")
                if response.status_code == 200 and response.json()["status"] != "in_progress":
                    return dict(response.json())
                await asyncio.sleep(0.5)

    for index, response_id in enumerate(ids):
        state = await state_of(response_id)
        assert (state["error"] is None) == (index in kept), (index, state)
        assert bool(state["output"]) == (index in kept)
    assert await hold_conversation(http, 2, "after") == await hold_conversation(http, 2, "after again")
