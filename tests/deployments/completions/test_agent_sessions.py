"""Real agent sessions as tool traffic through the chat API: each turn computes what is new, and caching changes nothing.

Each answer is held to the session's own by a grammar. Which tokens spell it is for the random model to choose, so that there
are ids to be lost which tokenising the text would not give.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from benchmarks.agent_sessions import (
    MAX_TOKENS,
    AgentSession,
    Json,
    Turn,
    as_call,
    as_text,
    assistant_message,
    load_sessions,
    next_messages,
)
from deployments.ingress import IngressConfig, create_app
from engine.config import EngineConfig
from engine.model_files import has_smollm2, model_location
from tests.conftest import save_tiny_model
from tests.deployments.engine_here import EngineHere
from tests.nightly import IS_NIGHTLY

pytestmark = pytest.mark.skipif(not has_smollm2(), reason="the chat model's tokenizer is not installed: make model")

SESSIONS = load_sessions()
# Two calls, and answers in words, which are cut short; nightly all sessions that fit the window, as they are.
CHOSEN = range(len(SESSIONS)) if IS_NIGHTLY else (30,)
MAX_TEXT_CHARS = None if IS_NIGHTLY else 80
WINDOW = 16_384
TEMPLATES = Path(__file__).parents[2] / "data" / "chat_templates"
# Names the functions and no more, as some agents' prompts do: then a schema may say what is to be called.
NAMES_ONLY = (
    "{% if tools %}<|im_start|>system\nYou may call"
    "{% for tool in tools %} {{ tool.function.name }}{% endfor %}.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WAYS: dict[str, tuple[str, Callable[[AgentSession, Turn], Json]]] = {
    "called, names in the prompt": (NAMES_ONLY, as_call),
    "written, qwen2_5": ((TEMPLATES / "qwen2_5.jinja").read_text(), as_text),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, whole or put together from a stream."""

    content: str
    calls: list[Json]
    finish_reason: str
    usage: Json
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]

    @property
    def num_cached(self) -> int:
        return int(self.usage["prompt_tokens_details"]["cached_tokens"])


def read_whole(body: Json) -> Answer:
    (choice,) = body["choices"]
    message = choice["message"]
    return Answer(
        message["content"] or "",
        [call["function"] | {"id": call["id"]} for call in message.get("tool_calls", [])],
        choice["finish_reason"],
        body["usage"],
        tuple(body["prompt_token_ids"]),
        tuple(choice["token_ids"]),
    )


def read_stream(text: str) -> Answer:
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    content, calls, finish_reason = "", [], ""
    prompt_ids: list[int] = []
    token_ids: list[int] = []
    for event in events:
        prompt_ids += event.get("prompt_token_ids") or ()
        for choice in event["choices"]:
            token_ids += choice.get("token_ids") or ()
            finish_reason = choice["finish_reason"] or finish_reason
            content += choice["delta"].get("content") or ""
            for part in choice["delta"].get("tool_calls") or ():
                if "id" in part:
                    calls.append({"id": part["id"], "name": part["function"]["name"], "arguments": ""})
                calls[-1]["arguments"] += part["function"]["arguments"]
    return Answer(content, calls, finish_reason, events[-1]["usage"], tuple(prompt_ids), tuple(token_ids))


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """chat template -> folder of a random model with SmolLM2's tokenizer and that template."""

    def make(template: str) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(model_location("smollm2"))
        folder = tmp_path_factory.mktemp("agent")
        save_tiny_model("llama", folder, vocab_size=len(tokenizer), max_position_embeddings=WINDOW)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return make


@asynccontextmanager
async def serve_here(model: Path, folder: Path, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """The application over an engine in this process."""
    config = EngineConfig.from_options(
        {"model": str(model), "num_threads": 1, "dtype": "float32", "max_model_len": WINDOW, "num_gpu_blocks": 1024}
        | {"served_model_name": "it"}
        | options
    )
    engine = EngineHere(config, stream_interval_s=0.0)
    app = create_app(engine, IngressConfig(store_url=f"sqlite:///{folder / 'c.db'}"), ingress_id="ingress-1")
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as http,
    ):
        yield http
    await engine.check_integrity()
    await engine.__del__()


async def ask(http: httpx.AsyncClient, body: Json) -> Answer:
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return read_stream(response.text) if body["stream"] else read_whole(response.json())


async def replay(
    http: httpx.AsyncClient, session: AgentSession, name: str, force: Callable[[AgentSession, Turn], Json]
) -> list[Answer]:
    """The answers of all turns; every second one streams."""
    messages: list[Json] = []
    answers: list[Answer] = []
    call_id = ""
    for number, turn in enumerate(session.turns):
        messages += next_messages(turn, call_id)
        body = {"model": "it", "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0, "session_id": name}
        body |= {"return_token_ids": True, "stream": number % 2 == 1}
        body |= {"stream_options": {"include_usage": True}} if body["stream"] else {}
        answers.append(await ask(http, body | force(session, turn)))
        call_id = check_answer(answers[-1], turn, force) or f"call_{number}"
        messages.append(assistant_message(turn, call_id))
    return answers


def check_answer(answer: Answer, turn: Turn, force: Callable[[AgentSession, Turn], Json]) -> str:
    """It is what the session says, and told as what it is. Returns the id of its call, if it is told as one."""
    if not turn.name or force is as_text:
        assert (answer.content, answer.calls, answer.finish_reason) == (turn.call_text, [], "stop")
        return ""
    (call,) = answer.calls
    assert (answer.content, answer.finish_reason, call["name"]) == ("", "tool_calls", turn.name)
    assert json.loads(call["arguments"]) == json.loads(turn.arguments)
    return str(call["id"])


def chosen_sessions() -> list[AgentSession]:
    sessions = []
    for session in map(SESSIONS.__getitem__, CHOSEN):
        turns = tuple(replace(turn, text=turn.text[:MAX_TEXT_CHARS]) for turn in session.turns)
        num_chars = sum(len(turn.call_text) + sum(len(m["content"]) for m in turn.new) for turn in turns)
        if num_chars < WINDOW:  # each has a token at most
            sessions.append(replace(session, turns=turns))
    return sessions


@pytest.mark.parametrize("way", WAYS)
async def test_each_turn_computes_only_what_is_new(way: str, make_model: Callable[[str], Path], tmp_path: Path) -> None:
    template, force = WAYS[way]
    model = make_model(template)
    async with serve_here(model, tmp_path) as http, serve_here(model, tmp_path, mode="stateless") as stateless:
        for number, session in enumerate(chosen_sessions()):
            answers = await replay(http, session, f"session-{number}", force)
            fresh = await replay(stateless, session, f"session-{number}", force)
            for before, answer in pairwise(answers):
                said = before.prompt_ids + before.token_ids
                # Nothing that was said is tokenised again; and nothing of it is computed again but its last token.
                assert answer.prompt_ids[: len(said)] == said
                assert answer.num_cached >= len(said) - 1
            assert [a.prompt_ids + a.token_ids for a in answers] == [a.prompt_ids + a.token_ids for a in fresh]
            assert all(answer.num_cached == 0 for answer in fresh)
