"""The objects of OpenAI's Responses and Conversations API: a response, whole or as a stream of events.

Plain dicts, JSON as they are: the store may keep a response as whole() words it and give it back unchanged. Knows no
HTTP, no store, no engine, no clock, no Ray.

    in_progress(response) --> completed | incomplete ("length", or interrupted) | cancelled | failed

A stream opens with response.created and response.in_progress, then says the one message with its one part, and ends
with response.completed, response.incomplete or response.failed. There is no [DONE] in this API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deployments.generation import ErrorItem
from deployments.http.errors import error_body, wire_of
from deployments.http.event_stream import sse_event
from deployments.responses.requests import ItemJson, ResponseBody, output_text
from engine.text.output import OutputDelta

ResponseJson = dict[str, Any]
Event = tuple[str, dict[str, Any]]

INTERRUPTED_MESSAGE = "the server stopped, or the client left, before the answer was complete"


class ResponseObject:
    """The response to one body. created_at: Unix time in seconds. item_id: of the message that it will hold."""

    def __init__(self, response_id: str, created_at: int, body: ResponseBody, item_id: str) -> None:
        self.response_id = response_id
        self.item_id = item_id
        self._created_at = created_at
        self._body = body

    def in_progress(self, delta: OutputDelta | None = None) -> ResponseJson:
        """With the answer so far, if there is any."""
        if delta is None:
            return self._response("in_progress", [], None)
        return self._response("in_progress", [self.item("in_progress", delta.text)], response_usage(delta))

    def whole(self, delta: OutputDelta) -> ResponseJson:
        """delta: the whole answer, with its finish_reason."""
        status = final_status(delta)
        response = self._response(status, [self.item(status, delta.text)], response_usage(delta))
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return response

    def item(self, status: str, text: str | None) -> ItemJson:
        """The answer as a message item. None: before its part is there."""
        content = [] if text is None else [output_text(text)]
        return {"id": self.item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _response(self, status: str, output: list[ItemJson], used: dict[str, Any] | None) -> ResponseJson:
        body = self._body
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": body.model,
            "output": output,
            "usage": used,
            "previous_response_id": body.previous_response_id,
            "conversation": None if body.conversation_id is None else {"id": body.conversation_id},
            "instructions": body.instructions,
            "metadata": dict(body.metadata),
            "temperature": body.temperature,
            "top_p": body.top_p,
            "max_output_tokens": body.max_output_tokens,
            "truncation": body.truncation,
            "store": body.store,
            "prompt_cache_key": body.prompt_cache_key,
            # What asks for nothing here, in OpenAI's words for that.
            "background": False,
            "max_tool_calls": None,
            "parallel_tool_calls": body.parallel_tool_calls,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "text": {"format": {"type": "text"}, "verbosity": "medium"},
            "tool_choice": body.tool_choice,
            "tools": [],
            "top_logprobs": 0,
        }


class ResponseStream:
    """The events of one response. Keeps the text that was said, for the events that say it again."""

    def __init__(self, response: ResponseObject) -> None:
        self._object = response
        self._texts: list[str] = []
        self._last: OutputDelta | None = None
        self._num_events = 0

    def opening(self) -> list[Event]:
        """For a server that says something before the first token; else events() begins with it."""
        response = self._object.in_progress()
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def events(self, delta: OutputDelta) -> list[Event]:
        """What is new. The delta that has a finish_reason gives the end of the stream."""
        events = [] if self._num_events else self.opening()
        if self._last is None:
            events.append(self._item_event("added", "in_progress", None))
            events.append(self._part_event("added", ""))
        self._last = delta
        if delta.text:
            self._texts.append(delta.text)
            events.append(self._text_event("delta", delta=delta.text))
        if delta.finish_reason is not None:
            whole = self.so_far()
            response = self._object.whole(whole)
            events.append(self._text_event("done", text=whole.text))
            events.append(self._part_event("done", whole.text))
            events.append(self._item_event("done", response["status"], whole.text))
            events.append(self._event(f"response.{response['status']}", response=response))
        return events

    def so_far(self) -> OutputDelta:
        """The answer to here, as one delta without its tokens. Not before the first."""
        last = self._last
        assert last is not None
        return OutputDelta(
            text="".join(self._texts),
            num_prompt_tokens=last.num_prompt_tokens,
            num_cached_tokens=last.num_cached_tokens,
            num_output_tokens=last.num_output_tokens,
            finish_reason=last.finish_reason,
        )

    def in_progress(self) -> ResponseJson:
        """The response to here: what cancelled() and failed() close."""
        return self._object.in_progress(None if self._last is None else self.so_far())

    def failed_event(self, error: ErrorItem) -> Event:
        """The end of a stream that was opened and cannot go on."""
        return self._event("response.failed", response=failed(self.in_progress(), error))

    def closing_event(self, response: ResponseJson) -> Event:
        """The end of a stream whose response became something else than its answer: `response` says what."""
        return self._event(f"response.{response['status']}", response=response)

    def error_event(self, error: ErrorItem) -> Event:
        """An error outside of the response itself."""
        fields = error_body(error)["error"]
        code = fields["code"] or fields["type"]
        return self._event("error", code=code, message=fields["message"], param=fields["param"])

    def _event(self, name: str, **fields: Any) -> Event:
        self._num_events += 1
        return name, {"type": name, "sequence_number": self._num_events - 1, **fields}

    def _item_event(self, what: str, status: str, text: str | None) -> Event:
        return self._event(f"response.output_item.{what}", output_index=0, item=self._object.item(status, text))

    def _part_event(self, what: str, text: str) -> Event:
        return self._event(f"response.content_part.{what}", **self._where(), part=output_text(text))

    def _text_event(self, what: str, **text: str) -> Event:
        return self._event(f"response.output_text.{what}", **self._where(), **text, logprobs=[])

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._object.item_id, "output_index": 0, "content_index": 0}


def sse_named_event(event: Event) -> str:
    name, data = event
    return sse_event(data, name)


def final_status(delta: OutputDelta) -> str:
    return "incomplete" if delta.finish_reason == "length" else "completed"


def response_usage(delta: OutputDelta) -> dict[str, Any]:
    """cached_tokens is there also when it is 0. Every other token of the input was computed, and its KV written."""
    return {
        "input_tokens": delta.num_prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": delta.num_cached_tokens,
            "cache_write_tokens": delta.num_prompt_tokens - delta.num_cached_tokens,
        },
        "output_tokens": delta.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": delta.num_prompt_tokens + delta.num_output_tokens,
    }


def cancelled(response: ResponseJson) -> ResponseJson:
    """A response in progress that the client gave up. As the next two: a new dict, with what was said until then."""
    return _closed(response, "cancelled", None)


def interrupted(response: ResponseJson) -> ResponseJson:
    """A response in progress that is computed no more; OpenAI's API has no reason of that name."""
    return _closed(response, "incomplete", _error("server_error", INTERRUPTED_MESSAGE, "server_error", None))


