"""The real thing: Ray Serve on this machine with the embedded model, and clients that come over HTTP.

Two ingress and three engine replicas, one application for the whole module; the test that kills a replica comes last.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import sqlite3
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.app import build
from deployments.routing.engine_client import LOADS_PERIOD_S
from deployments.routing.rendezvous import rank_replicas
from deployments.schema import AppArgs
from engine.embedded_model import EMBEDDED_MODEL_NAME
from tests.deployments.local_ray import AS_PENSIEVE_SERVE, LocalServe
from tests.nightly import IS_NIGHTLY
from tools.embedded_model.dialogues import generate_dialogue

pytestmark = pytest.mark.ray

SHARED_SERVE = AS_PENSIEVE_SERVE  # test_restart and test_routing have Ray's own defaults
APP = "pensieve"
MAX_NUM_SEQS = 16
MAX_NUM_QUEUED_REQS = 16
ARGS = AppArgs(
    # A GPU tier for hardly more than one full window: what is said here has to survive in the CPU tier.
    engine={
        "model": "embedded",
        "dtype": "float32",
        "num_threads": 1,
        "num_gpu_blocks": 160,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_queued_reqs": MAX_NUM_QUEUED_REQS,
    },
    num_replicas=3,
    num_cpus=0.5,
    num_ingress_replicas=2,
    ingress_num_cpus=0.25,
    num_fallback_replicas=1,
    graceful_shutdown_timeout_s=5,
    demo=True,
    log_requests=True,
)
JSON = {"content-type": "application/json"}
# Far longer than anything here takes; only a defect waits for it.
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the conversation store."""
    return tmp_path_factory.mktemp("store") / "conversations.db"


@pytest.fixture(scope="module")
def base_url(local_serve: LocalServe, store: Path) -> Iterator[str]:
    url = local_serve.start(SHARED_SERVE)
    serve.run(build(ARGS.model_copy(update={"store_url": f"sqlite:///{store}"})), name=APP, route_prefix="/")
    yield url
    serve.delete(APP)


@pytest.fixture
def engines(base_url: str) -> DeploymentHandle:
    return serve.get_deployment_handle("LLMServer", APP)


@pytest.fixture
async def http(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        yield client


async def ask_all(engines: DeploymentHandle, method: str) -> list[Any]:
    return await engines.broadcast(method).results_async(timeout_s=PATIENCE_S)


async def until(condition: Callable[[], Any]) -> None:
    """Wait for `await condition()` to hold."""
    end = time.monotonic() + PATIENCE_S
    while not await condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.05)


def chat(text: str = "hello", **options: Any) -> dict[str, Any]:
    return {"model": EMBEDDED_MODEL_NAME, "messages": [{"role": "user", "content": text}], **options}


REAL_SESSIONS = json.loads((Path(__file__).parents[1] / "data" / "airline_user_messages.json").read_text())


@pytest.mark.parametrize("session", range(len(REAL_SESSIONS)))
def test_a_real_conversation_computes_each_turn_once_until_the_window_is_full(
    client: openai.OpenAI, session: int
) -> None:
    """A real user's messages, again and again, to the end of the window: an answer or a refusal, never more than fits."""
    window = client.models.retrieve(EMBEDDED_MODEL_NAME).model_extra["max_model_len"]  # type: ignore[index]
    messages: Any = []
    known = 0  # tokens that went through the model in this conversation
    num_turns, refusal = 0, None
    for text in REAL_SESSIONS[session] * 20:
        messages.append({"role": "user", "content": text})
        try:
            answer = client.chat.completions.create(
                model=EMBEDDED_MODEL_NAME,
                messages=messages,
                temperature=0,
                max_tokens=24,
                extra_headers={"x-session-id": f"real-{session}"},
            )
        except openai.BadRequestError as error:
            refusal = error.code
            break
        usage = answer.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == known
        assert usage.total_tokens <= window
        known = usage.total_tokens - 1
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        num_turns += 1
    assert refusal == "context_length_exceeded"
    assert num_turns >= len(REAL_SESSIONS[session]), "not all turns of the conversation were answered"
    assert known > window // 2


