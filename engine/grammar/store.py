"""Keeps compiled grammars. Knows no library of grammars; that is made when the first one is asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from weakref import WeakValueDictionary

from engine.core.grammar import GrammarSpec
from engine.core.thinking import ThinkingLimit
from engine.grammar.interface import CompiledGrammar, GrammarCompiler, Matcher
from engine.grammar.thinking import LimitedThinking

# Of the grammars that no request uses at the moment.
MAX_NUM_KEPT = 128
MAX_KEPT_CHARS = 1 << 21


class GrammarStore:
    """Keeps compiled grammars while a request holds them, and those used last; thread-safe."""

    def __init__(
        self, make_compiler: Callable[[], GrammarCompiler], token_bytes: Mapping[int, bytes] | None = None
    ) -> None:
        """make_compiler: called once, by the first call of `compile`; it may take a second.

        token_bytes: what each token adds to a text; needed for limits of thinking only.
        """
        self._token_bytes = token_bytes or {}
        self._make_compiler = make_compiler
        self._compiler: GrammarCompiler | None = None
        self._making = threading.Lock()
        self._lock = threading.Lock()
        self._alive: WeakValueDictionary[GrammarSpec, CompiledGrammar] = WeakValueDictionary()
        self._kept: OrderedDict[GrammarSpec, CompiledGrammar] = OrderedDict()
        self._num_kept_chars = 0

    def find(self, spec: GrammarSpec) -> CompiledGrammar | None:
        """Returns at once; None = it has to be compiled."""
        with self._lock:
            grammar = self._alive.get(spec)
            if grammar is not None:
                self._keep(spec, grammar)
            return grammar

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Takes milliseconds. Raises InvalidParameterError, as GrammarCompiler.compile."""
        grammar = self.find(spec)
        if grammar is not None:
            return grammar
        with self._making:
            compiler = self._compiler = self._compiler or self._make_compiler()
        grammar = compiler.compile(spec)
        with self._lock:
            grammar = self._alive.setdefault(spec, grammar)
            self._keep(spec, grammar)
        return grammar

    def matcher(
        self, spec: GrammarSpec | None, token_ids: Iterable[int], thinking: ThinkingLimit | None = None
    ) -> Matcher:
        """One behind `token_ids`, the beginning of an answer; of the two at least one is there.

        Raises InvalidParameterError.
        """
        matcher = None if spec is None else self.compile(spec).matcher()
        if thinking is not None:
            matcher = LimitedThinking(thinking, self._token_bytes, matcher)
        assert matcher is not None, "neither a grammar nor a limit"
        for token_id in token_ids:
            matcher.accept(token_id)
        return matcher

    def close(self) -> None:
        """No call follows. Grammars that are held stay."""
        with self._making:
            if self._compiler is not None:
                self._compiler.close()

    def _keep(self, spec: GrammarSpec, grammar: CompiledGrammar) -> None:
        if spec not in self._kept:
            self._num_kept_chars += spec.num_chars
        self._kept[spec] = grammar
        self._kept.move_to_end(spec)
        while len(self._kept) > MAX_NUM_KEPT or self._num_kept_chars > MAX_KEPT_CHARS:
            oldest, _ = self._kept.popitem(last=False)
            self._num_kept_chars -= oldest.num_chars
