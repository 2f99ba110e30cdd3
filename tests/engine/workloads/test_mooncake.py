"""Traces with hashes of blocks: sessions are guessed, equal hashes are equal tokens, and what is written is read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import WorkloadError
from engine.workloads.mooncake import BlockNumbers, Row, read_mooncake, read_rows, write_rows
from engine.workloads.session import Session, Span, Turn
from engine.workloads.tokens import TokenContext, random_tokens


def write(path: Path, *rows: tuple[int, int, int, list[int]]) -> Path:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def test_a_request_goes_on_from_the_one_whose_last_whole_block_it_has(tmp_path: Path) -> None:
    trace = write(
        tmp_path / "trace.jsonl",
        (0, 9, 2, [5, 70, 71]),  # blocks of 4
        (1000, 9, 2, [5, 80, 81]),
        (4000, 14, 3, [5, 70, 72, 73]),  # behind the first
        (9000, 16, 1, [5, 70, 72, 74]),  # behind that one
    )
    first, second = read_mooncake(trace, block_tokens=4)
    assert (first.session_id, first.start_s) == ("session-0", 0.0)
    assert first.turns == (
        Turn((Span(0, 4), Span(1, 4), Span(2, 1)), 2),
        Turn((Span(4 + 1, 4), Span(6, 2)), 3, pause_s=4.0, keep_tokens=8),
        Turn((Span(7, 4),), 1, pause_s=5.0, keep_tokens=12),
    )
    assert first.prompt_lens == [9, 14, 16]
    assert (second.session_id, second.start_s) == ("session-1", 1.0)
    assert second.turns == (Turn((Span(0, 4), Span(3, 4), Span(4, 1)), 2),)


def test_a_block_that_another_session_brought_joins_nothing(tmp_path: Path) -> None:
    trace = write(tmp_path / "t.jsonl", (0, 9, 2, [5, 6, 70]), (1, 9, 2, [5, 6, 71]), (2, 9, 2, [5, 6, 72]))
    # The first brought the system prompt: it is guessed to go on once, and no more.
    assert [len(session.turns) for session in read_mooncake(trace, block_tokens=4)] == [3]
    trace = write(
        tmp_path / "t.jsonl",
        (0, 13, 2, [5, 6, 7, 70]),
        (1, 9, 2, [5, 6, 71]),
        (2, 9, 2, [5, 6, 72]),
        (3, 9, 2, [5, 6, 73]),
    )
    assert [len(session.turns) for session in read_mooncake(trace, block_tokens=4)] == [1, 1, 1, 1]


def test_without_a_guess_each_request_is_a_session(tmp_path: Path) -> None:
    trace = write(tmp_path / "t.jsonl", (0, 5, 2, [1, 2]), (1500, 9, 2, [1, 3, 4]))
    sessions = list(read_mooncake(trace, guess_sessions=False, block_tokens=4))
    assert [(session.start_s, session.prompt_lens) for session in sessions] == [(0.0, [5]), (1.5, [9])]


def test_rows_are_taken_in_order_of_time_from_the_first_on(tmp_path: Path) -> None:
    trace = write(tmp_path / "t.jsonl", (9000, 5, 2, [1, 2]), (7000, 5, 2, [3, 4]))
    sessions = list(read_mooncake(trace, guess_sessions=False, block_tokens=4))
    assert [(session.session_id, session.start_s) for session in sessions] == [("session-0", 0.0), ("session-1", 2.0)]


def test_named_sessions_and_delays_are_taken(tmp_path: Path) -> None:
    rows = [Row(0.0, 5, 2, (1, 2), "ada"), Row(2.0, 5, 2, (1, 3), "bob"), Row(9.0, 9, 2, (1, 4, 5), "ada", 3.0)]
    write_rows(rows, tmp_path / "t.jsonl")
    assert list(read_rows(tmp_path / "t.jsonl", 4)) == rows
    ada, bob = read_mooncake(tmp_path / "t.jsonl", block_tokens=4)
    assert ada.turns[1] == Turn((Span(3, 4), Span(4, 1)), 2, pause_s=3.0, keep_tokens=4)
    assert (bob.session_id, bob.start_s) == ("bob", 2.0)


def test_the_time_of_the_answer_is_no_pause(tmp_path: Path) -> None:
    trace = write(tmp_path / "t.jsonl", (0, 9, 20, [1, 2, 3]), (3000, 13, 2, [1, 2, 4, 5]))
    (session,) = read_mooncake(trace, block_tokens=4, s_per_token=0.1)
    assert session.turns[1].pause_s == pytest.approx(1.0)


def test_equal_hashes_are_equal_tokens(tmp_path: Path) -> None:
    trace = write(tmp_path / "t.jsonl", (0, 10, 2, [1, 2, 3]), (1, 11, 2, [1, 2, 4]), (2, 9, 2, [6, 2, 7]))
    prompts = []
    for session in read_mooncake(trace, guess_sessions=False, block_tokens=4):
        context = TokenContext(lambda span: random_tokens(span, 10**6))
        prompts.append(list(context.ask(session.turns[0])))
    assert prompts[0][:8] == prompts[1][:8]
    assert prompts[0][8:] != prompts[1][8:10]
    assert prompts[2][4:8] == prompts[0][4:8]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"timestamp": 0, "input_length": 9, "output_length": 2, "hash_ids": [1]}', "9 tokens are 3 blocks of 4"),
        (
            '{"timestamp": 0, "input_length": 0, "output_length": 2, "hash_ids": []}',
            "'input_length' must be a whole number from 1",
        ),
        (
            '{"timestamp": 0, "input_length": 4, "output_length": 2, "hash_ids": ["a"]}',
            "'hash_ids' must be whole numbers",
        ),
        ('{"timestamp": -1, "input_length": 4, "output_length": 2, "hash_ids": [1]}', "'timestamp' must be a number"),
        ('{"timestamp": 0, "input_length": 4, "output_length": 2}', "'hash_ids' must be a list, got nothing"),
    ],
)
def test_a_bad_line_is_named_with_the_remedy(tmp_path: Path, line: str, problem: str) -> None:
    good = '{"timestamp": 5, "input_length": 4, "output_length": 1, "hash_ids": [1]}'
    (tmp_path / "t.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(WorkloadError, match=f"t.jsonl, line 3: .*{problem}"):
        list(read_rows(tmp_path / "t.jsonl", 4))


def test_blocks_are_numbered_by_all_that_they_and_those_before_them_hold() -> None:
    numbers = BlockNumbers(4)
    ada = Session("ada", (Turn((Span(0, 6),), 2), Turn((Span(1, 3),), 1)))
    bob = Session("bob", (Turn((Span(0, 4), Span(0, 2, 4)), 2), Turn((Span(1, 3),), 1, keep_tokens=6)))
    assert list(numbers.of_session(ada)) == [(0, 1), (0, 2, 3)]  # 6 tokens; 6 + 2 of the answer + 3
    assert list(numbers.of_session(bob)) == [(0, 1), (0, 4, 5)]
    recorded = [
        Session(name, (Turn((Span(0, 4),), 4, answer_stream=9), Turn((Span(1, 1),), 1))) for name in ("eve", "joe")
    ]
    eve, joe = (list(numbers.of_session(session)) for session in recorded)
    assert eve == joe == [(0,), (0, 6, 7)]
