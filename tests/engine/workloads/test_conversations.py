"""Files of conversations with text: tiny ones, exactly; the committed ones, by their counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.dialogue.messages import Message, ToolCall
from engine.errors import WorkloadError
from engine.workloads.conversations import (
    Reading,
    read_aiperf,
    read_messages,
    read_oasst,
    read_sharegpt,
    read_tau_bench,
    write_aiperf,
    write_messages,
)
from engine.workloads.distributions import Constant
from engine.workloads.session import Session, Span, Turn

READING = Reading(count_tokens=len, think_s=Constant(7.0), tool_s=Constant(0.5))
SYSTEM, HELLO, HI = Message("system", "be"), Message("user", "hello"), Message("assistant", "hi")


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_messages_become_turns(tmp_path: Path) -> None:
    messages = [
        ("system", "be"),
        ("user", "hello"),
        ("assistant", "hi"),
        ("user", "more"),
        ("assistant", "hello"),
        ("user", "?"),
    ]
    entry = {"id": "a", "messages": [{"role": role, "content": text} for role, text in messages]}
    assert list(read_messages(write(tmp_path / "c.json", [entry]), READING)) == [
        Session(
            "a",
            (
                Turn((Span(0, 2), Span(1, 5)), 2, messages=(SYSTEM, HELLO), answer=HI, answer_stream=2),
                Turn(
                    (Span(3, 4),),
                    5,
                    pause_s=7.0,
                    messages=(Message("user", "more"),),
                    answer=Message("assistant", "hello"),
                    answer_stream=1,  # the same text is the same stream, whoever says it
                ),
            ),
        )
    ]


@pytest.mark.parametrize("form", ["calls", "text"])
def test_results_of_calls_are_turns_of_a_tool(tmp_path: Path, form: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    if form == "text":
        called = {"role": "assistant", "content": json.dumps([{"arguments": '{"a":1}', "name": "look"}])}
    messages = [
        {"role": "user", "content": "hello"},
        called,
        {"role": "tool", "content": "42", **({"tool_call_id": "c1"} if form == "calls" else {})},
        {"role": "assistant", "content": "hi"},
    ]
    value = [{"traj": messages}] if form == "calls" else [messages]
    (session,) = read_tau_bench(write(tmp_path / "t.json", value), READING)
    first, second = session.turns
    call_id = "c1" if form == "calls" else ""
    assert first.answer == Message("assistant", "", tool_calls=(ToolCall("look", '{"a":1}', call_id),))
    assert (second.kind, second.tool, second.pause_s) == ("tool", "look", 0.5)
    assert second.messages == (Message("tool", "42", tool_call_id=call_id),)


def test_parts_of_a_sharegpt_conversation_are_joined(tmp_path: Path) -> None:
    def part(name: str, *said: tuple[str, str]) -> dict[str, Any]:
        return {"id": name, "conversations": [{"from": who, "value": text} for who, text in said]}

    parts = [
        part("x_0", ("human", "hello"), ("gpt", "hi")),
        part("x_1", ("gpt", "hi"), ("human", "so"), ("chatgpt", "yes")),
        part("y_0", ("gpt", "well"), ("human", "hello"), ("gpt", "hi")),
    ]
    x, y = read_sharegpt(write(tmp_path / "s.json", parts), READING)
    assert (x.session_id, [turn.messages[0].content for turn in x.turns]) == ("x", ["hello", "so"])
    assert (y.session_id, [turn.messages[0].content for turn in y.turns]) == (
        "y",
        ["hello"],
    )  # an answer to nothing is none
    assert x.turns[0].new == y.turns[0].new


def test_paths_of_a_tree_share_their_beginning(tmp_path: Path) -> None:
    def node(role: str, text: str, *replies: dict[str, Any]) -> dict[str, Any]:
        return {"role": role, "text": text, "replies": list(replies)}

    more = node("prompter", "more", node("assistant", "a"), node("assistant", "b"))
    tree = node("prompter", "q", node("assistant", "1", more, node("prompter", "unanswered")), node("assistant", "2"))
    (tmp_path / "o.jsonl").write_text(json.dumps({"message_tree_id": "t", "prompt": tree}) + "\n")
    sessions = list(read_oasst(tmp_path / "o.jsonl", READING))
    said = [[(turn.messages[0].content, turn.answer.content) for turn in s.turns if turn.answer] for s in sessions]
    assert said == [[("q", "1"), ("more", "a")], [("q", "1"), ("more", "b")], [("q", "2")]]
    assert [session.session_id for session in sessions] == ["t.0", "t.1", "t.2"]
    assert sessions[0].turns[0] == sessions[1].turns[0]


def test_what_vllms_benchmark_reads_is_written_and_read(tmp_path: Path) -> None:
    value = [{"id": "a", "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}]
    sessions = list(read_messages(write(tmp_path / "a.json", value), READING))
    write_messages(sessions, tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == value
    with pytest.raises(WorkloadError, match="s has turns without their text"):
        write_messages([Session("s", (Turn((Span(0, 1),), 1),))], tmp_path / "b.json")


def test_what_aiperf_reads_is_written_and_read(tmp_path: Path) -> None:
    turns = (
        Turn((Span(0, 2), Span(1, 5)), 9, messages=(SYSTEM, HELLO)),
        Turn((Span(1, 5),), 4, 2.0, messages=(HELLO,)),
    )
    sessions = [Session("a", turns, start_s=1.5)]
    write_aiperf(sessions, tmp_path / "a.jsonl")
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {
        "session_id": "a",
        "turns": [
            {"role": "system", "text": "be"},
            {"text": "hello", "output_length": 9, "timestamp": 1500.0},
            {"text": "hello", "output_length": 4, "delay": 2000.0},
        ],
    }
    assert list(read_aiperf(tmp_path / "a.jsonl", READING)) == sessions


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", r"bad.json, line 1: not JSON \(.*is it another format"),
        ("[\n1,\n]", r"bad.json, line 3: not JSON"),
        ("{}", "must be one JSON list, got {}"),
        ("[3]", "entry 0: it must be an object, got 3"),
        ('[{"id": "a"}]', "entry 0: 'messages' must be a list, got nothing"),
        (
            '[{"id": "a", "messages": [{"role": "boss", "content": ""}]}]',
            r"entry 0, messages\[0\]: 'role' must be one of",
        ),
        ('[{"id": "a", "messages": [{"role": "user", "content": 3}]}]', "'content' must be a text, got 3"),
    ],
)
def test_a_bad_file_is_named_with_the_place_and_the_remedy(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(WorkloadError, match=problem):
        list(read_messages(tmp_path / "bad.json"))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(WorkloadError, match=r"nowhere\.json cannot be read: No such file or directory; check the name"):
        list(read_sharegpt(Path("nowhere.json")))


def test_the_committed_agent_sessions() -> None:
    sessions = list(read_tau_bench(Path(__file__).parents[3] / "benchmarks" / "data" / "airline_sessions.json"))
    assert (len(sessions), sum(len(session.turns) for session in sessions)) == (40, 481)
    assert len({session.turns[0].new[0] for session in sessions}) == 1  # one system prompt
    # 250 results, of which 16 end a session: nothing answers them.
    assert sum(turn.kind == "tool" for session in sessions for turn in session.turns) == 234
