"""What holds for a tokenizer whatever the text: read from its tokenizer.json.

Tokenises nothing itself.

- *Where texts may be cut.* A tokenizer looks for its added tokens (`<|im_end|>`) first, and handles what lies between
  them piece by piece. So tokenising the two sides of an added token apart gives the tokens of the whole, if that token is
  found wherever its text stands. `find_cut_tokens` says which ones are.
- *How few tokens a text can have.* `find_token_bound` bounds the characters that one token stands for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.text.detokenizer import BYTE_OF_CHAR

# Most characters of which Unicode's canonical composition makes one.
MAX_COMPOSED_CHARS = 4
# Pre-tokenizers after which every character is still there. Split and Punctuation: unless they remove what they find.
KEEPING_PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength")
# Normalizers after which a text is not shorter.
LENGTHENING_NORMALIZERS = ("ByteLevel", "Prepend", "Lowercase", "NFD", "NFKD")
# What a token with lstrip or rstrip takes in.
SPACES = "".join(chr(code) for code in range(0x3001) if chr(code).isspace())

Rules = Mapping[str, Any]


def find_cut_tokens(rules: Rules) -> dict[int, str]:
    """Added tokens, by id, that are found wherever their text stands, and begin exactly there.

    Not among them: tokens that take in the spaces before them (lstrip), depend on what is beside them (single_word), or are
    looked for in the normalised text only; and tokens that another one can cover or lengthen. A token that takes in the
    spaces behind it (rstrip) is one: the text may be cut before it, though not behind it.
    """
    added = rules["added_tokens"]
    texts = {token["content"] for token in added if token["content"]}
    beginnings = {text[:end] for text in texts for end in range(1, len(text) + 1)}
    uncertain = {text[:end] for text in texts for end in range(1, len(text)) if text[:end] in texts}
    uncertain_beginnings = set()
    for text in texts:
        for start in range(1, len(text)):
            rest = text[start:]  # what else may stand here, when this token began earlier?
            if rest in beginnings:
                uncertain_beginnings.add(rest)
            uncertain.update(rest[:end] for end in range(1, len(rest) + 1) if rest[:end] in texts)

    def is_certain(token: Mapping[str, Any]) -> bool:
        text = token["content"]
        return (
            bool(text)
            and not text[0].isspace()  # or the token before it may take it in
            and not token["lstrip"]
            and not token["single_word"]
            and not (token["normalized"] and rules["normalizer"] is not None)
            and text not in uncertain
            and not any(text[:end] in uncertain_beginnings for end in range(1, len(text) + 1))
        )

    return {token["id"]: token["content"] for token in added if is_certain(token)}


@dataclass(frozen=True, slots=True)
class TokenBound:
    """How few tokens a text can have: one for each `chars_per_token` of its counted characters."""

    chars_per_token: int
    uncounted: str

    def min_tokens(self, text: str) -> int:
        """Linear in the text, and fast: a count of single characters."""
        num_chars = len(text) - sum(map(text.count, self.uncounted))
        return -(-num_chars // self.chars_per_token)


def find_token_bound(rules: Rules) -> TokenBound | None:
    """How few tokens a text can have, by the tokenizer's rules; None if there is no bound.

    There is none if the tokenizer may leave out any characters, or make one token of any number of them.
    """
    normalizers = _steps(rules["normalizer"], "normalizers")
    pre_tokenizers = _steps(rules["pre_tokenizer"], "pretokenizers")
    shortening = 1.0
    for normalizer in normalizers:
        factor = _shortening(normalizer)
        if factor is None:
            return None
        shortening *= factor
    is_byte_level = any(step["type"] == "ByteLevel" for step in [*normalizers, *pre_tokenizers])
    names = _names(rules["model"])
    lost = _lost_characters(rules["model"], names, is_byte_level=is_byte_level)
    if lost is None or not all(map(_keeps_characters, pre_tokenizers)):
        return None
    takes_in_spaces = any(token["lstrip"] or token["rstrip"] for token in rules["added_tokens"])
    longest = max(map(len, names | {token["content"] for token in rules["added_tokens"]}))
    uncounted = {*lost, *(SPACES if takes_in_spaces else "")}
    return TokenBound(math.ceil(longest * shortening), "".join(sorted(uncounted)))


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A part of a tokenizer as the list of what it does, one after the other."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[key] for step in _steps(inner, key)]
    return [part]


def _shortening(normalizer: Mapping[str, Any]) -> float | None:
    """By how much it may shorten a text, as a factor of at least 1; None = by any."""
    kind = normalizer["type"]
    if kind in LENGTHENING_NORMALIZERS:
        return 1.0
    if kind in ("NFC", "NFKC"):
        return float(MAX_COMPOSED_CHARS)
    if kind == "Replace" and "String" in normalizer["pattern"] and normalizer["content"]:
        return max(1.0, len(normalizer["pattern"]["String"]) / len(normalizer["content"]))
    return None


def _keeps_characters(pre_tokenizer: Mapping[str, Any]) -> bool:
    kind = pre_tokenizer["type"]
    return kind in KEEPING_PRE_TOKENIZERS or (
        kind in ("Split", "Punctuation") and pre_tokenizer["behavior"].lower() != "removed"
    )


def _names(model: Mapping[str, Any]) -> set[str]:
    vocab = model["vocab"]
    return set(vocab) if isinstance(vocab, Mapping) else {name for name, _ in vocab}


def _lost_characters(model: Mapping[str, Any], names: set[str], *, is_byte_level: bool) -> str | None:
    """Characters without a token of any kind. None = not known, or a run of unknown ones is one token."""
    if model.get("type") not in ("BPE", "Unigram"):
        return None
    if model.get("byte_fallback"):
        return "" if all(f"<0x{byte:02X}>" in names for byte in range(256)) else None
    if is_byte_level and model["type"] == "BPE":
        letters = {byte: char for char, byte in BYTE_OF_CHAR.items()}
        lost = "".join(chr(byte) for byte in range(0x80) if letters[byte] not in names)
        # A character of several bytes has at least the tokens of its last ones.
        if all(letters[byte] in names for byte in range(0x80, 0xC0)) and not (lost and model["unk_token"]):
            return lost
    return "" if model["type"] == "BPE" and model["unk_token"] is not None and not model["fuse_unk"] else None
