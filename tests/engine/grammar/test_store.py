"""What is kept of compiled grammars, and for how long."""

from __future__ import annotations

import gc
import threading

import pytest

from engine.core.grammar import GrammarSpec
from engine.errors import InvalidParameterError
from engine.grammar import store as store_module
from engine.grammar.store import GrammarStore


class FakeMatcher:
    error = None

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def fill(self, mask) -> None: ...

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


class FakeGrammar:
    def matcher(self) -> FakeMatcher:
        return FakeMatcher()


class FakeCompiler:
    def __init__(self) -> None:
        self.compiled: list[GrammarSpec] = []
        self.is_closed = False

    def compile(self, spec: GrammarSpec) -> FakeGrammar:
        self.compiled.append(spec)
        if spec.text == "bad":
            raise InvalidParameterError("bad")
        return FakeGrammar()

    def close(self) -> None:
        self.is_closed = True


def spec(number: int, length: int = 4) -> GrammarSpec:
    return GrammarSpec("regex", f"{number:0{length}d}")


@pytest.fixture
def compiler() -> FakeCompiler:
    return FakeCompiler()


def test_nothing_is_made_before_the_first_grammar(compiler):
    made = []
    store = GrammarStore(lambda: made.append(1) or compiler)
    assert store.find(spec(1)) is None
    assert not made
    first = store.compile(spec(1))
    assert store.compile(spec(1)) is first is store.find(spec(1))
    store.compile(spec(2))
    assert made == [1]
    assert compiler.compiled == [spec(1), spec(2)]
    store.close()
    assert compiler.is_closed


def test_the_grammars_used_last_are_kept(compiler, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_NUM_KEPT", 2)
    store = GrammarStore(lambda: compiler)
    for number in (1, 2, 1, 3):
        store.compile(spec(number))
    gc.collect()
    assert [number for number in (1, 2, 3) if store.find(spec(number))] == [1, 3]
    monkeypatch.setattr(store_module, "MAX_KEPT_CHARS", 10)
    store.compile(spec(4, length=9))
    gc.collect()
    assert [number for number in (1, 2, 3) if store.find(spec(number))] == []
    assert store.find(spec(4, length=9))


def test_a_grammar_that_a_request_holds_is_found_however_many_came_since(compiler, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_NUM_KEPT", 1)
    store = GrammarStore(lambda: compiler)
    held = store.compile(spec(1))
    for number in range(2, 9):
        store.compile(spec(number))
    assert store.find(spec(1)) is held
    assert store.matcher(spec(1), (7, 8)).accepted == [7, 8]
    assert compiler.compiled.count(spec(1)) == 1


def test_what_is_refused_is_not_kept(compiler):
    store = GrammarStore(lambda: compiler)
    for _ in range(2):
        with pytest.raises(InvalidParameterError):
            store.compile(GrammarSpec("regex", "bad"))
    assert len(compiler.compiled) == 2


def test_two_threads_get_the_same_grammar(compiler):
    store = GrammarStore(lambda: compiler)
    barrier, found = threading.Barrier(4), []

    def work() -> None:
        barrier.wait()
        found.append(store.compile(spec(1)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(map(id, found))) == 1
