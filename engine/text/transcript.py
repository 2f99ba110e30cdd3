"""What was said in a conversation: its token ids and the text they stand for.

A client that sends its history again sends text; comparing text with text finds the ids that were computed. Knows no
tokenizer and no KV.

Which ids a prompt has depends on its text and on which parts of it the model generated, and on nothing else:

- *Text that a client wrote* has the ids that tokenising the whole prompt afresh gives it. The ids of an earlier turn are
  used up to a cut: a place before a token that the tokenizer finds wherever its text stands ("<|im_end|>"), on both sides of
  which it works apart. From the cut on the prompt is tokenised again.
- *An answer* keeps the ids that the model generated if the prompt goes on with all of its text, right behind the very
  text that it answered, and then with such a token. Anything else is text that a client wrote: an answer that was edited or
  cut short, and the text of a completion that is typed further. If one text is remembered both ways, written by a client
  and given by the model, the longest remembered beginning of the prompt decides.
- *A message that the template writes in other words* than the model did (a call of a tool that the client sent back with
  other spaces, say) keeps the generated ids, too, if it says the same: see Transcript.match_answer. The ids then stand for
  what the template wrote.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from engine.core.cache.index import KEY_BYTES
from engine.text.turns import Turn, Turns

MAX_BRANCHES = 8
# Conversations that were asked for and have not had a turn since.
MAX_RECALLED = 256
# Whether the two last of three texts say the same behind the first one: (prompt, as generated, as written) -> bool.
SameAnswer = Callable[[str, str, str], bool]
# What one anchor takes: a pair, its two numbers, and the place in the row.
ANCHOR_BYTES = 120
# What a branch and a conversation take besides their rows and texts.
BRANCH_BYTES = 128
CONVERSATION_BYTES = 512


@dataclass(frozen=True, slots=True)
class ChunkNames:
    """The keys of the first full chunks of a context, one behind the other, as this engine has made them.

    tenant, adapter: for whose requests with which adapter; see Request.
    """

    tenant: str
    keys: bytes
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Transcript:
    """One branch of a conversation up to the end of a turn: `token_ids` stand for `text`.

    anchors: (number of tokens, number of characters) of the cuts: the places before tokens that the tokenizer finds wherever
    their text stands. None lies inside an answer; its end is one. Ascending, without the beginning and the end of the text.
    fingerprint: what made the ids (Tokenizer.fingerprint). Empty = not known: only the text counts.
    answer_start: where the last answer begins, as an anchor; None = not known. It decides nothing but whether that answer is
    recognised in other words.
    names: of its first chunks, so that they need not be hashed again; None = not known. It is kept in memory only.
    """

    token_ids: array[int]
    text: str
    anchors: tuple[tuple[int, int], ...] = ()
    fingerprint: str = ""
    answer_start: tuple[int, int] | None = field(default=None, compare=False)
    names: ChunkNames | None = field(default=None, compare=False)

    @property
    def num_bytes(self) -> int:
        """The memory that it takes, about."""
        rows = sys.getsizeof(self.token_ids) + sys.getsizeof(self.text)
        num_key_bytes = 0 if self.names is None else len(self.names.keys)
        return BRANCH_BYTES + rows + ANCHOR_BYTES * len(self.anchors) + num_key_bytes

    def continues(self, old: Transcript, cut_tokens: Mapping[int, str]) -> bool:
        """Whether everything that goes on from `old` is found here, too.

        That includes the end of its answer, which is no place to go on from if a longer answer has the same beginning.
        """
        is_ended = (
            bool(old.anchors) and old.anchors[-1][0] == len(old.token_ids) - 1 and old.token_ids[-1] in cut_tokens
        )
        # By tokens only: equal ids stand for equal texts, or for an answer in the template's words.
        answer_end = old.anchors[-1][0] if is_ended else len(old.token_ids)
        ends = (*(num_tokens for num_tokens, _ in self.anchors), len(self.token_ids))
        return answer_end in ends and self.token_ids[: len(old.token_ids)] == old.token_ids

    def match_text(self, text: str, cut_texts: tuple[str, ...]) -> TranscriptMatch:
        """What is known of `text`, up to the last place that both have in front of one of `cut_texts`."""
        same = common_prefix_len(self.text, text)
        ends = (*self.anchors, (len(self.token_ids), len(self.text)))
        for index in reversed(range(bisect_right(ends, same, key=lambda end: end[1]))):
            num_tokens, num_chars = ends[index]
            if text.startswith(cut_texts, num_chars):
                return TranscriptMatch(self.token_ids[:num_tokens], num_chars, ends[:index])
        return NO_MATCH

    def match(self, text: str, cut_texts: tuple[str, ...], is_same: SameAnswer | None = None) -> TranscriptMatch:
        """What is known of `text` by its words, or by what its last answer says: see match_text and match_answer.

        is_same: None = answers are compared as texts only.
        """
        match = self.match_text(text, cut_texts)
        if is_same is None or self.answer_start is None or match.num_chars > self.answer_start[1]:
            return match
        return max(match, self.match_answer(text, is_same), key=lambda match: match.num_chars)

    def match_answer(self, text: str, is_same: SameAnswer) -> TranscriptMatch:
        """What of `text` is known up to the end of the last answer, if it begins with what that answered and says the same.

        is_same: whether two texts behind a prompt are the same message; asked at most once.
        """
        if self.answer_start is None or not self.anchors:
            return NO_MATCH
        start, (num_tokens, num_chars) = self.answer_start[1], self.anchors[-1]
        end_text = self.text[num_chars:]
        if num_tokens != len(self.token_ids) - 1 or num_chars < start:  # it did not end with a token that can be found
            return NO_MATCH
        end = text.find(end_text, start)
        prompt = self.text[:start]
        if end < 0 or not text.startswith(prompt) or not is_same(prompt, self.text[start:num_chars], text[start:end]):
            return NO_MATCH
        return TranscriptMatch(self.token_ids[:num_tokens], end, self.anchors[:-1])


@dataclass(frozen=True, slots=True)
class TranscriptMatch:
    """A beginning of a prompt that is known: its first `num_chars` characters are `token_ids`.

    anchors: the cuts before the last one.
    """

    token_ids: array[int]
    num_chars: int
    anchors: tuple[tuple[int, int], ...]


NO_MATCH = TranscriptMatch(array("I"), 0, ())


def common_prefix_len(a: str | array[int], b: str | array[int]) -> int:
    """Number of leading elements that two sequences share; bisection over slices, so memcmp does the work."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Remembered(NamedTuple):
    """A conversation as it is kept outside of memory. turns: with their keys; see Turns."""

    branches: tuple[Transcript, ...] = ()
    turns: tuple[tuple[bytes, Turn], ...] = ()


