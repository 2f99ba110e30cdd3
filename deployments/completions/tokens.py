"""/tokenize and /detokenize, with the requests and answers of vLLM's.

An engine replica does it, because it has the tokenizer; nothing is computed, and no tokens are charged.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.completions.chat_messages import Message, ToolDefinition, check_continued
from deployments.generation import ErrorItem, GenerationRequest, ModelCard, drain
from deployments.http.admission import Admission, Generates
from deployments.http.errors import error_response
from deployments.http.function_tools import MAX_TOOLS, check_tools
from deployments.http.gate import Gate
from deployments.http.generation_body import MAX_MESSAGES, TemplateKwargs, TokenId
from deployments.http.parsing import Body
from deployments.http.served_model import check_model, check_prompt
from engine.core.request import SamplingParams
from engine.dialogue.template_values import template_kwargs
from engine.dialogue.tools import AS_THE_MODEL_LIKES
from engine.tenant import Tenant
from engine.text.output import OutputDelta
from engine.text.prompt import ChatPrompt, Prompt, TextPrompt, TokenPrompt


class TokenizeBody(Body):
    """POST /tokenize: a text, or a chat. model: the served one, if it is given.

    add_special_tokens: those around a text; a chat template writes its own. Text only.
    """

    not_implemented: ClassVar[Mapping[str, tuple[Any, ...]]] = {"chat_template": ()}

    model: str | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES, fail_fast=True)] = Field(default=[])
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(default=[])
    chat_template_kwargs: TemplateKwargs = Field(default={})
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one_prompt(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise PydanticCustomError("missing", "give either prompt or messages", {"param": "prompt"})
        if self.messages and self.add_special_tokens:
            message = "must be false with messages, whose template has written them already"
            raise PydanticCustomError("invalid", message, {"param": "add_special_tokens"})
        if self.continue_final_message:
            if not self.messages:
                message = "needs messages, of which it is the last one"
                raise PydanticCustomError("invalid", message, {"param": "continue_final_message"})
            check_continued(self.messages, opens_answer=self.add_generation_prompt)
        check_tools([tool.value() for tool in self.tools], AS_THE_MODEL_LIKES)
        return self

    @property
    def prompt_param(self) -> Literal["messages", "prompt"]:
        return "prompt" if self.prompt is not None else "messages"

    def prompt_value(self) -> ChatPrompt | TextPrompt:
        """Raises InvalidParameterError."""
        if self.prompt is not None:
            return TextPrompt(self.prompt, adds_special_tokens=self.add_special_tokens is not False)
        return ChatPrompt(
            tuple(message.value() for message in self.messages),
            tools=tuple(tool.value() for tool in self.tools),
            template_kwargs=template_kwargs(self.chat_template_kwargs),
            continues=self.continue_final_message,
            opens_answer=self.add_generation_prompt is not False,
        )


class DetokenizeBody(Body):
    """POST /detokenize: token ids, as many as the window has. model: the served one, if it is given."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


def add_token_routes(app: FastAPI, gate: Gate, admission: Admission, engine: Generates) -> None:
    """engine: asked without admission, because it uses no tokens."""

    async def spelled(tenant: Tenant, prompt: Prompt, param: str, card: ModelCard) -> OutputDelta | ErrorItem:
        """The prompt's tokens, as ids, names and text."""
        check_prompt(prompt, card, param)
        refusal = admission.refusal(tenant.tenant_id)
        if refusal is not None:
            return refusal
        request_id = f"tokens_{uuid.uuid4().hex}"
        items = engine.generate(
            GenerationRequest(
                request_id,
                request_id,  # no conversation: whatever others said changes nothing
                prompt,
                SamplingParams(max_tokens=1, temperature=0.0),
                return_prompt_token_ids=True,
                tenant=tenant,
                only_encodes=True,
                spells_prompt=True,
                stream=False,
                model=card.model_name,
            )
        )
        item = await anext(items)
        await drain(items)
        if isinstance(item, ErrorItem):
            return replace(item, param=param if item.param == "prompt" else item.param)
        return item.delta

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        tenant, body, _ = await gate.read(TokenizeBody, request)

        async def respond(card: ModelCard) -> Response:
            check_model(body.model or card.model_name, card)
            found = await spelled(tenant, body.prompt_value(), body.prompt_param, card)
            if isinstance(found, ErrorItem):
                return error_response(found)
            answer = {
                "count": found.num_prompt_tokens,
                "max_model_len": card.max_model_len,
                "tokens": list(found.prompt_token_ids),
                "token_strs": list(found.prompt_token_names) if body.return_token_strs else None,
            }
            return JSONResponse(answer)

        return await gate.in_one_place(tenant, respond, body.model or "")

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        tenant, body, _ = await gate.read(DetokenizeBody, request)

        async def respond(card: ModelCard) -> Response:
            check_model(body.model or card.model_name, card)
            found = await spelled(tenant, TokenPrompt(tuple(body.tokens)), "tokens", card)
            return error_response(found) if isinstance(found, ErrorItem) else JSONResponse({"prompt": found.text})

        return await gate.in_one_place(tenant, respond, body.model or "")
