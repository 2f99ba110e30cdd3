"""Why a prompt was not found in the cache: compared with the context of an earlier request that its client names.

Remembers the contexts of the last requests, by their tokens; knows no KV. What was the same and yet not cached is for the
core to explain.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from engine.core.retention import Miss
from engine.text.transcript import Transcript, common_prefix_len
from engine.text.turns import RecognisedChat

# What the contexts of the last requests may take: four million tokens, as many as a few large GPU tiers have.
MAX_BYTES = 16 << 20
# What one takes besides its tokens.
CONTEXT_BYTES = 400
# Tokens that are shown of each of two texts that differ.
SHOWN_TOKENS = 8

# What is different first, in a chat.
TOOLS, SYSTEM, MESSAGES = "tools", "system", "messages"


class RecentContext(NamedTuple):
    """What a finished request had in its context, prompt and answer. tools_key, system_key: empty if it was no chat."""

    tenant: str
    token_ids: array[int]
    tools_key: bytes = b""
    system_key: bytes = b""


class Difference(NamedTuple):
    """The first place at which a prompt is not what an earlier context was.

    token: its position.
    part: TOOLS, SYSTEM or MESSAGES in a chat, else empty.
    message, role: the number of the message that it is in, and who says that; None and empty = not known.
    before, now: the beginnings of the two texts from there on.
    """

    token: int
    part: str
    message: int | None
    role: str
    before: str
    now: str


class Loss(NamedTuple):
    """Tokens that were the same and were computed all the same.

    reason: see Miss; "unknown" = it is not remembered any more.
    ago_s: seconds since the eviction; None = not known.
    """

    reason: str
    num_tokens: int
    ago_s: float | None = None


@dataclass(frozen=True, slots=True)
class CacheComparison:
    """A prompt and the context of an earlier request.

    is_found: the earlier request is remembered here; else nothing else is known.
    num_same: tokens that both begin with.
    num_different: of the prompt behind them, as many as the earlier context might have had.
    losses: of the tokens that are the same, the longest first.
    """

    is_found: bool
    num_same: int = 0
    num_different: int = 0
    difference: Difference | None = None
    losses: tuple[Loss, ...] = ()

    @property
    def num_lost(self) -> int:
        """Tokens that are the same and were computed."""
        return sum(loss.num_tokens for loss in self.losses)

    def with_losses(self, num_cached: int, misses: Sequence[Miss], now: float, chunk_size: int) -> CacheComparison:
        """The same with what became of the tokens that both begin with.

        num_cached: tokens of the prompt that were cached. misses: why which tokens were computed, as far as it is known.
        now: on the clock of the misses.
        chunk_size: what two contexts share are whole chunks; nothing of another one can be lost.
        """
        num_shared = self.num_same // chunk_size * chunk_size
        found: dict[str, tuple[int, float | None]] = {}
        for miss in misses:
            num_tokens = min(miss.end, num_shared) - miss.start
            if num_tokens > 0:
                num_before, ago_s = found.get(miss.reason, (0, None))
                if miss.time_s is not None:  # of several the latest
                    ago_s = now - miss.time_s if ago_s is None else min(ago_s, now - miss.time_s)
                found[miss.reason] = num_before + num_tokens, ago_s
        if not misses and num_cached < num_shared:
            found["unknown"] = num_shared - num_cached, None
        losses = (Loss(reason, *what) for reason, what in found.items())
        return replace(self, losses=tuple(sorted(losses, key=lambda loss: -loss.num_tokens)))


NOT_FOUND = CacheComparison(is_found=False)


class RecentContexts:
    """The contexts of the last finished requests; the oldest are forgotten. One thread adds, any may look."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._by_id: OrderedDict[tuple[str, str], RecentContext] = OrderedDict()

    def add(self, request_id: str, context: RecentContext) -> None:
        """Remember one; of one id the latest."""
        key = (context.tenant, request_id)
        old = self._by_id.pop(key, None)
        self._num_bytes += _num_bytes(context) - (0 if old is None else _num_bytes(old))
        self._by_id[key] = context
        while self._num_bytes > self._max_bytes:
            _, oldest = self._by_id.popitem(last=False)
            self._num_bytes -= _num_bytes(oldest)

    def find(self, tenant: str, request_id: str) -> RecentContext | None:
        """The context of a request of this tenant; another tenant's is as unknown as one that never was."""
        return self._by_id.get((tenant, request_id))


def _num_bytes(context: RecentContext) -> int:
    return CONTEXT_BYTES + len(context.token_ids) * context.token_ids.itemsize


def compare(
    context: RecentContext,
    transcript: Transcript,
    chat: RecognisedChat | None,
    decode: Callable[[Sequence[int]], str],
    find_message: Callable[[int], int | None],
) -> CacheComparison:
    """A prompt with an earlier context, without the losses.

    decode: tokens to text. find_message: the number of the message in which the token of that position is.
    """
    before, now = context.token_ids, transcript.token_ids
    # The last token of either was, or will be, computed in any case: it is what the next one is chosen by.
    shorter = min(len(before), len(now)) - 1
    same = min(common_prefix_len(before, now), shorter)
    if same == shorter:
        return CacheComparison(is_found=True, num_same=same)
    part, message, role = "", None, ""
    if chat is not None:
        is_other_system = context.system_key != chat.system_key
        part = TOOLS if context.tools_key != chat.tools_key else SYSTEM if is_other_system else MESSAGES
        message = None if chat.is_truncated else find_message(same)
        role = "" if message is None else chat.messages[message].role
    shown = [decode(ids[same : same + SHOWN_TOKENS]) for ids in (before, now)]
    difference = Difference(same, part, message, role, *shown)
    return CacheComparison(is_found=True, num_same=same, num_different=shorter - same, difference=difference)
