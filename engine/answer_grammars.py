"""Compiles what answers are held to, before their requests are queued, in threads of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial

from engine.answer_grammar import answer_grammar, has_loose_tools
from engine.core.grammar import GrammarSpec
from engine.dialogue.formats import AnswerFormat
from engine.errors import InvalidParameterError
from engine.generation import Generation
from engine.grammar.interface import CompiledGrammar
from engine.grammar.store import GrammarStore
from engine.tenant import Tenant
from engine.text.tokenizer_pool import TokenizerPool

# Compiling a character of a grammar takes about as long as tokenising so many of a prompt.
CHARS_PER_GRAMMAR_CHAR = 8
# Grammars that had to be loosened: finding out again would take each turn of an agent up to some seconds.
MAX_NUM_LOOSENED = 64


class AnswerGrammars:
    """The grammars of the answers of one engine. Call it from any event loop."""

    def __init__(self, store: GrammarStore, marker_ids: Mapping[str, int], max_num_waiting: int) -> None:
        """marker_ids: see answer_grammar. max_num_waiting: how many may wait to be compiled."""
        self._store = store
        self._marker_ids = marker_ids
        # Of its own, so that no prompt waits for a grammar.
        self._pool = TokenizerPool(max_num_waiting, "grammar", "grammars wait to be compiled")
        self._loosened: OrderedDict[GrammarSpec, None] = OrderedDict()

    async def hold(
        self, generation: Generation, form: AnswerFormat | None
    ) -> tuple[GrammarSpec | None, CompiledGrammar | None]:
        """What an answer is held to, and the same compiled: the executor finds it as long as it is held. None = nothing.

        If the schema of a tool that is not strict cannot be enforced, the names of its parameters are.

        Raises InvalidParameterError, which says why a grammar cannot be used; OverloadedError if too many wait.
        form: how the answer is read; None = nothing reads it.
        """
        spec = None
        try:
            spec = answer_grammar(generation, form, self._marker_ids)
            if spec not in self._loosened:
                return spec, None if spec is None else await self._compile(spec, generation.tenant)
        except InvalidParameterError:
            if form is None or not has_loose_tools(generation):
                raise
        loose = answer_grammar(generation, form, self._marker_ids, is_loose=True)
        assert loose is not None, "what cannot be used is no grammar"
        grammar = await self._compile(loose, generation.tenant)
        if spec is not None:
            self._loosened[spec] = None
            if len(self._loosened) > MAX_NUM_LOOSENED:
                self._loosened.popitem(last=False)
        return loose, grammar

    def shutdown(self) -> None:
        """End what waits with EngineStoppedError; blocks until the work that runs is done."""
        self._pool.shutdown()

    async def _compile(self, spec: GrammarSpec, tenant: Tenant) -> CompiledGrammar:
        grammar = self._store.find(spec)
        if grammar is not None:
            return grammar
        work = partial(self._store.compile, spec)
        return await self._pool.run(work, tenant, CHARS_PER_GRAMMAR_CHAR * spec.num_chars)
