"""What is told of prompts: echo and prompt_logprobs, as evaluation harnesses ask for them; and prompts that are continued."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.completions.answers import CompletionFormat
from deployments.completions.requests import ChatCompletionBody, CompletionBody
from deployments.generation import DeltaItem
from deployments.http.parsing import parse_request
from deployments.ingress import IngressConfig, create_app
from deployments.routing.resumption import Progress
from engine.config import EngineConfig
from engine.core.plan import Logprobs
from engine.tenant import LOCAL_TENANT
from engine.text.logprobs import tell_prompt
from engine.text.output import OutputDelta, PromptToken, TokenLogprob, ToldPrompt
from tests.deployments.engine_here import EngineHere
from tests.deployments.refusals import refusal

MODEL = "pensieve-recall-0.6m"
TEXT = "My cat is called Mia. What is my cat called? Ω"
COMPLETION = {"model": MODEL, "prompt": TEXT, "temperature": 0, "max_tokens": 7}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": TEXT}], "temperature": 0, "max_tokens": 7}


def parse_completion(**changes: Any) -> CompletionBody:
    return parse_request(CompletionBody, json.dumps(COMPLETION | changes).encode())[0]


def parse_chat(**changes: Any) -> ChatCompletionBody:
    return parse_request(ChatCompletionBody, json.dumps(CHAT | changes).encode())[0]


ASSISTANT = {"role": "assistant", "content": "It is"}


@pytest.mark.parametrize(
    ("parse", "changes", "param"),
    [
        (parse_completion, {"max_tokens": 0}, "max_tokens"),
        (parse_completion, {"echo": "yes"}, "echo"),
        (parse_completion, {"prompt_logprobs": 21}, "prompt_logprobs"),
        (parse_completion, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (parse_completion, {"prompt": ["x" * 200_000, "y" * 200_000], "echo": True, "logprobs": 5}, "prompt"),
        (parse_completion, {"suffix": "end"}, "suffix"),
        (parse_completion, {"suffix": ["end"]}, "suffix"),
        (parse_chat, {"prompt_logprobs": -1}, "prompt_logprobs"),
        (parse_chat, {"continue_final_message": True}, "continue_final_message"),
        (
            parse_chat,
            {"messages": [ASSISTANT], "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        (
            parse_chat,
            {"messages": [ASSISTANT | {"content": ""}], "continue_final_message": True},
            "continue_final_message",
        ),
    ],
)
def test_refusals(parse: Any, changes: dict[str, Any], param: str) -> None:
    assert refusal(lambda: parse(**changes))[0] == param


def test_how_many_log_probabilities_of_the_prompt() -> None:
    def asked(**changes: Any) -> int | None:
        return parse_completion(**changes).sampling_params().prompt_logprobs

    assert asked(logprobs=2) is None
    assert asked(echo=True) is None
    assert asked(echo=True, logprobs=2) == 2
    assert asked(echo=True, logprobs=2, prompt_logprobs=5) == 5
    assert asked(prompt_logprobs=0) == 0
    assert parse_chat(prompt_logprobs=4).sampling_params().prompt_logprobs == 4


def test_each_asks_for_as_many_as_it_wants() -> None:
    def token(token_id: int, text: str, logprob: float, offset: int, *top: TokenLogprob) -> TokenLogprob:
        return TokenLogprob(token_id, text, text.encode(), logprob, offset, top)

    top = (token(7, "x", -0.5, 0), token(2, "b", -1.5, 0))
    told = ToldPrompt("ab", (PromptToken(token(1, "a", 0.0, 0), 0), PromptToken(token(2, "b", -1.5, 1, *top), 2)))
    form = CompletionFormat("id", 1, parse_completion(echo=True, logprobs=1, prompt_logprobs=2))
    delta = OutputDelta("c", (3,), (token(3, "c", -0.25, 0),), finish_reason="length", told_prompt=told)
    (choice,) = form.whole(delta)["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -1.5, -0.25],
        "top_logprobs": [None, {"b": -1.5, "x": -0.5}, {"c": -0.25}],
        "text_offset": [0, 1, 2],
    }
    assert choice["prompt_logprobs"] == [
        None,
        {
            "2": {"logprob": -1.5, "rank": 2, "decoded_token": "b"},
            "7": {"logprob": -0.5, "rank": 1, "decoded_token": "x"},
        },
    ]


# -- with an engine ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def engine() -> AsyncIterator[EngineHere]:
    options = {"num_threads": 1, "dtype": "float32", "num_gpu_blocks": 256, "max_model_len": 512, "chunk_size": 8}
    here = EngineHere(EngineConfig.from_options(options), stream_interval_s=0.0)
    yield here
    await here._engine.check_integrity()
    await here.__del__()


@pytest.fixture
async def client(engine: EngineHere, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(engine, IngressConfig(store_url=f"sqlite:///{tmp_path / 'c.db'}"), ingress_id="ingress-1")
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost/v1/", timeout=None) as client,
    ):
        yield client


async def ask(client: httpx.AsyncClient, path: str = "completions", **body: Any) -> dict[str, Any]:
    response = await client.post(path, json=(COMPLETION if path == "completions" else CHAT) | body)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def test_the_likelihood_of_an_answer_is_that_of_its_generation(client: httpx.AsyncClient) -> None:
    """As lm-eval's local-completions asks: a list of prompts of tokens, echoed, of which the last tokens are scored."""
    made = (await ask(client, logprobs=2, return_token_ids=True))["choices"][0]
    ids = made["prompt_token_ids"] + made["token_ids"]
    for max_tokens in (0, 1):
        answer = await ask(client, prompt=[ids, ids[:9]], echo=True, logprobs=2, max_tokens=max_tokens, seed=1)
        first, second = answer["choices"]
        logprobs = first["logprobs"]
        for name, values in logprobs.items():
            assert len(values) == len(ids) + max_tokens, name
        begin, end = len(made["prompt_token_ids"]), len(ids)
        assert logprobs["tokens"][begin:end] == made["logprobs"]["tokens"]
        assert logprobs["token_logprobs"][begin:end] == pytest.approx(made["logprobs"]["token_logprobs"], abs=1e-3)
        for told, generated in zip(logprobs["top_logprobs"][begin:end], made["logprobs"]["top_logprobs"], strict=True):
            assert told == pytest.approx(generated, abs=1e-3)
            assert max(told.values()) == pytest.approx(max(generated.values()), abs=1e-3)
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert second["logprobs"]["token_logprobs"][1:9] == pytest.approx(logprobs["token_logprobs"][1:9], abs=1e-3)
        assert answer["usage"]["completion_tokens"] == 2 * max_tokens
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert first["finish_reason"] == "length" or max_tokens


