"""One request to a server, timed piece by piece."""

from __future__ import annotations

import asyncio
import errno
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from engine.bench.apis import APIS, Conversation, Heard, Json

CONNECT_TIMEOUT_S = 30.0
# An idle connection is not used again after this, in seconds. Servers close theirs after five or more (uvicorn, llama.cpp,
# Node), and one that is closed just as a turn is sent looks as if the server had failed.
MAX_IDLE_S = 2.0
# In which our own server says the rank of the engine replica that answers.
REPLICA_HEADER = "x-pensieve-replica"
# Of what a server may send as one event, or as the body of an error.
MAX_EVENT_BYTES = 1 << 24
MAX_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server and how it is talked to.

    url: with /v1, without a slash at the end.
    api: one of APIS.
    model: empty = requests name none.
    fields: of every request, such as the temperature.
    """

    name: str
    url: str
    api: str = "chat"
    model: str = ""
    api_key: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0


class ClientFault(Exception):
    """The client itself could not do it, so that nothing can be said of the server."""


@dataclass(slots=True)
class Answered:
    """An answer and the times of its pieces, in seconds of the clock. first_s: None if there were none.

    replica: which one of the server's answered, if it says that.
    """

    sent_s: float
    end_s: float
    heard: Heard
    first_s: float | None = None
    num_pieces: int = 0
    max_gap_s: float = 0.0
    replica: str = ""


class Client:
    """Connections to one endpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint, self.api = endpoint, endpoint.api
        self._path, self._max_tokens = APIS[endpoint.api]
        self._http = httpx.AsyncClient(
            headers={"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {},
            timeout=httpx.Timeout(endpoint.timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=MAX_IDLE_S),
            trust_env=False,  # a proxy between would be measured, too
        )

    async def close(self) -> None:
        await self._http.aclose()

    def request(self, asked: Json, output_tokens: int, session_id: str) -> httpx.Request:
        """Made beforehand, so that only sending it is timed."""
        body = {
            **({"model": self._endpoint.model} if self._endpoint.model else {}),
            "stream": True,
            self._max_tokens: output_tokens,
            **asked,
            **self._endpoint.fields,
        }
        content = json.dumps(body).encode()
        headers = {"content-type": "application/json", "x-session-id": session_id}
        return self._http.build_request("POST", self._endpoint.url + self._path, content=content, headers=headers)

    async def ask(self, request: httpx.Request, conversation: Conversation) -> Answered:
        """Send it and hear the answer out. What the server or the network does wrong stands in the answer's `error`.

        Raises ClientFault.
        """
        heard = Heard()
        answered = Answered(time.perf_counter(), 0.0, heard)
        try:
            async with asyncio.timeout(self._endpoint.timeout_s):
                await self._hear(request, conversation, answered)
        except TimeoutError:
            heard.error = f"no complete answer within {self._endpoint.timeout_s:g} s"
        except httpx.HTTPError as error:
            _raise_if_own_fault(error)
            heard.error = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        answered.end_s = time.perf_counter() if heard.error or not answered.end_s else answered.end_s
        return answered

    async def _hear(self, request: httpx.Request, conversation: Conversation, answered: Answered) -> None:
        response = await self._http.send(request, stream=True)
        try:
            if response.status_code != 200:
                answered.heard.error = await _error_of(response)
                return
            answered.replica = response.headers.get(REPLICA_HEADER, "")
            latest_s = answered.sent_s
            async for data in _events(response):
                now_s = time.perf_counter()
                chunk = _parse(data, answered.heard)
                if conversation.hear(chunk, answered.heard):
                    if answered.first_s is None:
                        answered.first_s = now_s
                    else:
                        answered.max_gap_s = max(answered.max_gap_s, now_s - latest_s)
                    answered.num_pieces += 1
                    answered.end_s = latest_s = now_s
        finally:
            await response.aclose()


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of server-sent events; comments and other fields are left out, and so is the last one, [DONE]."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise httpx.DecodingError("the server sends an event of more than 16 MiB")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data != b"[DONE]":
                    yield data


def _parse(data: bytes, heard: Heard) -> Json:
    """An empty event if it is none, and then the answer has an error."""
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        heard.error = heard.error or f"an event that is not JSON: {data[:80].decode(errors='replace')}"
        return {}
    error = chunk.get("error")
    if error:
        message = error.get("message", error) if isinstance(error, dict) else error
        heard.error = heard.error or str(message)[:MAX_ERROR_CHARS]
    return chunk


async def _error_of(response: httpx.Response) -> str:
    """What an error response says, in one line."""
    body = b""
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > MAX_EVENT_BYTES:
            break
    try:
        error = json.loads(body)
        error = error.get("error", error.get("detail", error))
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = body.decode(errors="replace")
    return f"{response.status_code}: {' '.join(str(text).split())[:MAX_ERROR_CHARS]}"


def _raise_if_own_fault(error: BaseException | None) -> None:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL):
            raise ClientFault(
                f"this machine has no more connections for the client ({error.strerror}); raise `ulimit -n` or lower the load"
            ) from error
        error = error.__cause__ or error.__context__
