"""What was said in a conversation: its token ids and the text they stand for. A client that sends its history again sends
text; comparing text with text finds the token ids that were really computed, so that tokenising again never breaks
the match. Knows no tokenizer and no KV.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

MAX_BRANCHES = 8


@dataclass(frozen=True, slots=True)
class Transcript:
    """One branch of a conversation up to the end of a turn: `token_ids` stand for `text`.

    anchors: (number of tokens, number of characters) of the places where the text may be cut so that the tokens before
    and after it are what tokenising the two parts apart gives: before special tokens, and where an answer begins.
    Ascending, without (0, 0) and without the end.
    fingerprint: which tokenizer and chat template made the ids (Tokenizer.fingerprint). Empty = not known: only the text
    counts.
    """

    token_ids: array[int]
    text: str
    anchors: tuple[tuple[int, int], ...] = ()
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class TranscriptMatch:
    """The first `num_chars` characters of a prompt are known to be `token_ids`; `anchors` are the cuts inside.
    num_computed: how many of them have been through the model; the last token of an answer never was."""

    token_ids: array[int]
    num_chars: int
    anchors: tuple[tuple[int, int], ...]
    num_computed: int


NO_MATCH = TranscriptMatch(array("I"), 0, (), 0)


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


class Conversation:
    """The branches of one conversation, the latest last. A turn that continues a branch replaces it; a turn that
    departs from all of them (an edited message, a second answer to one question) starts a new one, and of more than
    `MAX_BRANCHES` the oldest is forgotten."""

    def __init__(self, conversation_id: str) -> None:
        self.conversation_id = conversation_id
        self.branches: list[Transcript] = []

    @classmethod
    def of(cls, branch: Transcript) -> Conversation:
        """A nameless conversation that has this branch alone."""
        conversation = cls("")
        conversation.branches.append(branch)
        return conversation

    @property
    def num_tokens(self) -> int:
        return sum(len(branch.token_ids) for branch in self.branches)

    def match_text(self, text: str) -> TranscriptMatch:
        """The longest known beginning of `text`. Where `text` departs from a branch, the match ends at the last anchor
        before that."""
        best = NO_MATCH
        for branch in reversed(self.branches):
            same = common_prefix_len(branch.text, text)
            if same == len(branch.text):
                num_computed = max(0, len(branch.token_ids) - 1)
                match = TranscriptMatch(branch.token_ids, same, branch.anchors, num_computed)
            else:
                cut = bisect_right(branch.anchors, same, key=lambda anchor: anchor[1])
                if cut == 0:
                    continue
                num_tokens, num_chars = branch.anchors[cut - 1]
                known, anchors = branch.token_ids[:num_tokens], branch.anchors[: cut - 1]
                match = TranscriptMatch(known, num_chars, anchors, num_tokens)
            if match.num_chars > best.num_chars:
                best = match
        return best

    def match_tokens(self, token_ids: array[int]) -> int:
        """How many leading tokens have been through the model in this conversation."""
        shared = (min(common_prefix_len(b.token_ids, token_ids), len(b.token_ids) - 1) for b in self.branches)
        return max(shared, default=0)

    def record_turn(self, prompt: Transcript, output_token_ids: Sequence[int], output_text: str) -> Transcript:
        """Remember a turn: the prompt with the anchors in it, then what was generated, which begins at an anchor. Returns the
        branch that it made."""
        branch = Transcript(
            prompt.token_ids + array("I", output_token_ids),
            prompt.text + output_text,
            (*prompt.anchors, (len(prompt.token_ids), len(prompt.text))),
            prompt.fingerprint,
        )
        self.branches = [old for old in self.branches if branch.token_ids[: len(old.token_ids)] != old.token_ids]
        self.branches.append(branch)
        del self.branches[:-MAX_BRANCHES]
        return branch


class ConversationTable:
    """The conversations of an engine. Once they hold more than `max_tokens` token ids, the least recently used ones are
    forgotten; that costs a client that sends its history only the tokenising of it."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._conversations: OrderedDict[str, Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._conversations)

    def match_text(self, conversation_id: str, text: str) -> TranscriptMatch:
        conversation = self._conversations.get(conversation_id)
        return NO_MATCH if conversation is None else conversation.match_text(text)

    def match_tokens(self, conversation_id: str, token_ids: array[int]) -> int:
        conversation = self._conversations.get(conversation_id)
        return 0 if conversation is None else conversation.match_tokens(token_ids)

    def record_turn(
        self, conversation_id: str, prompt: Transcript, output_token_ids: Sequence[int], output_text: str
    ) -> Transcript:
        """See Conversation.record_turn."""
        conversation = self._conversations.get(conversation_id)
        if conversation is None:
            conversation = self._conversations[conversation_id] = Conversation(conversation_id)
        self.num_tokens -= conversation.num_tokens
        branch = conversation.record_turn(prompt, output_token_ids, output_text)
        self.num_tokens += conversation.num_tokens
        self._conversations.move_to_end(conversation_id)
        while self.num_tokens > self.max_tokens and len(self._conversations) > 1:
            _, oldest = self._conversations.popitem(last=False)
            self.num_tokens -= oldest.num_tokens
        return branch