def test_official_client(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == EMBEDDED_MODEL_NAME
    assert client.models.retrieve(model.id).id == model.id
    messages: Any = [{"role": "user", "content": "My name is Alice."}]
    whole = client.chat.completions.create(model=model.id, messages=messages, temperature=0, seed=1, max_tokens=40)
    text = whole.choices[0].message.content
    assert text is not None
    assert "Alice" in text
    assert whole.choices[0].finish_reason == "stop"

    stream = client.chat.completions.create(
        model=model.id,
        messages=messages,
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    logprobs = [c.choices[0].logprobs.content for c in chunks if c.choices and c.choices[0].logprobs]
    assert all(len(token.top_logprobs) == 2 for content in logprobs for token in content or ())
    joined = bytes(byte for content in logprobs for token in content or () for byte in token.bytes or ())
    assert joined.decode() == text  # the token at its end is special, and has no bytes

    completion = client.completions.create(
        model=model.id,
        prompt=[5, 6, 7],
        max_tokens=6,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    choice: Any = completion.choices[0]
    assert choice.prompt_token_ids == [5, 6, 7]
    assert len(choice.token_ids) == 6
    assert choice.finish_reason == "length"

    several = client.chat.completions.create(
        model=model.id, messages=messages, temperature=0, max_tokens=40, n=3, stream=True
    )
    said = ["", "", ""]
    for chunk in several:
        said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert said == [text] * 3
    echoed = client.completions.create(
        model=model.id, prompt=["one", "two"], n=2, max_tokens=0, echo=True, logprobs=1, temperature=0
    )
    assert [answer.text for answer in echoed.choices] == ["one", "one", "two", "two"]
    assert all(answer.logprobs.token_logprobs[0] is None for answer in echoed.choices)

    with pytest.raises(openai.NotFoundError) as info:
        client.chat.completions.create(model="gpt", messages=messages)
    assert info.value.code == "model_not_found"
    assert info.value.request_id  # of Serve's proxy


@pytest.mark.parametrize("stream", [False, True])
def test_every_turn_of_a_conversation_computes_its_new_tokens_only(client: openai.OpenAI, stream: bool) -> None:
    dialogue = generate_dialogue(seed=7 + stream, num_turns=10, filler_words=(140, 160))  # about 200 tokens a turn
    messages: list[Any] = []
    num_before = 0
    for number, turn in enumerate(dialogue.turns):
        messages.append({"role": "user", "content": turn.user})
        options: Any = {
            "model": EMBEDDED_MODEL_NAME,
            "messages": messages,
            "temperature": 0,
            "max_tokens": 30,
            "extra_headers": {"x-session-id": f"conversation-{stream}"},
        }
        if stream:
            chunks = list(
                client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            usage = chunks[-1].usage
        else:
            answer = client.chat.completions.create(**options)
            text, usage = answer.choices[0].message.content, answer.usage
        messages.append({"role": "assistant", "content": text})
        num_computed = usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens
        if number > 0:
            # + 1: the last token of an answer was sampled, but has not been through the model.
            assert num_computed == usage.prompt_tokens - num_before + 1
        num_before = usage.prompt_tokens + usage.completion_tokens


async def test_what_left_the_gpu_tier_comes_back_from_the_cpu_tier(
    client: openai.OpenAI, engines: DeploymentHandle
) -> None:
    """Twelve long conversations in turn, on three replicas of which each holds one or two on the GPU.

    Nothing is computed twice, and no conversation is given another one's facts.
    """
    filler = "it is raining today. we went for a long walk. " * 60
    messages: list[Any] = [
        [{"role": "user", "content": f"{4000 + i}. {filler} the code of my bike is {4000 + i}"}] for i in range(12)
    ]
    known = [0] * len(messages)
    for turn in range(2):
        for i, history in enumerate(messages):
            answer = client.chat.completions.create(
                model=EMBEDDED_MODEL_NAME,
                messages=history,
                temperature=0,
                max_tokens=24,
                extra_headers={"x-session-id": f"long-{i}"},
            )
            usage, text = answer.usage, answer.choices[0].message.content
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            assert text is not None
            assert str(4000 + i) in text
            if turn:
                assert usage.prompt_tokens_details.cached_tokens == known[i]
            known[i] = usage.total_tokens - 1
            history += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": "what is the code of my bike?"},
            ]
    statistics = await ask_all(engines, "get_statistics")
    assert sum(replica["num_cpu_cached_tokens"] for replica in statistics) > 500


async def test_each_session_stays_on_one_replica_whichever_ingress_it_comes_through(http: httpx.AsyncClient) -> None:
    replicas: dict[str, set[str]] = defaultdict(set)
    ingresses: dict[str, set[str]] = defaultdict(set)
    at_once = asyncio.Semaphore(8)

    async def session(name: str) -> None:
        for turn in range(10):
            async with at_once:
                response = await http.post(
                    "/v1/chat/completions",
                    json=chat(f"turn {turn}", max_tokens=2, stream=turn % 2 == 1),
                    headers={"x-session-id": name},
                )
            assert response.status_code == 200
            replicas[name].add(response.headers["x-pensieve-replica"])
            ingresses[name].add(response.headers["x-pensieve-ingress"])

    await asyncio.gather(*(session(f"session-{i}") for i in range(30)))
    assert all(len(used) == 1 for used in replicas.values()), replicas
    assert set.union(*replicas.values()) == {"0", "1", "2"}
    assert len(set.union(*ingresses.values())) == 2
    assert sum(len(used) == 2 for used in ingresses.values()) > 15  # so both really decided on the same sessions


BAD_REQUESTS: dict[str, tuple[bytes, int, str | None]] = {
    "malformed JSON": (b'{"model": ', 400, None),
    "not an object": (b"[]", 400, None),
    "not UTF-8": (b'{"model": "\xff\xfe"}', 400, None),
    "nested": (b"[" * 100_000, 400, None),
    "too large": (b"x" * 10_000_000, 413, None),
    "unknown model": (json.dumps(chat() | {"model": "gpt"}).encode(), 404, "model"),
    "many messages": (
        json.dumps(chat() | {"messages": [{"role": "user", "content": ""}] * 8000}).encode(),
        400,
        "messages",
    ),
    "far too many messages": (b'{"messages": [' + b'{"role":"user","content":""},' * 130_000 + b"0]}", 400, None),
    "no messages": (json.dumps(chat() | {"messages": []}).encode(), 400, "messages"),
    "longer than the window": (json.dumps(chat("word " * 20_000)).encode(), 400, "messages"),
    **{
        f"{name}={value}": (json.dumps(chat(**{name: value})).encode(), 400, param or name)
        for name, value, param in (
            ("temperature", -1, None),
            ("temperature", 1e30, None),
            ("top_p", 0, None),
            ("max_tokens", 0, None),
            ("max_tokens", 10**15, "messages"),
            ("max_tokens", "many", None),
            ("min_tokens", 10**12, None),
            ("seed", 2**70, None),
            ("n", 99, None),
            ("stop", [""], None),
            ("stop_token_ids", [10**12], None),
            ("tools", [{"type": "function"}], None),
            ("structured_outputs", {"regex": "(a"}, None),
        )
    },
}


async def test_what_clients_expect_of_any_server(http: httpx.AsyncClient) -> None:
    """Through Serve's proxy: ids of requests, compressed bodies, other methods, tokens, the load."""
    mine = {"x-request-id": "mine-1"}
    asked = (
        ("POST", "/v1/chat/completions", chat(max_tokens=2), 200),
        ("POST", "/v1/chat/completions/", chat(max_tokens=2, stream=True, frobnicate=1), 200),
        ("POST", "/v1/chat/completions", {}, 400),
        ("GET", "/nowhere", None, 404),
    )
    for method, path, body, status in asked:
        response = await http.request(method, path, json=body, headers=mine)
        assert (response.status_code, response.headers.get_list("x-request-id")) == (status, ["mine-1"])
        assert response.headers.get("x-pensieve-ignored") == ("frobnicate" if body and "frobnicate" in body else None)
        (made,) = (await http.request(method, path, json=body)).headers.get_list("x-request-id")
        assert made

    raw = gzip.compress(json.dumps(chat(max_tokens=2)).encode())
    response = await http.post("/v1/chat/completions", content=raw, headers=JSON | {"content-encoding": "gzip"})
    assert response.status_code == 200
    head, get = await http.head("/v1/models"), await http.get("/v1/models")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"]
    options = await http.options("/v1/models")
    assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS")

    tokens = (await http.post("/tokenize", json={"prompt": "hello"})).json()["tokens"]
    bare = (await http.post("/tokenize", json={"prompt": "hello", "add_special_tokens": False})).json()["tokens"]
    assert tokens[-len(bare) :] == bare
    assert (await http.post("/detokenize", json={"tokens": bare})).json() == {"prompt": "hello"}
    assert (await http.get("/ping")).status_code == 200
    assert (await http.get("/load")).json()["server_load"] >= 0


async def test_why_an_answer_took_its_time_and_whose_lines_are_in_the_log(http: httpx.AsyncClient) -> None:
    """Several requests concurrently, one of them with two choices."""
    ids = [f"log-{number}" for number in range(4)]

    async def ask(name: str) -> httpx.Response:
        body = chat(f"{name} says hello", max_tokens=4, explain=True, n=2 if name == ids[0] else 1)
        return await http.post("/v1/chat/completions", json=body, headers={"x-request-id": name, "x-session-id": name})

    answers = await asyncio.gather(*map(ask, ids))
    for answer in answers:
        for choice in answer.json()["choices"]:
            told = choice["explanation"]
            assert str(told["replica"]) == answer.headers["x-pensieve-replica"]
            assert (told["home"], told["lost_replicas"]) in ((True, 0), (None, 0))
            assert told["seconds"]["route"] > 0
            assert told["seconds"]["prefill"] > 0
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files = list((session / "logs" / "serve").glob(f"replica_{APP}_Ingress_*.log"))

    async def are_written() -> bool:
        lines = [line for path in files for line in path.read_text().splitlines() if " finished: " in line]
        found = {name: [line for line in lines if f" {name} " in line] for name in ids}
        return all(
            sum(answer.json()["id"] in line for line in found[name])
            == len(found[name])
            == len(answer.json()["choices"])
            for name, answer in zip(ids, answers, strict=True)
        )

    await until(are_written)


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_bad_input_is_refused_and_leaves_nothing_behind(
    name: str, http: httpx.AsyncClient, engines: DeploymentHandle
) -> None:
    content, status, param = BAD_REQUESTS[name]
    response = await http.post("/v1/chat/completions", content=content, headers=JSON)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert str(error["param"] or "").split("[")[0] == (param or "")
    await ask_all(engines, "check_integrity")
    for statistics in await ask_all(engines, "get_statistics"):
        assert statistics["num_requests_running"] == statistics["num_requests_waiting"] == 0
        assert statistics["num_gpu_blocks_pinned"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 10**12},
        {"min_tokens": 4000, "max_tokens": None},
        {"temperature": 1e-9},
        {"temperature": 99, "top_p": 1e-9},
        {"repetition_penalty": 99, "presence_penalty": 2, "frequency_penalty": -2},
        {"seed": -(2**63), "min_p": 1},
        {"stop": ["\x00", "é" * 256]},
        {"logprobs": True, "top_logprobs": 20},
    ],
)
async def test_odd_but_legal_values_are_served(
    options: dict[str, Any], http: httpx.AsyncClient, engines: DeploymentHandle
) -> None:
    body = chat(**{"max_tokens": 5, **options}, stream=True)
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        num_lines = 0
        async for line in response.aiter_lines():
            assert '"error"' not in line
            num_lines += 1
            if num_lines > 12:
                break  # one of them asks for a whole window
    await until(lambda: is_idle(engines))


async def is_idle(engines: DeploymentHandle) -> bool:
    return not any(
        s["num_requests_running"] or s["num_requests_waiting"] or s["num_gpu_blocks_pinned"]
        for s in await ask_all(engines, "get_statistics")
    )


async def num_aborted(engines: DeploymentHandle) -> int:
    return sum(s["num_aborted"] for s in await ask_all(engines, "get_statistics"))


async def test_client_that_leaves_frees_what_its_request_held(
    http: httpx.AsyncClient, engines: DeploymentHandle
) -> None:
    before = await num_aborted(engines)
    endless = chat(max_tokens=3500, ignore_eos=True)
    async with http.stream("POST", "/v1/chat/completions", json=endless | {"stream": True}) as response:
        lines = response.aiter_lines()
        for _ in range(10):
            await anext(lines)
        assert not await is_idle(engines)
    await until(lambda: is_idle(engines))
    assert await num_aborted(engines) == before + 1

    with pytest.raises(httpx.ReadTimeout):
        await http.post("/v1/chat/completions", json=endless, timeout=0.5)
    await until(lambda: is_idle(engines))
    assert await num_aborted(engines) == before + 2
    await ask_all(engines, "check_integrity")


async def test_clients_that_leave_leave_nothing_behind(
    base_url: str, http: httpx.AsyncClient, engines: DeploymentHandle, store: Path
) -> None:
    """At every moment of a request: on its way in, while it waits, in its prompt, in its answer.

    Streams and not, chats and responses, in a few sessions, so that replicas are busy when they come.
    """
    rng = random.Random(0)

    async def hasty(number: int) -> None:
        text = f"{number} " * rng.randint(1, 300)
        stream = {"stream": number % 2 == 0, "ignore_eos": True, "model": EMBEDDED_MODEL_NAME}
        headers = {"x-session-id": f"hasty-{number % 5}"}
        if number % 3:
            path, body = "/v1/chat/completions", chat(text, max_tokens=1000, **stream)
        else:
            path, body = "/v1/responses", {"input": text, "max_output_tokens": 1000, **stream}
        # Certificates, which are not used here, take 40 ms to load.
        leaver = httpx.AsyncClient(base_url=base_url, verify=False)
        with contextlib.suppress(TimeoutError, httpx.TransportError):
            async with asyncio.timeout(rng.uniform(0, 0.3)), leaver:
                response = await leaver.post(path, json=body, headers=headers)
                assert response.status_code == 429, "that was too fast to be told anything by"

    for start in range(0, 1000 if IS_NIGHTLY else 400, 20):
        await asyncio.gather(*(hasty(number) for number in range(start, start + 20)))
    await until(lambda: is_idle(engines))
    await ask_all(engines, "check_integrity")

    async def is_marked() -> bool:
        """No ingress holds a turn that no client waits for: it would renew the turn's lease for ever."""
        with contextlib.closing(sqlite3.connect(store)) as database:
            num_turns = dict(database.execute("SELECT status, count(*) FROM responses GROUP BY status"))
        assert num_turns["incomplete"] > 5
        return "in_progress" not in num_turns

    await until(is_marked)

    # Every place is free again: as many as fit the home and its fallback at once, and none is refused.
    async def follow() -> int:
        body = chat("hello", max_tokens=20, ignore_eos=True)
        return (await http.post("/v1/chat/completions", json=body, headers={"x-session-id": "after"})).status_code

    num_places = 2 * MAX_NUM_QUEUED_REQS
    assert await asyncio.gather(*(follow() for _ in range(num_places))) == [200] * num_places


class Follower:
    """A client that reads a stream to its end, or until it is stopped."""

    def __init__(self, http: httpx.AsyncClient, session_id: str, max_tokens: int) -> None:
        self._http = http
        self._session_id = session_id
        self._max_tokens = max_tokens
        self._started = asyncio.Event()
        self.replica = ""
        self.refusal: httpx.Response | None = None
        self.last_line = ""
        self.text = ""
        self.task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        body = chat(max_tokens=self._max_tokens, ignore_eos=True, stream=True, seed=5)
        headers = {"x-session-id": self._session_id}
        async with self._http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            if response.status_code != 200:
                await response.aread()
                self.refusal = response
                return
            self.replica = response.headers["x-pensieve-replica"]
            async for line in response.aiter_lines():
                self.last_line = line or self.last_line
                if line.startswith("data: {"):
                    self.text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                self._started.set()

    async def started(self) -> str:
        """The replica that answers; raises what went wrong."""
        waiting = asyncio.create_task(self._started.wait())
        await asyncio.wait([self.task, waiting], return_when=asyncio.FIRST_COMPLETED)
        if self.task.done():
            self.task.result()
        assert self.refusal is None, self.refusal.text
        return self.replica


async def test_a_full_replica_spills_to_one_other_and_then_requests_are_refused(
    http: httpx.AsyncClient, engines: DeploymentHandle
) -> None:
    """One session with far more requests than its home and one other can hold.

    A session of the third replica does not notice.
    """
    home, fallback, third = rank_replicas("crowd", [0, 1, 2])
    crowd = [Follower(http, "crowd", max_tokens=3500) for _ in range(3 * (MAX_NUM_SEQS + MAX_NUM_QUEUED_REQS))]
    num_places = 2 * (MAX_NUM_SEQS + MAX_NUM_QUEUED_REQS)

    def refused() -> list[httpx.Response]:
        return [follower.refusal for follower in crowd if follower.refusal is not None]

    def used() -> set[str]:
        return {follower.replica for follower in crowd if follower.replica}

    async def are_both_full() -> bool:
        return len(refused()) >= len(crowd) - num_places and len(used()) >= 2

    await until(are_both_full)
    quiet = next(name for name in map(str, range(100)) if rank_replicas(name, [0, 1, 2])[0] == third)
    answer = await http.post("/v1/chat/completions", json=chat(max_tokens=2), headers={"x-session-id": quiet})
    assert (answer.status_code, answer.headers["x-pensieve-replica"]) == (200, str(third))
    for response in refused():
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "overloaded"
    assert used() == {str(home), str(fallback)}

    for follower in crowd:
        follower.task.cancel()
    await asyncio.gather(*(follower.task for follower in crowd), return_exceptions=True)
    await until(lambda: is_idle(engines))

    async def is_home_again() -> bool:
        """As soon as the ingress has heard that the crowd has gone, which takes a while on a busy machine."""
        await asyncio.sleep(LOADS_PERIOD_S)
        again = await http.post("/v1/chat/completions", json=chat(max_tokens=2), headers={"x-session-id": "crowd"})
        return again.headers["x-pensieve-replica"] == str(home)

    await until(is_home_again)
    await ask_all(engines, "check_integrity")


async def test_a_stream_to_a_client_of_http_1_0_is_a_body_of_known_length(base_url: str) -> None:
    """Which chunks are unknown to; Serve's proxy would send some."""
    body = json.dumps(chat(stream=True, max_tokens=5)).encode()
    port = int(base_url.rpartition(":")[2])
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert b"content-length: %d\r\n" % len(answer) in head.lower() + b"\r\n"
    assert b"transfer-encoding" not in head.lower()
    assert answer.startswith(b"data: {")
    assert answer.endswith(b"data: [DONE]\n\n")


async def test_a_burst_gets_as_many_places_as_the_engines_have_and_429_for_the_rest(
    base_url: str, engines: DeploymentHandle
) -> None:
    """All replicas full, of many sessions: what is not in is refused, and nothing waits on the way."""
    num_places = 3 * (MAX_NUM_SEQS + MAX_NUM_QUEUED_REQS)
    num_too_many = 40
    async with httpx.AsyncClient(
        base_url=base_url, timeout=PATIENCE_S, limits=httpx.Limits(max_connections=None)
    ) as http:
        crowd = [Follower(http, f"burst-{number}", max_tokens=3500) for number in range(num_places + num_too_many)]

        def refusals() -> list[httpx.Response]:
            return [follower.refusal for follower in crowd if follower.refusal is not None]

        async def is_decided() -> bool:
            num_held = [
                statistics["num_requests_running"] + statistics["num_requests_waiting"]
                for statistics in await ask_all(engines, "get_statistics")
            ]
            assert max(num_held) <= MAX_NUM_SEQS + MAX_NUM_QUEUED_REQS
            return sum(num_held) + len(refusals()) == len(crowd)

        await until(is_decided)
        # A session may go to two of the three replicas, so one of them may have had room at the end.
        assert num_too_many <= len(refusals()) < num_too_many + num_places // 3
        for response in refusals():
            assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
            assert int(response.headers["retry-after"]) >= 1
        assert not any(follower.task.done() for follower in crowd if follower.refusal is None)
        for follower in crowd:
            follower.task.cancel()
        await asyncio.gather(*(follower.task for follower in crowd), return_exceptions=True)
    await until(lambda: is_idle(engines))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-session-id", b"zo\xeb"),
        ("X_Session_Id", b"\xff\xfe"),
        ("x-correlation-id", b"\xff"),
        ("x-request-id", b"\xff"),
        ("x-request-id", b"x" * 5000),
        ("serve_multiplexed_model_id", b"\xff"),
        ("serve-multiplexed-model-id", b"another model"),
        ("x-request-timeout-seconds", b"0.001"),
        ("x-request-timeout-seconds", b"\xff"),
        ("x-request-disconnect-disabled", b"\xff"),
        ("traceparent", b"\xff"),
        ("x-anything", b"\xff"),
    ],
    ids=str,
)
async def test_headers_of_any_bytes_are_no_defect_and_steer_nothing(
    http: httpx.AsyncClient, name: str, value: bytes
) -> None:
    response = await http.post("/v1/chat/completions", json=chat(max_tokens=2), headers=[(name.encode(), value)])
    assert response.status_code == 200, response.text
    assert len(response.headers["x-request-id"]) <= 128


