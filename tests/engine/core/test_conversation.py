"""Text is matched against text, so that the token ids that were computed are found again whatever a tokenizer would say."""

from array import array

from hypothesis import given
from hypothesis import strategies as st

from engine.core.conversation import (
    MAX_BRANCHES,
    NO_MATCH,
    Conversation,
    ConversationTable,
    Transcript,
    TranscriptMatch,
    common_prefix_len,
)


def ids(*token_ids: int) -> array:
    return array("I", token_ids)


# <u>hi<a> is five tokens, of which "hi" is one; the special ones are anchors.
PROMPT = Transcript(ids(1, 10, 2), "<u>hi<a>", ((2, 5),))


def after_one_turn() -> Conversation:
    conversation = Conversation("c")
    conversation.record_turn(PROMPT, [20, 21, 3], "yes sir<e>")
    return conversation


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
    assert Conversation("c").match_text("<u>hi") == NO_MATCH
    assert ConversationTable(100).match_text("c", "<u>hi") == NO_MATCH


def test_a_continuation_knows_the_whole_branch():
    match = after_one_turn().match_text("<u>hi<a>yes sir<e><u>more<a>")
    # The last token of the answer was sampled, but has never been through the model.
    assert match == TranscriptMatch(ids(1, 10, 2, 20, 21, 3), 18, ((2, 5), (3, 8)), num_computed=5)


def test_a_changed_answer_is_cut_where_the_answer_begins():
    match = after_one_turn().match_text("<u>hi<a>yes mum<e>")
    assert match == TranscriptMatch(ids(1, 10, 2), 8, ((2, 5),), num_computed=3)


def test_a_changed_message_is_cut_at_the_anchor_before_it():
    """The prompt ends inside the second message: what was before its first special token stays."""
    conversation = after_one_turn()
    second = Transcript(
        ids(1, 10, 2, 20, 21, 3, 1, 30, 31, 2), "<u>hi<a>yes sir<e><u>more<a>", ((2, 5), (3, 8), (6, 18))
    )
    conversation.record_turn(second, [40], "no")
    match = conversation.match_text("<u>hi<a>yes sir<e><u>most<a>")
    assert match == TranscriptMatch(ids(1, 10, 2, 20, 21, 3), 18, ((2, 5), (3, 8)), num_computed=6)


def test_a_cut_exactly_at_an_anchor_keeps_what_is_before():
    match = after_one_turn().match_text("<u>hi")
    assert match == TranscriptMatch(ids(1, 10), 5, (), num_computed=2)


def test_no_anchor_before_the_divergence_is_no_match():
    assert after_one_turn().match_text("<u>ho<a>") == NO_MATCH
    assert after_one_turn().match_text("") == NO_MATCH


def test_a_prompt_inside_the_branch_is_cut_at_its_last_anchor():
    assert after_one_turn().match_text("<u>hi<a>yes").num_chars == len("<u>hi<a>")


def test_a_turn_keeps_the_fingerprint_of_its_prompt():
    prompt = Transcript(PROMPT.token_ids, PROMPT.text, PROMPT.anchors, "made by this")
    assert Conversation("c").record_turn(prompt, [20], "yes").fingerprint == "made by this"


def test_a_continuation_replaces_its_branch_and_a_departure_adds_one():
    conversation = after_one_turn()
    second = Transcript(ids(1, 10, 2, 20, 21, 3, 1, 30, 2), "<u>hi<a>yes sir<e><u>m<a>", ((2, 5), (3, 8), (6, 18)))
    conversation.record_turn(second, [40], "no")
    assert [branch.text for branch in conversation.branches] == ["<u>hi<a>yes sir<e><u>m<a>no"]
    conversation.record_turn(PROMPT, [50], "maybe")
    assert [branch.text for branch in conversation.branches] == [
        "<u>hi<a>yes sir<e><u>m<a>no",
        "<u>hi<a>maybe",
    ]
    assert conversation.match_text("<u>hi<a>maybe<u>").token_ids == ids(1, 10, 2, 50)
    assert conversation.match_text("<u>hi<a>yes sir<e><u>m<a>no<u>").token_ids == ids(1, 10, 2, 20, 21, 3, 1, 30, 2, 40)


def test_the_longest_match_of_all_branches_wins():
    conversation = Conversation("c")
    for answer in ["no", "yes sir", "yes"]:
        conversation.record_turn(PROMPT, list(map(ord, answer)), answer)
    assert len(conversation.branches) == 3, "a shorter answer does not continue a longer one"
    for answer in ["no", "yes sir", "yes"]:
        assert conversation.match_text(f"<u>hi<a>{answer}<e>").token_ids == ids(1, 10, 2, *map(ord, answer))


def test_the_oldest_branch_is_forgotten():
    conversation = Conversation("c")
    for number in range(MAX_BRANCHES + 2):
        conversation.record_turn(PROMPT, [number], f"answer {number:02}.")
    assert [branch.token_ids[-1] for branch in conversation.branches] == list(range(2, MAX_BRANCHES + 2))


def test_the_table_forgets_the_least_recently_used_conversation():
    table = ConversationTable(max_tokens=10)
    for name in "ab":
        table.record_turn(name, PROMPT, [7], "ok")  # 4 tokens each
    table.record_turn("a", PROMPT, [8], "no")  # 12 tokens: a second branch of a, which makes b the oldest
    assert table.match_text("b", PROMPT.text) == NO_MATCH
    assert table.match_text("a", PROMPT.text + "no").num_chars == 10
    assert (len(table), table.num_tokens) == (1, 8)


def test_the_table_counts_a_replaced_branch_once():
    table = ConversationTable(max_tokens=100)
    table.record_turn("a", PROMPT, [7], "ok")
    table.record_turn("a", Transcript(ids(1, 10, 2, 7, 9), "<u>hi<a>ok!"), [8], "?")
    assert table.num_tokens == 6


def test_a_conversation_too_long_for_the_table_is_the_last_to_stay():
    table = ConversationTable(max_tokens=3)
    table.record_turn("a", PROMPT, [7], "ok")
    assert len(table) == 1
    table.record_turn("b", PROMPT, [7], "ok")
    assert table.match_text("a", PROMPT.text) == NO_MATCH
    assert table.match_text("b", PROMPT.text).num_chars == 8


def test_tables_do_not_mix_conversations():
    table = ConversationTable(max_tokens=100)
    table.record_turn("a", PROMPT, [7], "ok")
    assert table.match_text("b", PROMPT.text + "ok") == NO_MATCH
