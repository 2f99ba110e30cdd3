"""The objects of OpenAI's Responses and Conversations API: a response, whole or as a stream of events.

Plain dicts, JSON as they are: the store may keep a response as it is worded here and give it back unchanged. Knows no
HTTP, no store, no engine, no clock, no Ray.

    in_progress(response) --> completed | incomplete ("length", or interrupted) | cancelled | failed

A stream opens with response.created and response.in_progress, then tells the output (output.py), and ends with
response.completed, response.incomplete or response.failed. There is no [DONE] in this API.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deployments.errors import ResponseCancelledError
from deployments.generation import ErrorItem
from deployments.http.cache_details import cache_details, diagnostics, hint_report, write_details
from deployments.http.errors import error_body, wire_of
from deployments.http.event_stream import sse_event
from deployments.http.explanations import explanation_field
from deployments.http.prediction_details import prediction_details
from deployments.responses.items import ItemJson, NewId
from deployments.responses.output import Event, Output, retold
from deployments.responses.requests import ResponseBody
from engine.text.output import OutputDelta

ResponseJson = dict[str, Any]

INTERRUPTED_MESSAGE = "the server stopped, or the client left, before the answer was complete"


class ResponseObject:
    """The response to one body. created_at: Unix time in seconds. new_id: gives the items of its output their ids."""

    def __init__(self, response_id: str, created_at: int, body: ResponseBody, new_id: NewId) -> None:
        self.response_id = response_id
        self._new_id = new_id
        self._created_at = created_at
        self._body = body

    def output(self) -> Output:
        """What is to become its output."""
        return Output(self.response_id, self._new_id, self._body.offered_tools, is_empty=self._body.is_prewarm)

    def in_progress(self, output: Sequence[ItemJson] = (), delta: OutputDelta | None = None) -> ResponseJson:
        """With the answer so far. delta: the latest one, if there is any."""
        return self._response("in_progress", output, None if delta is None else response_usage(delta))

    def ended(self, output: Sequence[ItemJson], delta: OutputDelta) -> ResponseJson:
        """With the whole answer. delta: the last one, with its finish_reason."""
        status = final_status(delta)
        response = self._response(status, output, response_usage(delta))
        response |= hint_report([delta]) | explanation_field(delta)
        if delta.comparison is not None:
            response["prompt_cache_diagnostics"] = diagnostics(delta.comparison)
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return response

    def _response(self, status: str, output: Sequence[ItemJson], used: dict[str, Any] | None) -> ResponseJson:
        body = self._body
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": body.model,
            "output": list(output),
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
            "prompt_cache_options": None if body.prompt_cache_options is None else body.prompt_cache_options.shown(),
            "prompt_cache_retention": body.prompt_cache_retention,
            "parallel_tool_calls": body.parallel_tool_calls,
            "max_tool_calls": body.max_tool_calls,
            **body.shown(),
            # What asks for nothing here, in OpenAI's words for that.
            "background": False,
            "service_tier": "default",
            "top_logprobs": 0,
        }


class ResponseStream:
    """The events of one response, numbered as they are sent."""

    def __init__(self, response: ResponseObject) -> None:
        self._object = response
        self._output = response.output()
        self._last: OutputDelta | None = None
        self._num_events = 0

    def read(self, delta: OutputDelta) -> list[Event]:
        """What is new; before the first delta's, that the response is there."""
        opening = self.opening() if self._last is None else []
        self._last = delta
        return [*opening, *self._output.read(delta)]

    def opening(self) -> list[Event]:
        """That the response is there."""
        response = self._object.in_progress()
        return [("response.created", {"response": response}), ("response.in_progress", {"response": response})]

    def whole(self) -> ResponseJson:
        """The response, once the delta with a finish_reason was read."""
        assert self._last is not None
        return self._object.ended(self._output.items, self._last)

    def in_progress(self) -> ResponseJson:
        """The response to here: what cancelled() and failed() close."""
        return self._object.in_progress(self._output.so_far(), self._last)

    def numbered(self, events: Iterable[Event]) -> list[Event]:
        """The events as they are sent."""
        numbered = []
        for name, fields in events:
            numbered.append((name, {"type": name, "sequence_number": self._num_events, **fields}))
            self._num_events += 1
        return numbered


def closing_event(response: ResponseJson) -> Event:
    """The end of a stream: `response` says what became of it. A cancelled one has no event of its own in OpenAI's API."""
    if response["status"] == "cancelled":
        return error_event(ErrorItem.of(ResponseCancelledError()))
    return f"response.{response['status']}", {"response": response}


def error_event(error: ErrorItem) -> Event:
    """An error outside of the response itself."""
    fields = error_body(error)["error"]
    return "error", {"code": fields["code"] or fields["type"], "message": fields["message"], "param": fields["param"]}


def retold_events(response: ResponseJson, starting_after: int | None = None) -> list[Event]:
    """The events of a response that has ended, numbered; the end comes in any case.

    starting_after: only those with a larger number. Numbers are those of this telling, in which each text is one piece; the
    client may have them from the first one, which had more.
    """
    begun = response | {"status": "in_progress", "output": [], "usage": None, "error": None, "incomplete_details": None}
    told = [
        ("response.created", {"response": begun}),
        ("response.in_progress", {"response": begun}),
        *retold(response["output"]),
        closing_event(response),
    ]
    numbers = [*range(len(told) - 1), max(len(told) - 1, 0 if starting_after is None else starting_after + 1)]
    return [
        (name, {"type": name, "sequence_number": number, **fields})
        for number, (name, fields) in zip(numbers, told, strict=True)
        if starting_after is None or number > starting_after
    ]


def sse_named_event(event: Event) -> str:
    name, data = event
    return sse_event(data, name)


def final_status(delta: OutputDelta) -> str:
    return "incomplete" if delta.finish_reason == "length" else "completed"


def response_usage(delta: OutputDelta) -> dict[str, Any]:
    """cached_tokens is there also when it is 0."""
    return {
        "input_tokens": delta.num_prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": delta.num_cached_tokens,
            **write_details([delta]),
            **cache_details([delta]),
        },
        "output_tokens": delta.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": delta.num_reasoning_tokens, **prediction_details([delta])},
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
    output = [i | {"status": "incomplete"} if i["status"] == "in_progress" else i for i in response["output"]]
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
