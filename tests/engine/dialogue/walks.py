"""Random answers that a grammar allows, from a small vocabulary: single characters, and the markers of formats of calls.

They are special tokens in it or ordinary ones, as they are in one model or another.
"""

import json
import random
import string

import llguidance
import numpy as np

END = "<|eos|>"
NO_FORCING = '%llguidance {"no_forcing": true}\n'
# How much likelier than a character a marker or the end is: free text has to come to an end.
MARKER_WEIGHT = 30


class _Tokens:
    def __init__(self, tokens: list[bytes], special_ids: list[int], eos_id: int) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id, self.bos_token_id = tokens, special_ids, eos_id, None

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError


class Walker:
    """special_ids: the ids of the markers that are special tokens."""

    def __init__(self, markers: tuple[str, ...], *, are_special: bool) -> None:
        self.texts = [
            *string.ascii_letters[:8],
            *string.digits[:3],
            *' \n"{}[]:,<>=/\\|.-',
            *dict.fromkeys(markers),
            END,
        ]
        first = self.texts.index(markers[0]) if markers else len(self.texts) - 1
        ids = range(first, len(self.texts) - 1) if are_special else range(0)
        self.special_ids = {self.texts[index]: index for index in ids}
        tokens = [b"\xff" * (text == END or text in self.special_ids) + text.encode() for text in self.texts]
        # Grammars need more characters than walks should choose from.
        self.num_chosen = len(tokens)
        rest = sorted({bytes([byte]) for byte in range(256)} - set(tokens))
        eos = len(self.texts) - 1
        self._eos = eos
        self._weights = np.ones(len(tokens) + len(rest))
        self._weights[first : len(tokens)] = MARKER_WEIGHT
        self._weights[[self.texts.index(bracket) for bracket in "[{"]] = MARKER_WEIGHT
        self._weights[len(tokens) :] = 0.01
        self._bytes = [*(text.encode() for text in self.texts), *rest]
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens([*tokens, *rest], [*ids, eos], eos)), eos_token=[eos]
        )

    def walk(self, grammar: str, rng: random.Random, max_tokens: int = 600, form: str = "") -> str | None:
        """A complete answer; None if it came to no end. Fails if the grammar is wrong or runs into a dead end.

        form: the grammar of @form.
        """
        grammars = [{"lark_grammar": NO_FORCING + grammar}]
        if form:
            grammars.append({"name": "form", "lark_grammar": NO_FORCING + form})
        matcher = llguidance.LLMatcher(self._tokenizer, json.dumps({"grammars": grammars}), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        answer = b""
        for _ in range(max_tokens):
            mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")[: len(self._weights)])
            assert len(allowed), (grammar, answer)
            (token,) = rng.choices(allowed.tolist(), self._weights[allowed].tolist())
            if token == self._eos:
                return answer.decode(errors="replace")
            answer += self._bytes[token]
            assert matcher.consume_token(token), matcher.get_error()
        return None