async def test_the_messages_api_through_the_cluster(http: httpx.AsyncClient) -> None:
    """Whole, streamed and counted: one session, which agents name in a header of their own."""
    body = chat("My cat is called Mia.", max_tokens=200, temperature=0)
    headers = {"x-claude-code-session-id": "messages", "x-api-key": "none"}
    whole = await http.post("/v1/messages", json=body, headers=headers)
    counted = await http.post("/v1/messages/count_tokens", json=body, headers=headers)
    streamed = await http.post("/v1/messages", json=body | {"stream": True}, headers=headers)
    assert [answer.status_code for answer in (whole, counted, streamed)] == [200, 200, 200]
    assert len({answer.headers["request-id"] for answer in (whole, counted, streamed)}) == 3
    assert whole.headers["x-pensieve-replica"] == streamed.headers["x-pensieve-replica"]
    assert "Mia" in whole.json()["content"][0]["text"]
    assert counted.json()["input_tokens"] == whole.json()["usage"]["input_tokens"]
    events = [
        json.loads(line.removeprefix("data: ")) for line in streamed.text.split("\n") if line.startswith("data: ")
    ]
    assert [events[0]["type"], events[-1]["type"]] == ["message_start", "message_stop"]
    pieces = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(pieces) == whole.json()["content"][0]["text"]
    refused = await http.post("/v1/messages", json=body | {"model": "x"}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["type"]) == (404, "not_found_error")


