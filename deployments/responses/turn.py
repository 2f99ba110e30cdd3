"""One turn of the Responses API, from its record in the store to its end there.

Whatever happens to the client, the engine or the store, the record ends exactly once: complete, failed, interrupted, or
gone.

    begin --> start --> items ... --> complete       the store has the answer before the client hears the end
      |         |         |-------> give_up          failed, or interrupted
      |---------|-----------------> forget           the client never heard of the response
                                    end              after any of these: what has not ended is interrupted
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from functools import partial

from deployments.errors import ResponseCancelledError
from deployments.generation import ErrorItem, GenerationItem
from deployments.http.admission import Admission
from deployments.responses.answers import ResponseJson, ResponseObject, cancelled, failed
from deployments.responses.items import ItemJson, answers_something
from deployments.responses.requests import ResponseBody
from deployments.responses.store_upkeep import StoreUpkeep
from deployments.responses.stored import new_items, response_of
from deployments.store.errors import NotFoundError, StoreUnavailableError
from deployments.store.values import NewResponse, Outcome, StoredResponse
from engine.errors import ContextLengthError, PensieveError
from engine.tenant import Tenant
from engine.text.transcript import Transcript

logger = logging.getLogger("ray.serve")

CANCELLED = ErrorItem.of(ResponseCancelledError())
# A complete answer is worth some patience with a store that does not answer. Pauses in seconds.
STORE_RETRIES_S = (0.2, 1.0, 3.0)
# How much of a history is read for each token of the model's window, as JSON: more cannot fit. The longest tokens of any
# vocabulary have about 128 characters, some of which take several bytes as JSON. With truncation="auto" something is left out
# anyway, and it may be what lies further back than any usual text of that many tokens, short messages included.
MAX_BYTES_PER_TOKEN = 1024
USUAL_BYTES_PER_TOKEN = 64


class Turn:
    """The items of one answer, for one reader, and the record of them in the store. `stop` may be called at any time."""

    def __init__(
        self,
        tenant: Tenant,
        body: ResponseBody,
        form: ResponseObject,
        input_items: Sequence[ItemJson],
        session_key: str,
        upkeep: StoreUpkeep,
    ) -> None:
        """Records nothing yet.

        form: the response that the client will see.
        input_items: what the body adds, with ids.
        session_key: what the request is routed by if it continues nothing.
        """
        self.form = form
        self._tenant = tenant
        self._body = body
        self._input_items = input_items
        self._session_key = session_key
        self._upkeep = upkeep
        self._history: Sequence[ItemJson] = ()
        self._transcript: Transcript | None = None
        self._items: AsyncGenerator[GenerationItem, None] | None = None
        self._waiting: asyncio.Timeout | None = None  # while the next item is waited for
        self._closing: asyncio.Task[None] | None = None
        self._is_stopped = False
        self._is_read = False  # after a stop, to the item that says so

    @property
    def response_id(self) -> str:
        """The id of its response, under which the store has it."""
        return self.form.response_id

    @property
    def _is_stored(self) -> bool:
        return self._body.store

    # -- the beginning -------------------------------------------------------------------------------------------------

    async def begin(self, max_model_len: int) -> None:
        """Records the turn as running if it is to be stored, and reads what came before.

        max_model_len: the model's window in tokens. Raises ContextLengthError if more came before than it can hold,
        and what ConversationStore.begin_response and get_history raise.
        """
        if self._is_stored:
            await self._record()
        if self._body.is_continued:
            try:
                await self._read_history(max_model_len)
            except BaseException as error:
                self._upkeep.later(self.forget(error))
                raise

    async def _record(self) -> None:
        store = await self._upkeep.opened()
        now = self._upkeep.clock()
        new = NewResponse(
            id=self.response_id,
            model=self._body.model,
            input=new_items(self._input_items),
            owner=self._upkeep.owner,
            lease_until=self._upkeep.lease_until(),
            previous_response_id=self._body.previous_response_id,
            conversation_id=self._body.conversation_id,
            session_key=self._session_key,
            instructions=self._body.instructions,
            params=self.form.in_progress() | {"instructions": None},  # which have a place of their own
        )
        begun = asyncio.create_task(store.begin_response(self._tenant.tenant_id, new, now))
        try:
            self._session_key = (await asyncio.shield(begun)).session_key
        except asyncio.CancelledError:
            self._upkeep.later(self._give_up_begun(begun))
            raise
        self._upkeep.running[self.response_id] = self

    async def _read_history(self, max_model_len: int) -> None:
        is_cut = self._body.truncation == "auto"
        history = await (await self._upkeep.opened()).get_history(
            self._tenant.tenant_id,
            previous_response_id=self._body.previous_response_id,
            conversation_id=self._body.conversation_id,
            max_bytes=max_model_len * (USUAL_BYTES_PER_TOKEN if is_cut else MAX_BYTES_PER_TOKEN),
        )
        if not (history.is_whole or is_cut):
            raise ContextLengthError(
                f"the context window is {max_model_len} tokens, and the stored history is longer; send "
                "truncation: auto, or begin a new conversation",
                param=None,
            )
        said = [dict(item.body) for item in history.items]
        while said and not history.is_whole and answers_something(said[0]):  # without what it answers
            del said[0]
        self._history = said
        self._transcript = history.transcript
        self._session_key = history.session_key

    async def start(self, admission: Admission, *, only_encodes: bool = False) -> GenerationItem:
        """Asks the engine; returns the first item, which decides on the HTTP status. The others are this object's.

        only_encodes: see Generation.
        """
        try:
            request = self._body.generation_request(
                self._body.prompt_value([*self._history, *self._input_items]),
                request_id=self.response_id,
                session_id=self._session_key,
                tenant=self._tenant,
                history=self._transcript,
                returns_transcript=self._is_stored,
            )
            request = replace(request, only_encodes=only_encodes)
            self._items = admission.generate(request, self._body.timeout)
            return await anext(self)
        except BaseException as error:
            self._upkeep.later(self.forget(error))
            raise

    # -- the items -----------------------------------------------------------------------------------------------------

    def __aiter__(self) -> Turn:
        return self

    async def __anext__(self) -> GenerationItem:
        """The next item of the answer; once the turn is stopped, CANCELLED, and then the end."""
        assert self._items is not None
        if self._is_read:
            raise StopAsyncIteration
        if not self._is_stopped:
            try:
                async with asyncio.timeout(None) as self._waiting:
                    return await anext(self._items)
            except TimeoutError:  # see `stop`
                if not self._is_stopped:
                    raise
            finally:
                self._waiting = None
        self._is_read = True
        return CANCELLED

    def stop(self) -> None:
        """Ends the computation; the reader gets CANCELLED."""
        if self._is_stopped:
            return
        self._is_stopped = True
        if self._waiting is not None:
            # Interrupts the reader, and with it the generator that it reads.
            self._waiting.reschedule(asyncio.get_running_loop().time())
        elif self._items is not None:
            self._closing = asyncio.create_task(self._items.aclose())

    async def aclose(self) -> None:
        """Ends the computation if it runs; there will be no reader any more."""
        if self._closing is not None:
            await asyncio.wait([self._closing])
        if self._items is not None:
            await self._items.aclose()

    # -- the end -------------------------------------------------------------------------------------------------------

    async def complete(self, answer: ResponseJson, transcript: Transcript | None) -> ResponseJson:
        """The whole answer, stored; if it was cancelled, deleted or interrupted meanwhile, what the store has instead.

        transcript: what the engine computed. Raises StoreUnavailableError after some patience, StoreCorruptedError.
        """
        if self._is_stored and not await self._store_outcome(answer, transcript):
            answer = await self._stored_instead()
        self._upkeep.running.pop(self.response_id, None)
        return answer

    async def _store_outcome(self, answer: ResponseJson, transcript: Transcript | None) -> bool:
        details = answer["incomplete_details"]
        outcome = Outcome(
            output=new_items(answer["output"]),
            usage=answer["usage"],
            transcript=transcript,
            completed_at=self._upkeep.clock(),
            incomplete_reason=None if details is None else details["reason"],
        )
        complete = partial(self._upkeep.store.complete_response, self._tenant.tenant_id, self.response_id, outcome)
        for pause_s in STORE_RETRIES_S:
            try:
                return await complete()
            except StoreUnavailableError:
                await asyncio.sleep(pause_s)
        return await complete()

    async def _stored_instead(self) -> ResponseJson:
        store, now = self._upkeep.store, self._upkeep.clock()
        try:
            return response_of(await store.get_response(self._tenant.tenant_id, self.response_id, now))
        except NotFoundError:  # deleted
            return cancelled(self.form.in_progress())

    async def give_up(self, why: ErrorItem | None) -> None:
        """The turn has no answer: it failed, or no client waits for it any more (None)."""
        if not self._leave():
            return
        store, now = self._upkeep.store, self._upkeep.clock()
        with self._may_stay_in_progress():
            if why is None:
                await store.interrupt_response(self._tenant.tenant_id, self.response_id, now)
            else:
                error = failed(self.form.in_progress(), why)["error"]
                await store.fail_response(self._tenant.tenant_id, self.response_id, error, now)

    async def forget(self, why: ErrorItem | BaseException) -> None:
        """The turn ends before its answer began, and is deleted.

        Its client gets an error without the response's id, and could not delete what is stored of it. If a client
        cancelled it, and so knows the id, or hung up, it is interrupted instead.
        """
        if why == CANCELLED or isinstance(why, asyncio.CancelledError):
            await self.give_up(None)
        elif self._leave():
            with self._may_stay_in_progress():
                await self._upkeep.store.delete_response(self._tenant.tenant_id, self.response_id, self._upkeep.clock())

    async def _give_up_begun(self, begun: asyncio.Task[StoredResponse]) -> None:
        """The client left while the turn was being recorded, which comes to its end all the same."""
        with contextlib.suppress(PensieveError):
            await begun
            await self.give_up(None)

    def _leave(self) -> bool:
        """Stops the turn; whether the store is to be told of its end."""
        self.stop()
        self._upkeep.running.pop(self.response_id, None)
        return self._is_stored

    @contextlib.contextmanager
    def _may_stay_in_progress(self) -> Iterator[None]:
        try:
            yield
        except PensieveError as error:
            logger.warning("response %s stays in progress until its lease is over: %s", self.response_id, error.message)

    def end(self) -> None:
        """The HTTP response is over, however it ended; a turn that has not ended is interrupted. May be called again."""
        if self._upkeep.running.pop(self.response_id, None) is not None:
            self._upkeep.later(self.give_up(None))

    async def close(self) -> None:
        """Both: ends the computation, and the turn."""
        await self.aclose()
        self.end()
