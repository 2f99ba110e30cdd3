"""Our own JSONL: what is written is read, short forms are filled in, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.dialogue.messages import Message, ToolCall
from engine.errors import WorkloadError
from engine.workloads.session import Session, Span, Turn
from engine.workloads.session_file import read_sessions, write_sessions


def test_what_is_written_is_read(tmp_path: Path) -> None:
    call = Message("assistant", "", tool_calls=(ToolCall("look", "{}", "c1"),))
    result = Message("tool", "é", tool_call_id="c1", name="look")
    sessions = [
        Session("a", (Turn((Span(0, 4), Span(1, 2, 3)), 5),), start_s=1.5, tenant="t"),
        Session(
            "b",
            (
                Turn((Span(2, 4),), 5, messages=(Message("user", "hello"),), answer=call, answer_stream=8),
                Turn((Span(3, 1),), 6, 2.5, "tool", "look", keep_tokens=4, messages=(result,)),
            ),
        ),
    ]
    write_sessions(sessions, tmp_path / "s.jsonl")
    assert list(read_sessions(tmp_path / "s.jsonl")) == sessions


def test_short_forms(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text(
        '{"turns": [{"new_tokens": 3, "output_tokens": 1}, {"new_tokens": 2, "output_tokens": 1, "pause_s": 4}]}\n'
        '{"turns": [{"text": "hello", "answer": {"role": "assistant", "content": "hi"}}]}\n'
        '{"turns": [{"text": "hello", "output_tokens": 8}]}\n'
    )
    counted, first, second = read_sessions(tmp_path / "s.jsonl", count_tokens=len)
    (a,), (b,) = counted.turns[0].new, counted.turns[1].new
    assert (a.stream, a.num_tokens, a.start) == (b.stream, 3, 0)
    assert (b.num_tokens, b.start, counted.turns[1].pause_s) == (2, 3, 4.0)
    assert first.turns[0].new == second.turns[0].new
    assert first.turns[0].new[0].num_tokens == 5
    assert (first.turns[0].output_tokens, second.turns[0].output_tokens) == (2, 8)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[]", "line 1: it must be an object, got"),
        ("{", "line 1: not JSON"),
        ('{"turns": []}', "'turns' must hold 1 to"),
        ('{"turns": [{"output_tokens": 1}]}', r"turns\[0\]: a turn needs 'text', 'messages', 'new_tokens' or 'new'"),
        ('{"turns": [{"new_tokens": 1}]}', "'output_tokens' must be a whole number from 1"),
        ('{"turns": [{"new_tokens": 1, "output_tokens": 1, "kind": "robot"}]}', "'kind' must be"),
        ('{"turns": [{"new": [[1, -2]], "output_tokens": 1}]}', "'new' must be a list of"),
        ('{"turns": [{"new_tokens": 1, "output_tokens": 1, "pause_s": "long"}]}', "'pause_s' must be a number"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "s.jsonl").write_text(line + "\n")
    with pytest.raises(WorkloadError, match=problem):
        list(read_sessions(tmp_path / "s.jsonl"))