NOTHING_SAID = Remembered()


class Conversation:
    """The branches of one conversation, the latest last. One thread may record a turn while others match.

    A turn that continues a branch replaces it. A turn that departs from all of them (an edited message, a second answer
    to one question) starts a new one; of more than `MAX_BRANCHES` the oldest is forgotten.
    """

    def __init__(self, conversation_id: str, remembered: Remembered = NOTHING_SAID) -> None:
        """remembered: what it has said so far."""
        self.conversation_id = conversation_id
        self.branches = remembered.branches
        self.turns = Turns()
        for key, turn in remembered.turns:
            self.turns.add(key, turn)

    @property
    def remembered(self) -> Remembered:
        """It as it is kept outside of memory."""
        return Remembered(self.branches, self.turns.items())

    @property
    def num_tokens(self) -> int:
        """Of the latest branch."""
        return len(self.branches[-1].token_ids) if self.branches else 0

    @property
    def num_bytes(self) -> int:
        """The memory that it takes, about."""
        id_bytes = sys.getsizeof(self.conversation_id)
        branches = sum(branch.num_bytes for branch in self.branches)
        return CONVERSATION_BYTES + id_bytes + branches + self.turns.num_bytes

    def match_text(
        self, text: str, fingerprint: str, cut_texts: tuple[str, ...], is_same: SameAnswer | None = None
    ) -> TranscriptMatch:
        """The longest known beginning of `text` in ids of that fingerprint; of equal ones the latest.

        is_same: see Transcript.match_answer; None = answers are compared as texts only. See also Transcript.match_text.
        """
        branches = [branch for branch in reversed(self.branches) if fingerprint and branch.fingerprint == fingerprint]
        matches = [branch.match_text(text, cut_texts) for branch in branches]
        best = max(matches, key=lambda match: match.num_chars, default=NO_MATCH)
        for branch in branches:
            # An answer is compared as a message if the text departs from it somewhere within.
            if is_same is not None and branch.answer_start is not None and best.num_chars <= branch.answer_start[1]:
                best = max(best, branch.match_answer(text, is_same), key=lambda match: match.num_chars)
        return best

    def count_same(self, token_ids: array[int], fingerprint: str) -> tuple[int, int]:
        """(how many tokens the longest branch has that begins as these do, how many of these one has at most)."""
        branches = [branch for branch in self.branches if fingerprint and branch.fingerprint == fingerprint]
        num_same = max((common_prefix_len(branch.token_ids, token_ids) for branch in branches), default=0)
        longest = max((len(branch.token_ids) for branch in branches), default=0)
        return num_same, min(longest, len(token_ids))

    def find_chunk_keys(self, token_ids: array[int], tenant: str, chunk_size: int, adapter: str = "") -> list[bytes]:
        """The keys of the first full chunks of `token_ids`, as far as a branch with that tenant and adapter has them."""
        keys, num_same = b"", 0
        for branch in self.branches:
            if branch.names is not None and (branch.names.tenant, branch.names.adapter) == (tenant, adapter):
                same = common_prefix_len(branch.token_ids, token_ids) // chunk_size * KEY_BYTES
                same = min(same, len(branch.names.keys))
                if same > num_same:
                    keys, num_same = branch.names.keys, same
        return [keys[start : start + KEY_BYTES] for start in range(0, num_same, KEY_BYTES)]

    def record_turn(
        self, prompt: Transcript, output_token_ids: Sequence[int], output_text: str, cut_tokens: Mapping[int, str]
    ) -> Transcript:
        """Remember a turn: the prompt, then what was generated. Returns the branch that it made.

        cut_tokens: the text of each token before which text may be cut. One of these at the end of the answer is not
            part of what a client has to send again.
        """
        token_ids, text = prompt.token_ids + array("I", output_token_ids), prompt.text + output_text
        anchors = prompt.anchors
        end = cut_tokens.get(output_token_ids[-1]) if output_token_ids else None
        if end is not None and output_text.endswith(end):
            anchors = (*anchors, (len(token_ids) - 1, len(text) - len(end)))
        elif end is not None:  # it is in no text: the client could not send it again
            token_ids.pop()
        answer_start = (len(prompt.token_ids), len(prompt.text))
        branch = Transcript(token_ids, text, anchors, prompt.fingerprint, answer_start, prompt.names)
        kept = [old for old in self.branches if not branch.continues(old, cut_tokens)]
        self.branches = (*kept, branch)[-MAX_BRANCHES:]
        return branch


