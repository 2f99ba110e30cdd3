"""The answers of OpenAI's chat and completions endpoints, made from OutputDeltas: whole, or as events.

One object formats one answer with all its choices; it remembers what later chunks need to know of earlier ones. Plain dicts,
because one is built for each chunk. Knows no engine and no Ray.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from deployments.completions.choices_body import ChoicesBody
from deployments.completions.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from deployments.completions.requests import ChatCompletionBody, CompletionBody
from deployments.generation import ErrorItem
from deployments.http.answer_reader import AnswerReader, made_call_id
from deployments.http.cache_details import cache_details, diagnostics, hint_report, write_details
from deployments.http.errors import error_body
from deployments.http.event_stream import DONE, sse_event
from deployments.http.explanations import explanation_field
from deployments.http.prediction_details import prediction_details
from engine.dialogue.events import Arguments, CallStart, Event, Reasoning, Text, gather
from engine.text.output import OutputDelta, ToldPrompt


class AnswerFormat(Protocol):
    """How one endpoint words its answers, whole or as events."""

    def whole(self, *deltas: OutputDelta) -> dict[str, Any]:
        """The answer, from the whole of each choice."""
        ...

    def events(self, delta: OutputDelta, index: int = 0) -> str:
        """What is new of the choice `index`, as events, perhaps none. The end of the last choice gives that of the stream."""
        ...

    def error(self, error: ErrorItem) -> str:
        """The end of a stream that was begun and cannot go on."""
        ...


class _Envelope(ABC):
    """What all objects of one answer have around their choices, and the stream that they are sent in.

    created: Unix time in seconds.
    """

    def __init__(self, answer_id: str, created: int, body: ChoicesBody) -> None:
        self._head = {"id": answer_id, "created": created, "model": body.model, "system_fingerprint": None}
        self._answer_id = answer_id
        self._body = body
        self._latest: dict[int, OutputDelta] = {}
        self._num_open = body.num_choices

    @abstractmethod
    def chunks(self, delta: OutputDelta, index: int = 0) -> list[dict[str, Any]]:
        """What is new of the choice `index`; none if it says nothing."""

    @abstractmethod
    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, for clients that want one with the usage alone."""

    def events(self, delta: OutputDelta, index: int = 0) -> str:
        """All chunks in one message, because each message has its price."""
        chunks = self.chunks(delta, index)
        self._num_open -= delta.finish_reason is not None
        if not self._num_open and chunks:
            chunks[-1] |= self._cache_report()
        said = "".join(map(sse_event, chunks))
        if self._num_open:
            return said
        return said + (sse_event(self.usage_chunk()) if self._body.include_usage else "") + DONE

    def error(self, error: ErrorItem) -> str:
        """An error after the start is an event; no [DONE] follows, because the answer is not done."""
        return sse_event(error_body(self._body.in_own_words(error)))

    def _note(self, delta: OutputDelta, index: int) -> bool:
        """Take in what comes of a choice; whether it is the first that does."""
        is_first = index not in self._latest
        self._latest[index] = delta
        return is_first

    def _firsts(self) -> list[OutputDelta]:
        """The latest of the first answer to each prompt."""
        return [delta for index, delta in self._latest.items() if index % self._body.n == 0]

    def _cache_report(self) -> dict[str, Any]:
        """Beside the choices: what came of hints, and of a comparison with an earlier request."""
        firsts = self._firsts()
        compared = [delta.comparison for delta in firsts if delta.comparison is not None]
        told = hint_report(firsts)
        return told | ({"prompt_cache_diagnostics": diagnostics(compared[0])} if compared else {})

    def _usage(self) -> dict[str, Any]:
        """Each prompt counts once, and all answers do. cached_tokens is there also when it is 0."""
        firsts = self._firsts()
        num_prompt_tokens = sum(delta.num_prompt_tokens for delta in firsts)
        num_output_tokens = sum(delta.num_output_tokens for delta in self._latest.values())
        num_cached_tokens = sum(delta.num_cached_tokens for delta in firsts)
        usage: dict[str, Any] = {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": num_prompt_tokens + num_output_tokens,
            "prompt_tokens_details": {
                "cached_tokens": num_cached_tokens,
                **write_details(firsts),
                **cache_details(firsts),
            },
        }
        if details := _completion_details(list(self._latest.values())):
            usage["completion_tokens_details"] = details
        return usage

    def _chunk(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        chunk = {**self._head, "object": kind, "choices": choices, **more}
        if self._body.include_usage:
            chunk["usage"] = self._usage() if self._body.continuous_usage or not choices else None
        return chunk


def _completion_details(deltas: Sequence[OutputDelta]) -> dict[str, int]:
    """Tokens of thinking, and guesses that came true or did not; what there is none of is left out."""
    details = {}
    if num_reasoning_tokens := sum(delta.num_reasoning_tokens for delta in deltas):
        details["reasoning_tokens"] = num_reasoning_tokens
    return details | prediction_details(deltas)


class ChatFormat(_Envelope):
    """chat.completion and chat.completion.chunk. The text is taken apart into content, thinking and calls."""

    def __init__(self, answer_id: str, created: int, body: ChatCompletionBody) -> None:
        super().__init__(answer_id, created, body)
        self._readers = [AnswerReader(body.offered_tools) for _ in range(body.n)]

    def whole(self, *deltas: OutputDelta) -> dict[str, Any]:
        choices = [self._whole_choice(delta, index) for index, delta in enumerate(deltas)]
        answer = {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage()}
        answer |= self._cache_report()
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = list(deltas[0].prompt_token_ids)
        if self._body.prompt_logprobs is not None and deltas[0].told_prompt is not None:
            answer["prompt_logprobs"] = prompt_logprobs(deltas[0].told_prompt, self._body.prompt_logprobs)
        return answer

    def _whole_choice(self, delta: OutputDelta, index: int) -> dict[str, Any]:
        self._note(delta, index)
        answer_said = gather(self._readers[index].read(delta))
        content = answer_said.content or (None if answer_said.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if answer_said.reasoning:
            message |= _reasoning(answer_said.reasoning)
        if answer_said.calls:
            message["tool_calls"] = [
                self._call(index, number, call.name, call.arguments, call.call_id)
                for number, call in enumerate(answer_said.calls)
            ]
        choice = {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(delta.logprobs),
            "finish_reason": self._finish_reason(delta, index),
            **_stop_reason(delta),
            **explanation_field(delta),
        }
        if self._body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return choice

    def chunks(self, delta: OutputDelta, index: int = 0) -> list[dict[str, Any]]:
        """The first delta also gives the chunk that names the role."""
        chunks = []
        if self._note(delta, index):
            more = {"prompt_token_ids": list(delta.prompt_token_ids)} if self._body.return_token_ids else {}
            role = {"role": "assistant", "content": "", "refusal": None}
            choice = {"index": index, "delta": role, "logprobs": None, "finish_reason": None}
            chunks.append(self._chunk("chat.completion.chunk", [choice], **more))
        reader = self._readers[index]
        pieces = [piece for event in reader.read(delta) if (piece := self._piece(event, index))]
        if not pieces and (delta.logprobs or self._body.return_token_ids):
            pieces.append({})
        if delta.finish_reason is not None and (not pieces or reader.has_calls):
            pieces.append({})  # behind calls the end comes alone, as OpenAI sends it
        for number, piece in enumerate(pieces):
            choice = {
                "index": index,
                "delta": piece,
                "logprobs": None if number else chat_logprobs(delta.logprobs),
                "finish_reason": self._finish_reason(delta, index) if number == len(pieces) - 1 else None,
                **(_stop_reason(delta) | explanation_field(delta) if number == len(pieces) - 1 else {}),
            }
            if self._body.return_token_ids:
                choice["token_ids"] = [] if number else list(delta.token_ids)
            chunks.append(self._chunk("chat.completion.chunk", [choice]))
        return chunks

    def _finish_reason(self, delta: OutputDelta, index: int) -> str | None:
        """Clients make the calls of an answer that ends with "tool_calls": all of them have to be whole."""
        makes_calls = self._readers[index].has_calls and not self._readers[index].is_cut
        return "tool_calls" if delta.finish_reason == "stop" and makes_calls else delta.finish_reason

    def _piece(self, event: Event, index: int) -> dict[str, Any] | None:
        """What a chunk says of one event; None = nothing."""
        match event:
            case Text(text):
                return {"content": text}
            case Reasoning(text):
                return _reasoning(text)
            case CallStart(number, name, call_id):
                return {"tool_calls": [{"index": number, **self._call(index, number, name, "", call_id)}]}
            case Arguments(number, text):
                return {"tool_calls": [{"index": number, "function": {"arguments": text}}]}
            case _:
                return None

    def _call(self, index: int, number: int, name: str, arguments: str, call_id: str) -> dict[str, Any]:
        """call_id: the model's own; where its format has none, the id is made from the choice's."""
        choice_id = f"{self._answer_id}.{index}" if index else self._answer_id
        function = {"name": name, "arguments": arguments}
        return {"id": call_id or made_call_id(choice_id, number), "type": "function", "function": function}

    def usage_chunk(self) -> dict[str, Any]:
        return self._chunk("chat.completion.chunk", [])


class CompletionFormat(_Envelope):
    """text_completion, whole and in chunks."""

    def __init__(self, answer_id: str, created: int, body: CompletionBody) -> None:
        super().__init__(answer_id, created, body)
        self._num_top = body.logprobs or 0
        self._is_prompt_only = body.num_answer_tokens == 0
        self._told: dict[int, ToldPrompt] = {}  # by the number of the prompt; its first answer brings it

    def whole(self, *deltas: OutputDelta) -> dict[str, Any]:
        choices = [self._choice(delta, index) for index, delta in enumerate(deltas)]
        return {
            **self._head,
            "object": "text_completion",
            "choices": choices,
            "usage": self._usage(),
        } | self._cache_report()

    def chunks(self, delta: OutputDelta, index: int = 0) -> list[dict[str, Any]]:
        choice = self._choice(delta, index)
        if not (choice["text"] or choice["logprobs"] or delta.finish_reason or self._body.return_token_ids):
            return []  # text lags behind tokens: a character may take several
        return [self._chunk("text_completion", [choice])]

    def usage_chunk(self) -> dict[str, Any]:
        return self._chunk("text_completion", [])

    def _choice(self, delta: OutputDelta, index: int) -> dict[str, Any]:
        if self._is_prompt_only:
            reason = None if delta.finish_reason is None else "length"
            delta = replace(delta, text="", token_ids=(), logprobs=(), num_output_tokens=0, finish_reason=reason)
        is_first, number = self._note(delta, index), index // self._body.n
        if delta.told_prompt is not None:
            self._told[number] = delta.told_prompt
        told = self._told.get(number)
        logprobs = CompletionLogprobs()
        if told is not None and self._body.shows_prompt:
            logprobs.offset = len(told.text)
            if is_first:
                logprobs.add_prompt(told, self._num_top)
        for token in delta.logprobs:
            logprobs.add(token)
        choice: dict[str, Any] = {
            "index": index,
            "text": told.text + delta.text if is_first and told and self._body.shows_prompt else delta.text,
            "logprobs": logprobs.value(),
            "finish_reason": delta.finish_reason,
            **_stop_reason(delta),
            **explanation_field(delta),
        }
        if self._body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
            if is_first:
                choice["prompt_token_ids"] = list(delta.prompt_token_ids)
        if self._body.prompt_logprobs is not None and told is not None:
            choice["prompt_logprobs"] = prompt_logprobs(told, self._body.prompt_logprobs)
        return choice


def _stop_reason(delta: OutputDelta) -> dict[str, Any]:
    """vLLM's name for the stop string that ended the answer, if one did."""
    return {} if delta.stop_string is None else {"stop_reason": delta.stop_string}


def _reasoning(text: str) -> dict[str, Any]:
    """Under both names that clients look for."""
    return {"reasoning_content": text, "reasoning": text}
