"""Text is matched against text, so that the ids of answers are found again.

Text that a client wrote is cut only where a tokenizer cuts it.
"""

import tracemalloc
from array import array
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.cache.index import full_chunk_keys, root_key
from engine.text.transcript import (
    MAX_BRANCHES,
    NO_MATCH,
    ChunkNames,
    Conversation,
    ConversationTable,
    Transcript,
    TranscriptMatch,
    common_prefix_len,
)


def ids(*token_ids: int) -> array:
    return array("I", token_ids)


# <u>hi<a> is three tokens; the special ones cut.
CUTS = {1: "<u>", 2: "<a>", 3: "<e>"}
CUT_TEXTS = tuple(CUTS.values())
PROMPT = Transcript(ids(1, 10, 2), "<u>hi<a>", ((2, 5),), "made by this")


def record(conversation: Conversation, prompt: Transcript, output_ids: list[int], text: str) -> Transcript:
    return conversation.record_turn(prompt, output_ids, text, CUTS)


def match(conversation: Conversation, text: str, fingerprint: str = "made by this") -> TranscriptMatch:
    return conversation.match_text(text, fingerprint, CUT_TEXTS)


def after_one_turn() -> Conversation:
    conversation = Conversation("c")
    record(conversation, PROMPT, [20, 21, 3], "yes sir<e>")
    return conversation


def table(max_bytes: int = 1 << 20) -> ConversationTable:
    return ConversationTable(max_bytes, CUTS)


@given(
    common=st.text("ab", max_size=40),
    left=st.text("ab", max_size=5),
    right=st.text("ab", max_size=5),
)
def test_common_prefix_is_that_of_a_plain_loop(common, left, right):
    a, b = common + left, common + right
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_prefix_len(a, b) == expected


def test_common_prefix_counts_characters_not_bytes():
    assert common_prefix_len("grüße 👩‍👩", "grüße 👩‍👧") == len("grüße 👩‍")


def test_nothing_is_known_of_an_unknown_conversation():
    assert match(Conversation("c"), "<u>hi") == NO_MATCH
    assert table().match_text("c", "<u>hi", "made by this") == NO_MATCH


def test_a_continuation_knows_the_branch_up_to_the_token_that_ended_the_answer():
    """From there on the text is the client's: what its template puts behind an answer."""
    expected = TranscriptMatch(ids(1, 10, 2, 20, 21), 15, ((2, 5),))
    assert match(after_one_turn(), "<u>hi<a>yes sir<e>\n<u>more<a>") == expected
    assert match(after_one_turn(), "<u>hi<a>yes sir<u>") == expected, "another token than the one that ended it"
    # Where the next token that cuts stands right behind it, it is known, too.
    whole = TranscriptMatch(ids(1, 10, 2, 20, 21, 3), 18, ((2, 5), (5, 15)))
    assert match(after_one_turn(), "<u>hi<a>yes sir<e><u>more<a>") == whole


def test_an_answer_that_was_cut_is_known_to_its_end():
    conversation = Conversation("c")
    record(conversation, PROMPT, [20, 21], "yes sir")
    expected = TranscriptMatch(ids(1, 10, 2, 20, 21), 15, ((2, 5),))
    assert match(conversation, "<u>hi<a>yes sir<e><u>more<a>") == expected


@pytest.mark.parametrize("answer", ["yes mum<e>", "yes<e>", "yes sir!<e>", "yes sir", "yes sir ", "", "<e>"])
def test_an_answer_that_is_not_whole_or_goes_on_is_text_like_any_other(answer):
    """The cut is before the prompt's last token that cuts, however much of the answer is the same."""
    assert match(after_one_turn(), "<u>hi<a>" + answer) == TranscriptMatch(ids(1, 10), 5, ())


def test_a_changed_message_is_cut_at_the_anchor_before_it():
    """The answer before it stays, and what was before the first cut behind it."""
    conversation = after_one_turn()
    second = Transcript(
        ids(1, 10, 2, 20, 21, 3, 1, 30, 31, 2),
        "<u>hi<a>yes sir<e><u>more<a>",
        ((2, 5), (5, 15), (6, 18)),
        "made by this",
    )
    record(conversation, second, [40], "no")
    expected = TranscriptMatch(ids(1, 10, 2, 20, 21, 3), 18, ((2, 5), (5, 15)))
    assert match(conversation, "<u>hi<a>yes sir<e><u>most<a>") == expected
    before = TranscriptMatch(ids(1, 10, 2, 20, 21), 15, ((2, 5),))
    assert match(conversation, "<u>hi<a>yes sir<e><v>") == before, "the token at the cut must be there whole"