class ConversationTable:
    """The conversations of an engine. One thread records turns; any may ask.

    Once they take more than `max_bytes` of memory, the least recently used ones are forgotten. That costs a client that
    sends its history only the tokenising of it, and not even that if they are kept elsewhere.
    """

    def __init__(
        self,
        max_bytes: int,
        cut_tokens: Mapping[int, str],
        keep: Callable[[str, Remembered], object] = lambda *_: None,
    ) -> None:
        """cut_tokens: see Conversation.record_turn.

        keep: told each conversation as it is after a turn; what it keeps may come back by `recall`.
        """
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._keep = keep
        # Those that came back and have not had a turn since, the oldest first.
        self._recalled: dict[str, Conversation] = {}
        self._cut_tokens = cut_tokens
        self._cut_texts = tuple(cut_tokens.values())
        self._conversations: OrderedDict[str, Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._conversations)

    def latest(self, max_num: int) -> Iterator[tuple[str, Transcript]]:
        """(conversation id, its latest branch), the last used conversation first; at most so many.

        Not while a turn is being recorded.
        """
        for conversation in islice(reversed(self._conversations.values()), max_num):
            yield conversation.conversation_id, conversation.branches[-1]

    def match_text(
        self, conversation_id: str, text: str, fingerprint: str, is_same: SameAnswer | None = None
    ) -> TranscriptMatch:
        """The longest known beginning of `text` in ids of that fingerprint; of equal ones the latest.

        See Conversation.match_text.
        """
        conversation = self.find(conversation_id)
        return (
            NO_MATCH if conversation is None else conversation.match_text(text, fingerprint, self._cut_texts, is_same)
        )

    def find(self, conversation_id: str) -> Conversation | None:
        """What a conversation has said, if it is remembered; what was recalled counts for more."""
        return self._recalled.get(conversation_id) or self._conversations.get(conversation_id)

    def find_chunk_keys(
        self, conversation_id: str, token_ids: array[int], tenant: str, chunk_size: int, adapter: str = ""
    ) -> list[bytes]:
        """See Conversation.find_chunk_keys. From any thread."""
        conversation = self.find(conversation_id)
        return [] if conversation is None else conversation.find_chunk_keys(token_ids, tenant, chunk_size, adapter)

    def count_tokens(self, conversation_id: str) -> int:
        """Of its latest branch; 0 if nothing is remembered. From any thread."""
        conversation = self.find(conversation_id)
        return 0 if conversation is None else conversation.num_tokens

    def knows(self, conversation_id: str) -> bool:
        """Whether anything is remembered of it. From any thread."""
        return conversation_id in self._conversations or conversation_id in self._recalled

    def recall(self, conversation_id: str, remembered: Remembered) -> None:
        """What is known elsewhere of a conversation, more than here. From any thread."""
        self._recalled[conversation_id] = Conversation(conversation_id, remembered)
        if len(self._recalled) > MAX_RECALLED:
            self._recalled.pop(next(iter(tuple(self._recalled))), None)

    def record_turn(
        self,
        conversation_id: str,
        prompt: Transcript,
        output_token_ids: Sequence[int],
        output_text: str,
        turn: tuple[bytes, Turn] | None = None,
    ) -> Transcript:
        """See Conversation.record_turn. A turn that alone takes more than there is room for is not kept.

        turn: the same as a message, and its key; None = it is no chat.
        """
        recalled = self._recalled.pop(conversation_id, None)
        known = self._conversations.pop(conversation_id, None)
        if known is not None:
            self.num_bytes -= known.num_bytes
        conversation = recalled or known or Conversation(conversation_id)
        branch = conversation.record_turn(prompt, output_token_ids, output_text, self._cut_tokens)
        if turn is not None:
            conversation.turns.add(*turn)
        self._remember(conversation)
        return branch

    def adopt(self, conversation_id: str, remembered: Remembered) -> None:
        """Take over a conversation that another engine has led, unless more of it is remembered here.

        In the thread that records turns.
        """
        conversation = Conversation(conversation_id, remembered)
        if conversation.num_tokens <= self.count_tokens(conversation_id):
            return
        self._recalled.pop(conversation_id, None)
        known = self._conversations.pop(conversation_id, None)
        if known is not None:
            self.num_bytes -= known.num_bytes
        self._remember(conversation)

    def _remember(self, conversation: Conversation) -> None:
        """As the one that was used last, as long as there is room."""
        self.num_bytes += conversation.num_bytes
        self._conversations[conversation.conversation_id] = conversation
        while self.num_bytes > self.max_bytes:
            _, oldest = self._conversations.popitem(last=False)
            self.num_bytes -= oldest.num_bytes
        self._keep(conversation.conversation_id, conversation.remembered)
