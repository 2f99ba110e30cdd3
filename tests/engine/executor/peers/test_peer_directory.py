"""Directories of conversations: a peer that asks for changes knows what one that asks for everything knows."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.executor.peers.directory import Directory, hash_conversation
from engine.executor.peers.messages import DirectoryRow

HASHES = [hash_conversation(f"chat {number}", b"secret") for number in range(6)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)) | st.just("ask")), st.integers(1, 8))
def test_changes_tell_everything(steps, max_rows):
    ours, theirs, now = Directory(max_rows), Directory(max_rows), 0.0

    def ask() -> None:
        theirs.take(*ours.changes_since(theirs.version, now), now)

    expected: dict[bytes, tuple[int, float]] = {}
    for step in steps:
        now += 1.0
        if step == "ask":
            ask()
            continue
        number, num_tokens = step
        ours.note(HASHES[number], num_tokens, now)
        expected.pop(HASHES[number], None)
        expected[HASHES[number]] = (num_tokens, now)
        if len(expected) > max_rows:
            del expected[next(iter(expected))]
    ask()
    now += 1.0
    for hashed in HASHES:
        num_tokens, since = expected.get(hashed, (0, 0.0))
        row = theirs.find(hashed, now)
        if num_tokens:
            assert row == DirectoryRow(hashed, num_tokens, now - since)
        else:
            assert row is None or hashed not in expected  # a row that was forgotten may be out of date, but not wrong
    assert ours.changes_since(theirs.version, now) == (theirs.version, [])
    assert len(ours) <= max_rows
    assert len(theirs) <= max_rows


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.booleans()) | st.sampled_from(["ask", "answer", "tell"])
    )
)
@example([(0, 3, True), (0, 0, False), "ask", "answer", "tell"])
def test_what_is_told_and_what_is_asked_for_may_come_in_any_order(steps):
    """Each of the two ways keeps its own order; an answer may have been made before what comes first."""
    ours, theirs, now = Directory(), Directory(), 0.0
    answers, told = [], []
    latest: dict[bytes, int] = {}
    told_last: dict[bytes, bool] = {}
    for step in [*steps, *["tell"] * len(steps), *["answer"] * len(steps)]:
        now += 1.0
        if step == "ask":
            answers.append(ours.changes_since(theirs.version, now))
        elif step == "answer":
            if answers:
                theirs.take(*answers.pop(0), now)
        elif step == "tell":
            if told:
                theirs.take_told(*told.pop(0), now)
        else:
            number, num_tokens, is_told = step
            hashed = HASHES[number]
            version = ours.note(hashed, num_tokens, now)
            latest[hashed], told_last[hashed] = num_tokens, is_told
            if is_told:
                told.append((version, DirectoryRow(hashed, num_tokens, 0.0)))
    for hashed, is_told in told_last.items():
        row = theirs.find(hashed, now)
        if is_told and latest[hashed]:
            assert row is not None
            assert row.num_tokens == latest[hashed]
    theirs.take(*ours.changes_since(theirs.version, now), now)
    for hashed, num_tokens in latest.items():
        row = theirs.find(hashed, now)
        assert (0 if row is None else row.num_tokens) == num_tokens


def test_changes_are_told_in_order():
    directory = Directory(2)
    for number, hashed in enumerate(HASHES[:3]):
        directory.note(hashed, number + 1, float(number))
    directory.note(HASHES[1], 7, 3.0)
    assert directory.changes_since(0, 4.0) == (4, [DirectoryRow(HASHES[2], 3, 2.0), DirectoryRow(HASHES[1], 7, 1.0)])
    assert directory.changes_since(3, 4.0) == (4, [DirectoryRow(HASHES[1], 7, 1.0)])


@pytest.mark.parametrize("name", ["", "tenant\nsession", "Zoë \ud800"])
def test_only_holders_of_the_secret_know_a_hash(name):
    assert hash_conversation(name, b"secret") == hash_conversation(name, b"secret")
    assert hash_conversation(name, b"secret") != hash_conversation(name, b"another")
    assert hash_conversation(name, b"secret") != hash_conversation(name + "x", b"secret")
