"""Answers put together token by token, of a vocabulary that can spell anything, or of a trained tokenizer's."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np

from engine.core.grammar import GrammarSpec
from engine.grammar.guidance import GuidanceCompiler, GuidanceMatcher
from engine.grammar.interface import Matcher, Vocabulary
from engine.text.detokenizer import TokenBytes
from tests.engine.text.trained_tokenizers import KINDS

PADDING = 45  # logits beyond the tokenizer's ids, as of models whose vocabulary is padded


@cache
def vocabulary(kind: str) -> Vocabulary:
    backend, _, eos = KINDS[kind]()
    token_bytes = TokenBytes(backend)
    specials = {token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special}
    num_ids = backend.get_vocab_size() + PADDING
    return Vocabulary(tuple(token_bytes[i] for i in range(num_ids)), frozenset(specials), (backend.token_to_id(eos),))


@cache
def bytes_vocabulary() -> Vocabulary:
    """All bytes; two end tokens, a marker, words that say the same as others, and one that says nothing."""
    words = [bytes([byte]) for byte in range(256)]
    words += [b"<eos>", b"<end>", b"<think>", b"</think>", b'{"', b'{"name', b"\n\n", b" ", b"yes", b"no", b"", b'":']
    return Vocabulary(tuple(words), frozenset({256, 257, 258, 259}), (256, 257))


@cache
def compiler(kind: str | None = None) -> GuidanceCompiler:
    return GuidanceCompiler(bytes_vocabulary() if kind is None else vocabulary(kind))


def matcher(spec: GrammarSpec, kind: str | None = None) -> GuidanceMatcher:
    return compiler(kind).compile(spec).matcher()


def allowed(matcher: Matcher, num_ids: int) -> list[int]:
    mask = np.full(4 * -(-num_ids // 32), 0xAA, np.uint8)
    matcher.fill(mask)
    return np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()


def allowed_bytes(spec: GrammarSpec, text: str = "") -> set[bytes]:
    words = bytes_vocabulary()
    state = after(matcher(spec), text.encode())
    return {words.token_bytes[i] for i in allowed(state, len(words.token_bytes))}


def after(state: GuidanceMatcher, tokens: Iterable[int]) -> GuidanceMatcher:
    for token_id in tokens:
        state.accept(token_id)
    return state


def matches(spec: GrammarSpec, text: str) -> bool:
    """Whether `text` is a complete answer."""
    words = bytes_vocabulary()
    state = matcher(spec)
    for token_id in (*text.encode(), words.eos_ids[0]):
        if token_id not in allowed(state, len(words.token_bytes)):
            return False
        state.accept(token_id)
    return True
