"""Workloads by name: limits, formats in and out, options, and the modules that they do not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import WorkloadError
from engine.workloads.distributions import Constant
from engine.workloads.mooncake import read_mooncake
from engine.workloads.session import Session, Span, Turn
from engine.workloads.sources import WorkloadOptions, load_workload, parse_options, rows_of, write_workload
from engine.workloads.synthetic import ToolUse


def test_synthetic_sessions_are_cut_to_the_limits() -> None:
    options = WorkloadOptions(num_sessions=3, max_turns=2, max_output_tokens=10, max_context_len=1000)
    sessions = load_workload("synthetic", options)
    assert [[(turn.new_tokens, turn.output_tokens) for turn in session.turns] for session in sessions] == [
        [(64, 10), (64, 10)]
    ] * 3


def test_a_window_ends_sessions_and_leaves_out_those_that_never_fit(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text(
        '{"session_id": "a", "turns": [{"new_tokens": 6, "output_tokens": 2}, {"new_tokens": 6, "output_tokens": 2}]}\n'
        '{"session_id": "b", "turns": [{"new_tokens": 20, "output_tokens": 2}]}\n'
    )
    (session,) = load_workload(f"jsonl:{tmp_path}/s.jsonl", WorkloadOptions(max_context_len=15))
    assert (session.session_id, len(session.turns)) == ("a", 1)
    with pytest.raises(WorkloadError, match="has no session with a turn and an answer that fits"):
        load_workload(f"jsonl:{tmp_path}/s.jsonl", WorkloadOptions(max_context_len=4))


@pytest.mark.parametrize("source", ["chat", "mooncake", "sharegpt-like:file", "csv:file"])
def test_unknown_sources_are_refused_with_those_that_there_are(source: str) -> None:
    with pytest.raises(WorkloadError, match="give sharegpt-like, ultrachat-like, synthetic, or FORMAT:FILE"):
        load_workload(source)


def test_options_of_a_mapping() -> None:
    tool = {"name": "look", "share": 0.5, "pause_s": "1", "result_tokens": {"distribution": "constant", "value": 9}}
    assert parse_options({"num_sessions": 5, "turns": "3", "seed": None, "tools": [tool]}) == WorkloadOptions(
        num_sessions=5, turns=Constant(3.0), tools=(ToolUse("look", 0.5, Constant(1.0), Constant(9.0)),)
    )


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"session": 3}, "unknown option of a workload: session; there are: block_tokens, "),
        ({"num_sessions": 0}, "num_sessions must be a whole number above 0"),
        ({"turns": "many"}, "unknown distribution 'many'"),
        ({"tools": [{"name": "look"}]}, "a tool must have name, pause_s, result_tokens, share"),
        ({"tools": [{"name": "a", "share": 0.7, "pause_s": 1, "result_tokens": 1}] * 2}, "more than 1 together"),
    ],
)
def test_wrong_options_are_refused(values: dict[str, object], problem: str) -> None:
    with pytest.raises(WorkloadError, match=problem):
        parse_options(values)


def test_a_trace_of_sessions_has_their_lengths_pauses_and_prefixes(tmp_path: Path) -> None:
    turns = (Turn((Span(0, 512), Span(1, 100)), 412), Turn((Span(1, 76, 100),), 4, pause_s=3.0))
    sessions = [Session("a", turns, start_s=1.0), Session("b", (Turn((Span(0, 512), Span(2, 9)), 5),), start_s=2.0)]
    write_workload(sessions, "mooncake", tmp_path / "t.jsonl")
    assert [(row.time_s, row.input_len, row.hash_ids) for row in rows_of(sessions)] == [
        (1.0, 612, (0, 1)),
        (2.0, 521, (0, 4)),
        (4.0, 1100, (0, 2, 3)),
    ]
    a, b = read_mooncake(tmp_path / "t.jsonl")
    assert (a.prompt_lens, a.turns[1].pause_s, b.prompt_lens) == ([612, 1100], 3.0, [521])
    assert a.turns[0].new[0] == b.turns[0].new[0]
    with pytest.raises(WorkloadError, match="written as 'csv'; choose one of jsonl, vllm"):
        write_workload(sessions, "csv", tmp_path / "t.csv")


def test_workloads_need_numpy_and_the_standard_library_alone() -> None:
    program = (
        "import sys, engine.workloads.sources, engine.workloads.tokens\n"
        "print({name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers', 'ray', 'pydantic', 'httpx'})"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "set()\n"
    )
