"""What holds for conversations between their turns: hints of clients, what is learned of pauses, and holes that are filled.

Knows no HTTP. Chunks are looked up in the engine thread, named outside of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.core.cache_map import ContextKeys, context_keys
from engine.core.engine_core import EngineCore
from engine.core.pauses import Pauses
from engine.core.request import Request, SamplingParams
from engine.core.retention import ConversationCache, RetentionHint, RetentionOutcome
from engine.core.reuse import Reuse
from engine.core.tier_table import BOTH, DROPPED
from engine.errors import EngineError
from engine.text.transcript import ConversationTable, Transcript

# Hints on conversations that are remembered for their next turns.
MAX_STANDING_HINTS = 1 << 14
# The holes of a conversation are filled if it is expected within so many seconds.
REFILL_S = 30.0
MAX_EXPECTED = 1 << 12
# Of these, those whose holes are looked for at a time.
MAX_LOOKED_AT = 8

Call = Callable[[Callable[[], Any]], Awaitable[Any]]


@dataclass(slots=True)
class _Expected:
    """A conversation whose next turn is expected. chunk_keys: of its context, once they were made."""

    when_s: float
    tenant: str
    adapter: str
    weight: float
    chunk_keys: Sequence[bytes] = ()


class ConversationRetention:
    """Hints on conversations, the same whichever request of it comes next.

    learns: pauses, by tool; else only clients say when a conversation goes on.
    """

    def __init__(
        self,
        core: EngineCore,
        conversations: ConversationTable,
        call: Call,
        clock: Callable[[], float],
        mode: str,
        adapter_identity: Callable[[str], str] = lambda _: "",
    ) -> None:
        """Nothing is known yet.

        call: runs a function in the engine thread.
        mode: see CacheOptions.kv_hints.
        adapter_identity: of a conversation's adapter, by the conversation's name; "" = the model alone.
        """
        self._adapter_identity = adapter_identity
        self.learns = mode == "learned"
        self._fills_holes = mode != "off"
        self._core = core
        self._conversations = conversations
        self._call = call
        self._clock = clock
        self._standing: OrderedDict[str, RetentionHint] = OrderedDict()
        self._pauses = Pauses()
        self._expected: dict[str, _Expected] = {}
        self.num_refills = 0

    # -- what clients say ----------------------------------------------------------------------------------------------

    def hint_for(self, conversation_id: str | None) -> RetentionHint | None:
        """What holds for a conversation's next turn, if that says nothing itself."""
        return None if conversation_id is None else self._standing.get(conversation_id)

    async def retain(self, conversation_id: str, hint: RetentionHint) -> RetentionOutcome:
        """See AsyncEngine.retain."""
        keys = await asyncio.to_thread(self._keys_of, conversation_id)
        outcome: RetentionOutcome = await self._call(
            lambda: self._core.retain(conversation_id, keys, _tenant_of(conversation_id), hint, self._clock())
        )
        self._standing.pop(conversation_id, None)
        if outcome.outcome != "refused" and not hint.is_release:
            self._standing[conversation_id] = hint
            if len(self._standing) > MAX_STANDING_HINTS:
                self._standing.popitem(last=False)
        return outcome

    async def look(self, conversation_id: str) -> ConversationCache | None:
        """See AsyncEngine.cache_state."""
        if not self._conversations.knows(conversation_id):
            return None
        keys = await asyncio.to_thread(self._keys_of, conversation_id)
        context = (
            await self._call(lambda: self._core.map_contexts({conversation_id: keys}, keys.num_chunks, self._clock()))
        )[conversation_id]
        tokens: Counter[str] = Counter()
        for cell in context.cells:
            if cell.state not in (DROPPED, "computing"):
                tokens[{BOTH: "gpu", "loading": "cpu", "storing": "gpu"}.get(cell.state, cell.state)] += cell.num_tokens
        return ConversationCache(
            self._conversations.count_tokens(conversation_id), dict(tokens), self._standing.get(conversation_id)
        )

    def _keys_of(self, conversation_id: str) -> ContextKeys:
        branch = self._branch_of(conversation_id)
        config = self._core.cache_config
        token_ids = () if branch is None else branch.token_ids
        return context_keys(
            token_ids,
            model=config.model,
            tenant=_tenant_of(conversation_id),
            adapter=self._adapter_identity(conversation_id),
            chunk_size=config.chunk_size,
            max_chunks=-(-len(token_ids) // config.chunk_size),
        )

    def _branch_of(self, conversation_id: str) -> Transcript | None:
        conversation = self._conversations.find(conversation_id)
        return None if conversation is None or not conversation.branches else conversation.branches[-1]

    # -- in the engine thread ------------------------------------------------------------------------------------------

    def note_start(self, request: Request) -> None:
        """A turn has come."""
        self._expected.pop(request.conversation_id, None)
        if self.learns:
            self._pauses.note_return(request.conversation_id, self._clock())

    def note_end(self, request: Request, tool: str) -> None:
        """A turn has ended, with a call of that tool, or "" = with an answer to a person."""
        now = self._clock()
        hint = request.retention
        expected_s = None if hint is None else hint.expected_return_s
        if self.learns:
            learned_s = self._pauses.note_end(request.conversation_id, request.tenant, tool, now)
            if expected_s is None and learned_s is not None and (hint is None or not hint.is_release):
                expected_s = learned_s
                self._core.expect_use(request, now + learned_s, now)
        if expected_s is not None and self._fills_holes and len(self._expected) < MAX_EXPECTED:
            self._expected[request.conversation_id] = _Expected(
                now + expected_s, request.tenant, request.adapter, request.weight
            )

    def fill_holes(self) -> bool:
        """Queue a request that computes what is missing of a conversation that is expected soon; False if nothing is.

        For when nothing else is to be done: the request makes way for any other, and takes only blocks that cost nothing.
        """
        now = self._clock()
        for conversation_id in [name for name, expected in self._expected.items() if expected.when_s <= now]:
            del self._expected[conversation_id]
        soon = ((name, each) for name, each in self._expected.items() if each.when_s <= now + REFILL_S)
        for conversation_id, expected in heapq.nsmallest(MAX_LOOKED_AT, soon, key=lambda entry: entry[1].when_s):
            branch = self._branch_of(conversation_id)
            # An adapter that was unloaded, or is another one by now, cannot compute it.
            if branch is None or expected.adapter != self._adapter_identity(conversation_id):
                del self._expected[conversation_id]
                continue
            request = Request(
                f"refill-{self.num_refills}",
                branch.token_ids[:-1],
                SamplingParams(temperature=0.0),
                conversation_id=conversation_id,
                tenant=expected.tenant,
                adapter=expected.adapter,
                weight=expected.weight,
                chunk_keys=expected.chunk_keys,
                reuse=Reuse(expected_use_s=expected.when_s - now),
                is_refill=True,
            )
            has_holes = self._core.has_holes_to_fill(request)
            expected.chunk_keys = request.chunk_keys
            if has_holes:
                self.num_refills += 1
                with contextlib.suppress(EngineError):  # it no longer fits the window
                    self._core.add_request(request, now)
                    return True
        return False


def _tenant_of(conversation_id: str) -> str:
    return conversation_id.partition("\n")[0]