def test_no_anchor_before_the_divergence_is_no_match():
    assert match(after_one_turn(), "<u>ho<a>") == NO_MATCH
    assert match(after_one_turn(), "") == NO_MATCH
    assert match(after_one_turn(), "<u>hi") == NO_MATCH


def test_ids_of_another_tokenizer_or_of_an_unknown_one_are_no_match():
    conversation = after_one_turn()
    assert match(conversation, "<u>hi<a>yes sir<e>", "made by that") == NO_MATCH
    record(conversation, replace(PROMPT, fingerprint=""), [20], "yes")
    assert match(conversation, "<u>hi<a>yes<e>", "") == NO_MATCH


def test_a_last_token_that_is_in_no_text_is_not_kept():
    """It ended nothing (ignore_eos), and a client that sends the answer again sends the end that its template puts there."""
    branch = record(Conversation("c"), PROMPT, [20, 3], "yes")
    assert branch == Transcript(ids(1, 10, 2, 20), "<u>hi<a>yes", ((2, 5),), "made by this")


def test_a_continuation_replaces_its_branch_and_a_departure_adds_one():
    conversation = after_one_turn()
    second = Transcript(
        ids(1, 10, 2, 20, 21, 3, 1, 30, 2), "<u>hi<a>yes sir<e><u>m<a>", ((2, 5), (5, 15), (6, 18)), "made by this"
    )
    record(conversation, second, [40], "no")
    assert [branch.text for branch in conversation.branches] == ["<u>hi<a>yes sir<e><u>m<a>no"]
    record(conversation, PROMPT, [50], "maybe")
    assert [branch.text for branch in conversation.branches] == [
        "<u>hi<a>yes sir<e><u>m<a>no",
        "<u>hi<a>maybe",
    ]
    assert match(conversation, "<u>hi<a>maybe<u>").token_ids == ids(1, 10, 2, 50)
    expected = ids(1, 10, 2, 20, 21, 3, 1, 30, 2, 40)
    assert match(conversation, "<u>hi<a>yes sir<e><u>m<a>no<u>").token_ids == expected


@pytest.mark.parametrize("end", [("yes sir", [20, 21]), ("yes sir<e>", [20, 21, 3]), ("yes sir!", [20, 21, 22])])
def test_a_longer_answer_with_the_same_beginning_does_not_replace_the_shorter_one(end):
    """As when one client asked for fewer tokens than another."""
    conversation = Conversation("c")
    record(conversation, PROMPT, [20], "yes")
    record(conversation, PROMPT, end[1], end[0])
    assert match(conversation, "<u>hi<a>yes<e>\n").token_ids == ids(1, 10, 2, 20)
    assert match(conversation, "<u>hi<a>yes sir" + "!" * ("!" in end[0]) + "<e>\n").num_chars > 14


def test_the_longest_match_of_all_branches_wins():
    conversation = Conversation("c")
    for answer in ["no", "yes sir", "yes"]:
        record(conversation, PROMPT, list(map(ord, answer)), answer)
    assert len(conversation.branches) == 3, "a shorter answer does not continue a longer one"
    for answer in ["no", "yes sir", "yes"]:
        assert match(conversation, f"<u>hi<a>{answer}<e>").token_ids == ids(1, 10, 2, *map(ord, answer))


def test_of_equal_matches_the_latest_wins():
    conversation = after_one_turn()
    record(conversation, PROMPT, [22, 23, 24], "yes sir")
    assert match(conversation, "<u>hi<a>yes sir<e>").token_ids == ids(1, 10, 2, 22, 23, 24)


def test_the_oldest_branch_is_forgotten():
    conversation = Conversation("c")
    for number in range(MAX_BRANCHES + 2):
        record(conversation, PROMPT, [100 + number], f"answer {number:02}.")
    assert [branch.token_ids[-1] for branch in conversation.branches] == list(range(102, MAX_BRANCHES + 102))