async def test_a_session_has_one_home_whichever_way_its_name_is_sent(http: httpx.AsyncClient) -> None:
    for number in range(8):
        name = f"zo\xeb-{number}"
        homes = set()
        for headers, body in (
            ([(b"x-session-id", name.encode("latin-1"))], {}),
            ([(b"x-session-id", name.encode())], {}),
            ([(b"x-correlation-id", name.encode())], {}),
            ([], {"session_id": name}),
        ):
            response = await http.post("/v1/chat/completions", json=chat(max_tokens=1, **body), headers=headers)
            assert response.status_code == 200
            homes.add(response.headers["x-pensieve-replica"])
        assert len(homes) == 1


async def test_a_client_that_says_it_never_leaves_frees_what_it_held_when_it_does(
    http: httpx.AsyncClient, engines: DeploymentHandle
) -> None:
    body = chat(max_tokens=3500, ignore_eos=True, stream=True)
    headers = {"x-request-disconnect-disabled": "?1"}
    async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        await anext(response.aiter_lines())
    await until(lambda: is_idle(engines))


async def test_the_page_and_a_demonstration_of_evictions(http: httpx.AsyncClient) -> None:
    """The page shows a chat's chunks and what becomes of them in smaller tiers; no answer changes."""
    for path, beginning in (("/", "<!doctype html>"), ("/page.js", "/"), ("/page.css", ":root")):
        page = await http.get(path)
        assert page.status_code == 200
        assert page.text.startswith(beginning)
    session = {"x-session-id": "map"}

    async def events(num_events: int | None = None) -> AsyncIterator[dict[str, Any]]:
        query = {"interval": 0.25} | ({} if num_events is None else {"num_events": num_events})
        async with http.stream("GET", "/v1/cache/map", params=query) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            async for line in stream.aiter_lines():
                if line:
                    yield json.loads(line.removeprefix("data: "))

    def states(event: dict[str, Any]) -> list[list[str]]:
        """Of the chunks of this conversation, on each replica that knows it."""
        return [
            [cell["state"] for cell in row["cells"]]
            for replica in event["replicas"]
            for row in replica["conversations"]
            if row["id"] == "map"
        ]

    async def seen(condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first event of one stream for which it holds."""
        async with asyncio.timeout(PATIENCE_S), contextlib.aclosing(events()) as stream:
            async for event in stream:
                if condition(event):
                    return event
        raise AssertionError("the stream has ended")

    async def say(text: str, *before: dict[str, str]) -> tuple[str, int]:
        body = chat(max_tokens=24, temperature=0) | {"messages": [*before, {"role": "user", "content": text}]}
        answer = (await http.post("/v1/chat/completions", json=body, headers=session)).json()
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return answer["choices"][0]["message"]["content"], cached

    told = {"role": "user", "content": "my cat is called Mia " + "and my dog is called Rex " * 20}
    said, _ = await say(told["content"])
    history = (told, {"role": "assistant", "content": said})
    expected, cached = await say("what is my cat called?", *history)
    assert cached > 32
    assert [event["object"] async for event in events(num_events=3)] == ["cache.map"] * 3
    event = await seen(lambda event: any(set(row) <= {"gpu", "both"} and len(row) > 3 for row in states(event)))
    assert event["demo"]
    assert len(event["replicas"]) == ARGS.num_replicas
    try:
        answer = await http.post("/v1/cache/demo", json={"gpu_blocks": 0, "cpu_blocks": 2})
        assert sorted(answer.json()["replicas"]) == [0, 1, 2]
        # Which two blocks stay depends on what the tests before this one have left: longer contexts are worth more.
        event = await seen(
            lambda event: any("dropped" in row and set(row) <= {"cpu", "dropped"} for row in states(event))
        )
        assert all(tier["held"] for replica in event["replicas"] for tier in replica["tiers"])
        mine = [
            eviction
            for replica in event["replicas"]
            for eviction in replica["evictions"]
            if eviction["conversation"] == "map"
        ]
        assert "dropped" in {eviction["to"] for eviction in mine}
        assert (await say("what is my cat called?", *history))[0] == expected
    finally:
        await http.post("/v1/cache/demo", json={})
    event = await seen(
        lambda event: not any(tier["held"] for replica in event["replicas"] for tier in replica["tiers"])
    )
    assert (await say("what is my cat called?", *history))[0] == expected


async def test_health_of_a_running_system(http: httpx.AsyncClient) -> None:
    for path in ("/health", "/ready", "/version", "/v1/models"):
        response = await http.get(path)
        assert response.status_code == 200
        assert len(response.headers.get_list("x-request-id")) == 1


async def test_a_lost_replica_delays_its_streams_and_its_sessions_return_to_the_replacement(
    http: httpx.AsyncClient, engines: DeploymentHandle
) -> None:
    """Runs last: the engine replica is replaced, but the others would have to wait for it."""
    names = [f"session-{i}" for i in range(9)]
    followers = {name: Follower(http, name, max_tokens=1000) for name in names}
    home = {name: await followers[name].started() for name in names}
    victim = next(
        actor
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith(f"SERVE_REPLICA::{APP}#LLMServer")
    )
    ray.kill(ray.get_actor(victim["name"], namespace=victim["namespace"]))
    await asyncio.gather(*(follower.task for follower in followers.values()))
    assert {follower.last_line for follower in followers.values()} == {"data: [DONE]"}
    # One prompt and one seed: whatever happened on the way, all of them are told the same.
    assert len({follower.text for follower in followers.values()}) == 1
    assert sum(statistics["num_resumed_tokens"] for statistics in await ask_all(engines, "get_statistics")) > 0

    async def serve_again(name: str) -> str:
        body, headers = chat(max_tokens=2), {"x-session-id": name}
        response = await http.post("/v1/chat/completions", json=body, headers=headers)
        assert response.status_code == 200
        return str(response.headers["x-pensieve-replica"])

    async def is_replaced() -> bool:
        return len(await ask_all(engines, "describe")) == ARGS.num_replicas

    await until(is_replaced)
    # The replacement has the rank of the lost one: all sessions are where they were.
    assert {name: await serve_again(name) for name in names} == home
    await ask_all(engines, "check_integrity")


@pytest.mark.parametrize("session", [b"zo\xeb", b"\xff\xfe"], ids=["Latin-1", "neither"])
async def test_a_session_id_need_not_be_utf8(http: httpx.AsyncClient, session: bytes) -> None:
    """Serve's proxy answers 500 if it looks at that header. It names a session still: the next turn finds its cache."""
    messages: list[dict[str, str]] = []
    for text in ("my cat is called Mia", "what is my cat called?"):
        messages.append({"role": "user", "content": text})
        body = {"model": EMBEDDED_MODEL_NAME, "messages": messages, "temperature": 0}
        response = await http.post("/v1/chat/completions", json=body, headers={b"x-session-id": session})
        assert response.status_code == 200, response.text
        answer = response.json()
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
