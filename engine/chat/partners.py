"""What a chat talks to: an engine in this process, or any server with OpenAI's API."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import httpx

from engine.chat.chat import Message, Turn
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.dialogue.messages import Dialogue
from engine.errors import ConfigError, ContextLengthError, EngineError, PensieveError
from engine.text.prompt import ChatPrompt

if TYPE_CHECKING:
    from engine.server import Server

CONNECT_TIMEOUT_S = 10.0
# Of a server that does not tell the window of its model.
DEFAULT_WINDOW = 4096
# By which this server says how an answer came about. Others do not know it, and would refuse a field of the body.
EXPLAIN = {"x-pensieve-explain": "true"}


class EnginePartner:
    """An engine of this process."""

    def __init__(self, config: EngineConfig, load: Callable[[EngineConfig], Server]) -> None:
        """Loads the model. Raises as Server."""
        self._config, self._load = config, load
        self._server = load(config)

    @property
    def model_name(self) -> str:
        return self._server.engine.model_name

    @property
    def max_model_len(self) -> int:
        return self._server.engine.max_model_len

    def answer(
        self, session_id: str, messages: list[Message], sampling: SamplingParams, on_text: Callable[[str], None]
    ) -> Turn:
        prompt = ChatPrompt(Dialogue.of(messages).messages)
        answer = self._server.complete(prompt, sampling, session_id, on_text, explains=True)
        return Turn(
            answer.text,
            answer.finish_reason,
            answer.num_prompt_tokens,
            answer.num_cached_tokens,
            len(answer.token_ids),
            answer.ttft_s,
            answer.total_s,
            answer.explanation,
        )

    def take_model(self, model: str) -> None:
        config = replace(self._config, model=model, served_model_name=None)
        self._server.close()  # there may be no room for two
        try:
            self._server = self._load(config)
        except PensieveError:
            self._server = self._load(self._config)
            raise
        self._config = config

    def statistics(self) -> str:
        return self._server.get_statistics_str()

    def close(self) -> None:
        self._server.close()


@dataclass(slots=True)
class _Progress:
    """What a stream has said so far."""

    text: str = ""
    finish_reason: str = "stop"
    first_s: float | None = None
    usage: dict[str, Any] | None = None
    explanation: dict[str, Any] | None = None


class ServerPartner:
    """A server by its URL, with or without /v1 at the end."""

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        """model: None = the first one that the server has. Raises ConfigError or EngineError."""
        base = url.rstrip("/").removesuffix("/v1")
        if not base.startswith(("http://", "https://")):
            raise ConfigError(f"--url {url} is not a URL; give one such as http://127.0.0.1:8000", param="url")
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        try:
            self._http = httpx.Client(base_url=f"{base}/v1", headers=headers, timeout=timeout)
        except (httpx.InvalidURL, UnicodeEncodeError, ValueError) as error:
            raise ConfigError(f"--url {url} or the API key cannot be used: {error}", param="url") from error
        self._url, self._num_turns, self._num_tokens, self._num_cached = base, 0, 0, 0
        self._take(self._models(), model)

    def answer(
        self, session_id: str, messages: list[Message], sampling: SamplingParams, on_text: Callable[[str], None]
    ) -> Turn:
        body = {
            "model": self.model_name,
            "messages": [{"role": role, "content": content} for role, content in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            **({"top_p": sampling.top_p} if sampling.top_p != 1.0 else {}),
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
            **({"seed": sampling.seed} if sampling.seed is not None else {}),
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
            **({"ignore_eos": True} if sampling.ignore_eos else {}),
        }
        start_s = time.perf_counter()
        progress = _Progress()
        for chunk in self._stream(body, session_id):
            _add_chunk(progress, chunk, on_text)
        end_s = time.perf_counter()
        usage = progress.usage or {}
        turn = Turn(
            progress.text,
            progress.finish_reason,
            usage.get("prompt_tokens", 0),
            (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            usage.get("completion_tokens", 0),
            (progress.first_s or end_s) - start_s,
            end_s - start_s,
            progress.explanation,
        )
        self._num_turns += 1
        self._num_tokens += turn.num_prompt_tokens
        self._num_cached += turn.num_cached_tokens
        return turn

    def take_model(self, model: str) -> None:
        self._take(self._models(), model)

    def statistics(self) -> str:
        return (
            f"{self.model_name} at {self._url}: {self._num_turns} turns of this program, {self._num_tokens} prompt tokens, "
            f"{self._num_cached} of them cached"
        )

    def close(self) -> None:
        self._http.close()

    def _models(self) -> dict[str, int]:
        """Name -> window."""
        try:
            response = self._http.get("/models", timeout=CONNECT_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise _failure(response)
        try:
            return {card["id"]: card.get("max_model_len") or DEFAULT_WINDOW for card in response.json()["data"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self._url} does not answer like a server with OpenAI's API; check --url", param="url"
            ) from error

    def _take(self, models: dict[str, int], model: str | None) -> None:
        """Raises ConfigError if the server has no such model."""
        if not models or (model is not None and model not in models):
            known = ", ".join(models) or "no model"
            raise ConfigError(f"{self._url} has no model {model!r}; it has: {known}", param="model")
        self.model_name: str = model or next(iter(models))
        self.max_model_len: int = models[self.model_name]

    def _stream(self, body: dict[str, Any], session_id: str) -> Iterator[dict[str, Any]]:
        """The chunks of an answer. Leaving it, also by Ctrl-C, closes the connection, which ends the work."""
        try:
            headers = {"x-session-id": session_id, **EXPLAIN}
            with self._http.stream("POST", "/chat/completions", json=body, headers=headers) as response:
                if response.status_code != 200:
                    response.read()
                    raise _failure(response)
                for line in response.iter_lines():
                    if line.startswith("data:") and line[5:].strip() != "[DONE]":
                        yield json.loads(line[5:])
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.HTTPError) -> EngineError:
        return EngineError(f"no answer from {self._url} ({error or type(error).__name__}); is the server running?")


def _add_chunk(progress: _Progress, chunk: dict[str, Any], on_text: Callable[[str], None]) -> None:
    """Raises EngineError if the chunk says that the answer has failed."""
    if "error" in chunk:
        raise EngineError(str(chunk["error"].get("message", chunk["error"])))
    progress.usage = chunk.get("usage") or progress.usage
    for choice in chunk.get("choices", ()):
        text = choice.get("delta", {}).get("content")
        if text:
            progress.first_s = progress.first_s or time.perf_counter()
            progress.text += text
            on_text(text)
        progress.finish_reason = choice.get("finish_reason") or progress.finish_reason
        explanation = choice.get("explanation")
        progress.explanation = explanation if isinstance(explanation, dict) else progress.explanation


def _failure(response: httpx.Response) -> PensieveError:
    """What an error response says, in one line."""
    try:
        error = response.json()["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code = f"{response.url} answered {response.status_code}; check --url", None
    if response.status_code == 401:
        message += " (--api-key, or PENSIEVE_API_KEY in the environment)"
    return ContextLengthError(message) if code == "context_length_exceeded" else EngineError(message)