def test_the_table_forgets_the_least_recently_used_conversation():
    small = Conversation("a")
    record(small, PROMPT, [7], "ok")
    conversations = table(max_bytes=2 * small.num_bytes)
    for name in "ab":
        conversations.record_turn(name, PROMPT, [7], "ok")
    assert len(conversations) == 2
    conversations.record_turn("a", PROMPT, [8], "no")  # a second branch of a, which makes b the oldest
    assert conversations.match_text("b", PROMPT.text + "ok<e>", "made by this") == NO_MATCH
    assert conversations.match_text("a", PROMPT.text + "no<e>", "made by this").num_chars == 10
    record(small, PROMPT, [8], "no")
    assert (len(conversations), conversations.num_bytes) == (1, small.num_bytes)


def test_the_table_counts_a_replaced_branch_once():
    conversations, single = table(), table()
    conversations.record_turn("a", PROMPT, [7], "ok")
    longer = Transcript(ids(1, 10, 2, 7, 1, 9), "<u>hi<a>ok<u>!", ((2, 5), (4, 10)), "made by this")
    conversations.record_turn("a", longer, [8], "?")
    single.record_turn("a", longer, [8], "?")
    assert conversations.num_bytes == single.num_bytes


def test_a_conversation_too_large_for_the_table_is_not_kept():
    conversations = table(max_bytes=2000)
    conversations.record_turn("a", PROMPT, [7], "ok")
    conversations.record_turn("b", PROMPT, [7], "ok" * 2000)
    assert (len(conversations), conversations.num_bytes) == (0, 0)


def test_tables_do_not_mix_conversations():
    conversations = table()
    conversations.record_turn("a", PROMPT, [7], "ok")
    assert conversations.match_text("b", PROMPT.text + "ok<e>", "made by this") == NO_MATCH


@pytest.mark.parametrize(
    ("num_tokens", "num_anchors", "text", "key_chars"),
    [
        (50, 4, "short words. " * 15, 12),
        (50, 4, "short words. " * 15, 512),
        (50, 4, "short words. " * 15, 30_000),
        (2020, 1999, "<|end|>" * 2020, 12),
        (2020, 4, "plain text " * 800, 12),
        (2020, 4, "日本語" * 800, 12),
        (2020, 4, "🎉" * 800, 12),
    ],
)
def test_the_memory_of_conversations_is_bounded_in_bytes(num_tokens, num_anchors, text, key_chars):
    """What is counted is what is taken, within a third; so a table of a megabyte takes about that, whatever fills it."""

    def fill(conversations: ConversationTable, number: int) -> None:
        prompt = Transcript(
            array("I", range(1000, 1000 + num_tokens)),
            f"{number} {text}",
            tuple((1000 + index, 1000 + 7 * index) for index in range(num_anchors)),
            "made by this",
        )
        conversations.record_turn(f"{number:0{key_chars}}", prompt, [7, 3], "ok<e>")

    conversations = table(max_bytes=1 << 20)
    tracemalloc.start()
    try:
        for number in range(1200):
            fill(conversations, number)
        num_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.66 * conversations.num_bytes < num_bytes < 1.33 * conversations.num_bytes
    assert 0.5 * (1 << 20) < conversations.num_bytes <= 1 << 20


def test_keys_of_chunks_are_found_as_far_as_the_tokens_are_the_same_and_for_the_same_tenant_only():
    said = array("I", range(100, 123))  # five chunks of 4 tokens, and 3 tokens
    keys = full_chunk_keys(root_key("model", "", "anna"), said, 4)
    prompt = Transcript(said, "", names=ChunkNames("anna", b"".join(keys)))
    conversations = table()
    conversations.record_turn("c", prompt, [7, 8], "")

    def found(token_ids: array, tenant: str = "anna", conversation_id: str = "c") -> list[bytes]:
        return conversations.find_chunk_keys(conversation_id, token_ids, tenant, 4)

    longer = said + ids(7, 8, 9, 10, 11)
    assert found(longer) == keys
    assert found(said[:11]) == keys[:2]
    edited = array("I", longer)
    edited[13] = 9
    assert found(edited) == keys[:3]
    assert found(longer, tenant="ben") == found(longer, conversation_id="d") == []


def test_keys_of_chunks_count_as_memory_of_their_conversation():
    plain, named = Transcript(ids(1, 2), ""), Transcript(ids(1, 2), "", names=ChunkNames("anna", bytes(64)))
    assert named.num_bytes == plain.num_bytes + 64
