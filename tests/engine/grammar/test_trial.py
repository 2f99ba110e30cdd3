"""Grammars that would take years to compile, in a process that may be ended."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from engine.core.grammar import GrammarSpec
from engine.errors import EngineError, InvalidParameterError
from engine.grammar import trial
from engine.grammar.guidance import GuidanceCompiler
from engine.grammar.trial import TriedCompiler
from tests.engine.grammar.spelled import allowed, bytes_vocabulary

# Its 30 expressions are one automaton with 2^30 states.
YEARS = GrammarSpec.json_schema({"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(30)]})
GOOD = GrammarSpec.choice(["yes", "no"])


@pytest.fixture(scope="module")
def compiler() -> Iterator[TriedCompiler]:
    compiler = TriedCompiler(bytes_vocabulary())
    yield compiler
    compiler.close()


def test_it_compiles_and_refuses_as_the_compiler_behind_it(compiler):
    num_ids = len(bytes_vocabulary().token_bytes)
    behind = GuidanceCompiler(bytes_vocabulary())
    assert allowed(compiler.compile(GOOD).matcher(), num_ids) == allowed(behind.compile(GOOD).matcher(), num_ids)
    messages = []
    for each in (compiler, behind):
        with pytest.raises(InvalidParameterError) as caught:
            each.compile(GrammarSpec.json_schema({"not": {}}))
        messages.append(caught.value.message)
    assert messages[0] == messages[1]


def test_a_grammar_that_takes_years_is_refused_and_the_next_one_is_compiled(compiler):
    tried = compiler._process.pid
    with pytest.raises(InvalidParameterError, match="too much time or memory; simplify it") as caught:
        compiler.compile(YEARS)
    assert caught.value.param == "grammar"
    assert not os.path.exists(f"/proc/{tried}")
    assert compiler.compile(GOOD)
    assert compiler._process.pid != tried


def test_the_process_that_ended_between_two_grammars_is_replaced(compiler):
    """The system may end it for want of memory: that says nothing of the next grammar."""
    compiler.compile(GOOD)
    ended = compiler._process
    ended.kill()
    ended.wait()
    assert compiler.compile(GOOD)
    assert compiler._process is not ended
    assert ended.stdin.closed
    assert ended.stdout.closed


def test_a_process_that_does_not_start_is_reported_and_leaves_nothing_behind(monkeypatch):
    started = []
    monkeypatch.setattr(trial.sys, "executable", "/bin/true")
    popen = trial.subprocess.Popen
    monkeypatch.setattr(trial.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(EngineError, match="did not start"):
        TriedCompiler(bytes_vocabulary())
    assert started[0].returncode is not None
    assert started[0].stdout.closed


def test_the_process_answers_once_for_each_grammar(monkeypatch):
    """What it does, here, where a debugger and a coverage tool see it."""
    monkeypatch.setattr(trial, "_set_limits", lambda: None)
    messages = iter([bytes_vocabulary(), GOOD, GrammarSpec.json_schema({"not": {}}), GOOD])
    answers: list[object] = []

    def read():
        for message in messages:
            return message
        raise EOFError

    trial.serve(read, answers.append)
    assert answers == [True] * 4


def test_close_ends_the_process():
    compiler = TriedCompiler(bytes_vocabulary())
    process = compiler._process
    compiler.close()
    compiler.close()
    assert process.poll() is not None
