"""A server with OpenAI's API that says words at once, and does wrong what it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

Json = dict[str, Any]


@dataclass
class FakeServer:
    """What it does, and what it was asked.

    refused: fields for which it answers 400. tells_usage: counts tokens. tells_cache: and cached ones.
    failing: error by the number of messages (or ids) in a request: a status, or "cut" for a stream that breaks off.
    hangs: answers begin and do not end.
    """

    refused: set[str] = field(default_factory=set)
    tells_usage: bool = True
    tells_cache: bool = True
    failing: dict[int, int | str] = field(default_factory=dict)
    hangs: bool = False
    needs_key: str = ""
    models: list[Json] = field(default_factory=lambda: [{"id": "fake"}])
    bodies: list[Json] = field(default_factory=list)
    session_ids: list[str] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    num_running: int = 0
    max_running: int = 0

    async def app(self) -> FastAPI:
        app = FastAPI()
        app.get("/v1/models")(self._models)
        for path in ("chat/completions", "completions", "responses"):
            app.post(f"/v1/{path}")(self._answer)
        return app

    @property
    def asked(self) -> list[Json]:
        """Without what was asked to find out what it takes."""
        return [body for body, name in zip(self.bodies, self.session_ids, strict=True) if name != "probe"]

    async def _models(self, request: Request) -> Response:
        if self.needs_key and request.headers.get("authorization") != f"Bearer {self.needs_key}":
            return JSONResponse({"error": {"message": "no key"}}, 401)
        return JSONResponse({"data": self.models})

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.session_ids.append(request.headers["x-session-id"])
        self.ports.append(request.client.port if request.client else 0)
        for name in self.refused & body.keys():
            return JSONResponse({"error": {"message": f"unknown field {name}"}}, 400)
        failure = self.failing.get(len(body.get("messages") or body.get("input") or body["prompt"]))
        if isinstance(failure, int):
            return JSONResponse({"detail": "it is broken"}, failure)
        return StreamingResponse(self._stream(body, request.url.path, failure), media_type="text/event-stream")

    async def _stream(self, body: Json, path: str, failure: Any) -> AsyncIterator[bytes]:
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            for event in self._events(body, path):
                yield f"data: {json.dumps(event)}\n\n".encode()
                await asyncio.sleep(0)
                if self.hangs:
                    await asyncio.Event().wait()
                if failure == "cut":
                    raise ConnectionError("cut")
            yield b"data: [DONE]\n\n"
        finally:
            self.num_running -= 1

    def _events(self, body: Json, path: str) -> list[Json]:
        if path.endswith("responses"):
            num_tokens, prompt = body["max_output_tokens"], json.dumps(body["input"])
            usage = {"input_tokens": len(prompt), "output_tokens": num_tokens}
            done = {"id": f"resp-{len(self.bodies)}", **({"usage": usage} if self.tells_usage else {})}
            pieces = [{"type": "response.output_text.delta", "delta": f" w{number}"} for number in range(num_tokens)]
            return [{"type": "response.created"}, *pieces, {"type": "response.completed", "response": done}]
        num_tokens = body["max_tokens"]
        words = [f" w{number}" for number in range(num_tokens)]
        if path.endswith("chat/completions"):
            pieces = [{"choices": [{"delta": {"content": word}}]} for word in words]
            num_prompt = sum(len(message["content"].split()) for message in body["messages"])
            begin, num_cached = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}, num_prompt // 2
        else:
            ids = body.get("return_token_ids")
            pieces = [
                {"choices": [{"text": word, **({"token_ids": [number]} if ids else {})}]}
                for number, word in enumerate(words)
            ]
            begin, num_prompt, num_cached = {"choices": []}, len(body["prompt"]), 0
        end: list[Json] = [{"choices": [{"delta": {}, "finish_reason": "length"}]}]
        if self.tells_usage and body.get("stream_options"):
            details = {"cached_tokens": num_cached, "cached_tokens_by_tier": {"gpu": num_cached}}
            usage = {"prompt_tokens": num_prompt, "completion_tokens": num_tokens}
            end.append(
                {"choices": [], "usage": usage | ({"prompt_tokens_details": details} if self.tells_cache else {})}
            )
        return [begin, *pieces, *end]