def failed(response: ResponseJson, error: ErrorItem) -> ResponseJson:
    """The codes of a failed response are few; its type and param are the error's own."""
    status = wire_of(error).status
    code = "server_error" if status >= 500 else "invalid_prompt"
    code = "rate_limit_exceeded" if status == 429 else code
    fields = error_body(error)["error"]
    return _closed(response, "failed", _error(code, fields["message"], fields["type"], fields["param"]))


def _error(code: str, message: str, kind: str, param: str | None) -> dict[str, Any]:
    return {"code": code, "message": message, "type": kind, "param": param}


def _closed(response: ResponseJson, status: str, error: dict[str, Any] | None) -> ResponseJson:
    output = [item | {"status": "incomplete"} for item in response["output"]]
    return response | {"status": status, "error": error, "output": output}


def deleted_response(response_id: str) -> dict[str, Any]:
    return {"id": response_id, "object": "response", "deleted": True}


def conversation_object(conversation_id: str, created_at: int, metadata: Mapping[str, str]) -> dict[str, Any]:
    return {"id": conversation_id, "object": "conversation", "created_at": created_at, "metadata": dict(metadata)}


def deleted_conversation(conversation_id: str) -> dict[str, Any]:
    return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}


def list_object(items: Sequence[ItemJson], *, has_more: bool) -> dict[str, Any]:
    """Items in the order that was asked for. first_id and last_id are strings also if there are none."""
    first_id, last_id = (items[0]["id"], items[-1]["id"]) if items else ("", "")
    return {"object": "list", "data": list(items), "first_id": first_id, "last_id": last_id, "has_more": has_more}