@pytest.mark.parametrize("n", [1, 3])
async def test_the_echo_is_the_prompt_and_its_offsets_are_places_in_the_text(client: httpx.AsyncClient, n: int) -> None:
    plain = await ask(client, n=n, logprobs=0)
    echoed = await ask(client, n=n, logprobs=0, echo=True)
    for choice, without in zip(echoed["choices"], plain["choices"], strict=True):
        assert choice["text"] == TEXT + without["text"]
        logprobs = choice["logprobs"]
        own = without["logprobs"]
        num_prompt = echoed["usage"]["prompt_tokens"]
        for token, offset in zip(logprobs["tokens"][:num_prompt], logprobs["text_offset"][:num_prompt], strict=True):
            if not token.startswith("bytes:"):
                assert TEXT.startswith(token, offset)
        assert logprobs["tokens"][-len(own["tokens"]) :] == own["tokens"]
        assert logprobs["text_offset"][-len(own["tokens"]) :] == [len(TEXT) + o for o in own["text_offset"]]
    assert echoed["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]


async def test_streamed_echo(client: httpx.AsyncClient) -> None:
    body = {"echo": True, "logprobs": 1, "n": 2, "prompt": [TEXT, "x"]}
    whole = await ask(client, **body)
    response = await client.post("completions", json=COMPLETION | body | {"stream": True})
    *blocks, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    parts = [json.loads(block.removeprefix("data: "))["choices"][0] for block in blocks]
    for choice in whole["choices"]:
        own = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        for name in ("tokens", "text_offset"):
            told = [value for part in own if part["logprobs"] for value in part["logprobs"][name]]
            assert told == choice["logprobs"][name]
    only = await client.post("completions", json=COMPLETION | {"echo": True, "max_tokens": 0, "stream": True})
    (block, done, _) = only.text.split("\n\n")
    (choice,) = json.loads(block.removeprefix("data: "))["choices"]
    assert (choice["text"], choice["finish_reason"], done) == (TEXT, "length", "data: [DONE]")


async def test_prompt_logprobs_of_a_chat_and_of_a_text(client: httpx.AsyncClient) -> None:
    """One entry for each token; the token itself is in it, whether it is one of the most probable ones or not."""
    for path in ("completions", "chat/completions"):
        answer = await ask(client, path, prompt_logprobs=2, return_token_ids=True)
        told = answer["choices"][0] if path == "completions" else answer
        ids = told["prompt_token_ids"]
        first, *others = told["prompt_logprobs"]
        assert first is None
        assert len(others) == len(ids) - 1
        for token_id, entry in zip(ids[1:], others, strict=True):
            ranks = {value["rank"] for value in entry.values()}
            assert {1, 2} <= ranks
            assert len(entry) == (2 if entry[str(token_id)]["rank"] <= 2 else 3)
            assert entry[str(token_id)]["logprob"] <= max(value["logprob"] for value in entry.values())
        assert (await ask(client, path))["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]


async def test_too_many_are_refused_with_their_name(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.text.logprobs.MAX_PROMPT_LOGPROBS", 20)
    for body, param in (({"prompt_logprobs": 1}, "prompt_logprobs"), ({"echo": True, "logprobs": 1}, "logprobs")):
        response = await client.post("completions", json=COMPLETION | body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_lost_replica_tells_the_prompt_once(engine: EngineHere) -> None:
    """It came with the first token; what goes on behind a later one does not compute it again."""
    body = parse_completion(echo=True, logprobs=1, stream=True)
    request = body.generation_request(body.prompts[0], request_id="r", session_id="s", tenant=LOCAL_TENANT)
    progress = Progress(request)
    assert progress.rest_of_request() == request
    first = await anext(aiter(engine._engine.generate(request)))
    assert first.told_prompt is not None
    again = progress.rest_of_request()  # lost before it said anything
    assert (again.sampling, again.return_prompt_text) == (request.sampling, True)
    progress.note(DeltaItem(first, 0))
    rest = progress.rest_of_request()
    assert (rest.sampling.prompt_logprobs, rest.return_prompt_text) == (None, False)
    deltas = [delta async for delta in engine._engine.generate(rest)]
    assert all(delta.told_prompt is None for delta in deltas)
    whole = [delta async for delta in engine._engine.generate(replace(request, request_id="whole"))]
    assert first.text + "".join(d.text for d in deltas) == "".join(d.text for d in whole)


# -- the text of answers -----------------------------------------------------------------------------------------------


async def test_a_stop_string_in_the_output(client: httpx.AsyncClient) -> None:
    whole = (await ask(client, max_tokens=20))["choices"][0]["text"]
    stop = whole[3:6]
    end = whole.index(stop)
    for shown, text in ((False, whole[:end]), (True, whole[: end + 3])):
        choice = (await ask(client, max_tokens=20, stop=stop, include_stop_str_in_output=shown))["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    response = await client.post(
        "completions",
        json=COMPLETION | {"max_tokens": 20, "stop": stop, "include_stop_str_in_output": True, "stream": True},
    )
    parts = [json.loads(block.removeprefix("data: ")) for block in response.text.split("\n\n")[:-2]]
    assert "".join(part["choices"][0]["text"] for part in parts) == whole[: end + 3]


async def test_special_tokens_are_text_if_they_are_asked_for(client: httpx.AsyncClient, engine: EngineHere) -> None:
    tokenizer = engine._engine._tokenizer
    special = min(i for i in tokenizer._special_ids if i not in engine._engine._eos_token_ids)
    name = tokenizer.token_bytes[special].decode()
    forced = {"logit_bias": {str(special): 100}, "max_tokens": 2}
    assert (await ask(client, **forced))["choices"][0]["text"] == ""
    assert (await ask(client, skip_special_tokens=False, **forced))["choices"][0]["text"] == 2 * name


async def test_the_last_message_is_continued(client: httpx.AsyncClient, engine: EngineHere) -> None:
    """As transformers renders it: without what ends a message, and without the beginning of another one."""
    messages = [CHAT["messages"][0], ASSISTANT]
    apply = engine._engine._tokenizer._tokenizer.apply_chat_template
    for options in ({"continue_final_message": True}, {"add_generation_prompt": False}, {}):
        answer = await ask(client, "chat/completions", messages=messages, return_token_ids=True, **options)
        expected = apply(messages, tokenize=True, return_dict=False, **(options or {"add_generation_prompt": True}))
        assert answer["prompt_token_ids"] == expected


def test_offsets_of_prompts_that_their_tokens_do_not_spell() -> None:
    """Special tokens around a text are not in it; a space that the tokenizer begins with is not either."""

    class Spaced:
        token_bytes = type("Bytes", (dict,), {"text": lambda self, ids: b"".join(self[i] for i in ids).decode()})(
            {1: b"<s>", 2: b" ab", 3: b" c", 4: b"</s>"}
        )
        num_added_to_texts = (1, 1)

        def is_special(self, token_id: int) -> bool:
            return token_id in (1, 4)

    scores = [Logprobs(-1.0, (), 1)] * 3
    told = tell_prompt(Spaced(), [1, 2, 3, 4], "ab c", scores, is_text=True)  # type: ignore[arg-type]
    assert [token.text_offset for token, _ in told.tokens] == [0, 0, 2, 4]
    assert [rank for _, rank in told.tokens] == [0, 1, 1, 1]
    told = tell_prompt(Spaced(), [1, 2, 3, 4], "", scores, is_text=False)  # type: ignore[arg-type]
    assert told.text == "<s> ab c</s>"
    assert [token.text_offset for token, _ in told.tokens] == list(accumulate([3, 3, 2], initial=0))
