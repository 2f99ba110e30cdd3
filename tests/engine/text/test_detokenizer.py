"""The text of an answer as its tokens come, and its end at a stop string."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.core.request import MAX_STOP_CHARS, MAX_STOP_STRINGS
from engine.embedded_model import embedded_model_path
from engine.text.detokenizer import Detokenizer, StopStrings, TokenBytes
from engine.text.tokenizer import Tokenizer
from engine.text.transcript import NO_MATCH

CHAT = [("user", "My cat is called Mia."), ("assistant", "ok."), ("user", "what is my cat called?")]
CORPUS = ["my cat is called Mia", "grüße aus Zürich und €5", "日本語 🎉 👩‍👩‍👧‍👦", "def fib(n):\n    return n"] * 3
EMBEDDED, BYTE_LEVEL, BYTE_FALLBACK, METASPACE = "embedded", "byte level", "byte fallback", "metaspace"


def byte_level() -> Backend:
    """As GPT-2's, Llama 3's, Qwen's."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["</s>", "<end▁of▁text>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<think>", "<é>", "  "])
    return backend


def byte_fallback() -> Backend:
    """As Llama 2's and Gemma's: one token for each byte that is in no other token."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, limit_alphabet=24, initial_alphabet=["▁", "\ufffd"], show_progress=False
    )
    backend.train_from_iterator([text.replace(" ", "▁") for text in CORPUS], trainer)
    # The trainer makes special tokens of the bytes; SentencePiece doesn't.
    data = json.loads(backend.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in ("<unk>", "</s>")]
    return Backend.from_str(json.dumps(data))


def metaspace() -> Backend:
    """As T5's: no tokens for bytes; a space before each word is part of its token."""
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", "▁", "a", "b", "▁a", "▁b", "ab", "é", "日"])}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    def saved(backend: Backend) -> Tokenizer:
        folder: Path = tmp_path_factory.mktemp("tokenizer")
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
        return Tokenizer(str(folder))

    return {
        EMBEDDED: Tokenizer(str(embedded_model_path())),
        BYTE_LEVEL: saved(byte_level()),
        BYTE_FALLBACK: saved(byte_fallback()),
        METASPACE: saved(metaspace()),
    }


@pytest.fixture(scope="module")
def tokenizer(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers[EMBEDDED]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_prompt(text, NO_MATCH, is_chat=True, max_tokens=10_000).token_ids.tolist()


def stream(
    tokenizer: Tokenizer, token_ids: Sequence[int], *stop: str, may_stop_from: int = 0
) -> tuple[Detokenizer, list[str]]:
    """The detokenizer, and the text taken after each token until it stops or the tokens end."""
    detokenizer = tokenizer.detokenizer(stop)
    taken = []
    for index, token_id in enumerate(token_ids):
        detokenizer.append(token_id, may_stop=index >= may_stop_from)
        taken.append(detokenizer.take_text(final=detokenizer.is_stopped or index == len(token_ids) - 1))
        if detokenizer.is_stopped:
            break
    return detokenizer, taken


def any_ids(tokenizer: Tokenizer, data: st.DataObject) -> list[int]:
    """Also parts of characters, special tokens, and ids beyond the vocabulary (models pad theirs)."""
    num_ids = len(tokenizer._tokenizer)
    byte_ids = [i for i in range(num_ids) if len(tokenizer.token_bytes[i]) == 1 and tokenizer.token_bytes[i] > b"\x7f"]
    one = st.integers(0, num_ids + 2)
    whole = st.text(max_size=4).map(lambda text: encode(tokenizer, text))
    mixed = st.lists(st.one_of(one.map(lambda i: [i]), whole), max_size=8)
    if byte_ids:
        mixed = st.one_of(mixed, st.lists(st.one_of(st.sampled_from(byte_ids), one).map(lambda i: [i]), max_size=16))
    return [token_id for ids in data.draw(mixed) for token_id in ids]


def without_begun_char(data: bytes) -> str:
    """Bytes as text; if they end inside a character, without that."""
    for length in range(1, 4):
        if len(data) >= length and data[-length] >= 0xC0:
            try:
                data[-length:].decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data" and error.start == 0:
                    data = data[:-length]
            break
    return data.decode(errors="replace")


EACH_KIND = pytest.mark.parametrize("kind", [EMBEDDED, BYTE_LEVEL, BYTE_FALLBACK, METASPACE])


# -- the bytes of tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EMBEDDED, BYTE_LEVEL, BYTE_FALLBACK])
@settings(deadline=None)
@given(text=st.text(max_size=30))
def test_the_joined_bytes_of_a_text_are_that_text(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    joined = b"".join(tokenizer.token_bytes[i] for i in encode(tokenizer, text))
    prefix = " " if kind == BYTE_FALLBACK and text else ""  # which that kind puts before a text
    assert joined == (prefix + text).encode()


@EACH_KIND
@settings(deadline=None)
@given(data=st.data())
def test_the_joined_bytes_of_any_tokens_are_what_the_tokenizer_decodes_them_to(tokenizers, kind, data):
    """But a run of bytes that is no UTF-8 as a whole: ByteFallback throws away the characters in it, too."""
    tokenizer = tokenizers[kind]
    token_ids = any_ids(tokenizer, data)
    first = encode(tokenizer, "a")[-1:]  # some decoders leave out the space that a text begins with
    decoded = tokenizer.decode([*first, *token_ids]).removeprefix(tokenizer.decode(first))
    joined = tokenizer.token_bytes.text(token_ids)
    if kind == BYTE_FALLBACK and "\ufffd" in decoded:
        assert len(joined) <= len(decoded)
        assert joined.replace("\ufffd", "") != "" or not decoded.replace("\ufffd", "")
    elif kind == BYTE_LEVEL and "<é>" in joined:
        pass  # ByteLevel takes é in an added token for the byte E9; its text is what it says
    else:
        assert joined == decoded


def test_each_byte_has_a_token_where_the_alphabet_is_one_of_bytes(tokenizers):
    for kind in (BYTE_LEVEL, BYTE_FALLBACK):
        tokenizer = tokenizers[kind]
        singles = {tokenizer.token_bytes[i] for i in range(len(tokenizer._tokenizer))}
        assert {bytes([byte]) for byte in range(256)} <= singles
    fallback = tokenizers[BYTE_FALLBACK]
    by_name = fallback._tokenizer.convert_tokens_to_ids
    assert fallback.token_bytes[by_name("<0xF0>")] == b"\xf0"
    assert fallback.token_bytes[by_name("<0x41>")] == b"A"
    assert fallback.token_bytes[by_name("\ufffd")] == "\ufffd".encode(), "a character like any other"


def test_a_special_or_added_token_is_its_own_text(tokenizers):
    tokenizer = tokenizers[BYTE_LEVEL]
    for content in ("</s>", "<end▁of▁text>", "<think>", "<é>", "  "):
        (token_id,) = encode(tokenizer, content)
        assert tokenizer.token_bytes[token_id] == content.encode()
    assert tokenizer.token_bytes[10**6] == b"", "models pad their vocabularies"


def test_a_token_of_a_plain_vocabulary_may_look_like_a_byte():
    """`<0x41>` is six characters of program text to a byte-level tokenizer."""
    backend = byte_level()
    backend.add_tokens(["<0xE9>"])
    assert TokenBytes(backend)[backend.token_to_id("<0xE9>")] == b"<0xE9>"


@pytest.mark.parametrize(
    ("decoder", "tokens", "text"),
    [
        (decoders.WordPiece(), ["cat", "##s", "sit"], " cats sit"),
        (decoders.BPEDecoder("</w>"), ["ca", "t</w>", "sits</w>"], "cat sits "),
        (None, ["cat", "sits"], " cat sits"),
    ],
)
def test_decoders_that_look_at_the_neighbours_are_given_some(decoder, tokens, text):
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.WordLevel(vocab=vocab, unk_token=tokens[0]))
    if decoder is not None:
        backend.decoder = decoder
    assert TokenBytes(backend).text(range(len(tokens))) == text


# -- text as it comes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["my cat is called Mia.", "Grüße aus Zürich", "日本語 한국어", "👩‍👩‍👧‍👦 🎉", "  a \n b", "\ufffd", "a\ufffd"],
)
def test_pieces_concatenate_to_the_text_and_no_piece_holds_half_a_character(tokenizer, text):
    _, taken = stream(tokenizer, encode(tokenizer, text))
    assert "".join(taken) == text
    assert "".join(taken).count("\ufffd") == text.count("\ufffd")


@EACH_KIND
@settings(deadline=None)
@given(data=st.data())
def test_any_tokens_can_be_streamed(tokenizers, kind, data):
    """The pieces are the text of all tokens but special ones; only a character that the end cuts off is missing."""
    tokenizer = tokenizers[kind]
    token_ids = any_ids(tokenizer, data)
    detokenizer, taken = stream(tokenizer, token_ids)
    joined = b"".join(tokenizer.token_bytes[i] for i in token_ids if not tokenizer.is_special(i))
    assert "".join(taken) == detokenizer.text == without_begun_char(joined)
    assert detokenizer.num_chars == len(detokenizer.text)


@EACH_KIND
@settings(deadline=None)
@given(data=st.data())
def test_the_whole_tokens_are_those_of_the_text(tokenizers, kind, data):
    """What is remembered of an answer that is cut anywhere: as many tokens as possible, whose text is in the answer."""
    tokenizer = tokenizers[kind]
    token_ids = [i for i in any_ids(tokenizer, data) if not tokenizer.is_special(i)]
    stop = data.draw(st.lists(st.text(alphabet="ab 日é\ufffd", min_size=1, max_size=3), max_size=2))
    detokenizer, taken = stream(tokenizer, token_ids, *stop)
    num_whole = detokenizer.num_whole_tokens()
    text = "".join(taken)
    assert text.startswith(tokenizer.token_bytes.text(token_ids[:num_whole]))
    for num_tokens in range(num_whole + 1, detokenizer.num_tokens + 1):
        joined = b"".join(tokenizer.token_bytes[i] for i in token_ids[:num_tokens])
        longer = joined.decode(errors="replace")
        assert not text.startswith(longer) or longer != without_begun_char(joined)
    if not detokenizer.is_stopped and joined_is_whole(tokenizer, token_ids):
        assert num_whole == len(token_ids)


def joined_is_whole(tokenizer: Tokenizer, token_ids: Sequence[int]) -> bool:
    joined = b"".join(tokenizer.token_bytes[i] for i in token_ids)
    return joined.decode(errors="replace") == without_begun_char(joined)


def test_an_answer_cut_inside_a_character_keeps_what_is_before_it(tokenizers):
    """Also if that is in the same token."""
    tokenizer = tokenizers[BYTE_LEVEL]
    tokenizer.token_bytes[9999] = " \U0001f389".encode()[:3]  # a space and half of a character
    detokenizer, taken = stream(tokenizer, [*encode(tokenizer, "cat"), 9999])
    assert "".join(taken) == "cat "
    assert detokenizer.num_whole_tokens() == len(encode(tokenizer, "cat"))
    del tokenizer.token_bytes[9999]


def test_broken_bytes_do_not_hold_up_what_follows(tokenizers):
    """Each is told as soon as it cannot become a character any more; no more than three wait."""
    tokenizer = tokenizers[BYTE_LEVEL]
    by_byte = {tokenizer.token_bytes[i]: i for i in range(len(tokenizer._tokenizer))}
    _, taken = stream(tokenizer, [by_byte[bytes([byte])] for byte in b"\x80\xf0\x9f\x98a\xe2\x82\xac\xe2"])
    assert taken == ["\ufffd", "", "", "", "\ufffda", "", "", "€", ""]
    _, taken = stream(tokenizer, [by_byte[bytes([byte])] for byte in b"\xed\xa1\xed\x9f\xbf"])
    assert taken == ["", "\ufffd\ufffd", "", "", "\ud7ff"], "half a surrogate pair is no character"


def test_special_tokens_are_no_text(tokenizer):
    token_ids = encode(tokenizer, tokenizer.render_chat(CHAT[:1]))
    assert any(map(tokenizer.is_special, token_ids))
    text = "".join(stream(tokenizer, token_ids)[1])
    assert "My cat is called Mia." in text
    assert "<|" not in text
    assert tokenizer.decode(token_ids) == tokenizer.render_chat(CHAT[:1])


class CountingBytes(dict[int, bytes]):
    """Notes how many bytes were read."""

    num_bytes = 0

    def __getitem__(self, token_id: int) -> bytes:
        value = super().__getitem__(token_id)
        self.num_bytes += len(value)
        return value


@pytest.mark.parametrize(("token_bytes", "is_special"), [(b"</s>", True), (b"\x80", False), (b"\xf0\x9f", False)])
def test_tokens_without_text_cost_no_more_than_others(token_bytes, is_special):
    """Runs of special tokens and of bytes that are no UTF-8: each token is read once, when it comes."""
    token = CountingBytes({7: token_bytes})
    detokenizer = Detokenizer(token, {7} if is_special else set(), ["stop"])
    for _ in range(5000):
        detokenizer.append(7)
        detokenizer.take_text(final=False)
        assert len(detokenizer._begun_char) <= 3
        assert len(detokenizer._untaken) == 0
    assert token.num_bytes == (0 if is_special else 5000 * len(token_bytes))
    assert detokenizer.num_whole_tokens() == (0 if detokenizer._begun_char else 5000)


@EACH_KIND
@settings(deadline=None)
@given(data=st.data())
def test_an_answer_that_another_engine_began_goes_on_as_it_would_have(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    token_ids = any_ids(tokenizer, data)
    stop = data.draw(st.lists(st.text(alphabet="ab 日é", min_size=1, max_size=3), max_size=2))
    whole, pieces = stream(tokenizer, token_ids, *stop)
    if not whole.num_tokens:
        return
    cut = data.draw(st.integers(0, whole.num_tokens - 1))
    resumed = tokenizer.detokenizer(stop)
    resumed.resume(token_ids[:cut], len("".join(pieces[:cut])))
    rest = []
    for index in range(cut, whole.num_tokens):
        resumed.append(token_ids[index])
        rest.append(resumed.take_text(final=index == whole.num_tokens - 1))
    assert rest == pieces[cut:]
    assert (resumed.text, resumed.is_stopped) == (whole.text, whole.is_stopped)
    assert resumed.num_whole_tokens() == whole.num_whole_tokens()


# -- where tokens lie in the text --------------------------------------------------------------------------------------


@EACH_KIND
@settings(deadline=None)
@given(data=st.data())
def test_the_text_offset_is_where_the_tokens_first_character_is(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    token_ids = [i for i in any_ids(tokenizer, data) if tokenizer.token_bytes[i] and not tokenizer.is_special(i)]
    detokenizer = tokenizer.detokenizer(())
    offsets = []
    for token_id in token_ids:
        offsets.append(detokenizer.text_offset(token_id))
        detokenizer.append(token_id)
    joined = b"".join(tokenizer.token_bytes[i] for i in token_ids)
    num_bytes = 0
    for token_id, offset in zip(token_ids, offsets, strict=True):
        # Counted by the character that the token's first byte is in.
        assert offset == len(joined[: num_bytes + 1].decode(errors="replace")) - 1
        num_bytes += len(tokenizer.token_bytes[token_id])


def test_text_offsets_of_a_character_of_several_tokens(tokenizers):
    """As OpenAI has them: each of its tokens begins where the character is."""
    tokenizer = tokenizers[BYTE_LEVEL]
    by_byte = {tokenizer.token_bytes[i]: i for i in range(len(tokenizer._tokenizer))}
    detokenizer, offsets = tokenizer.detokenizer(()), []
    for byte in "a€b".encode():
        offsets.append(detokenizer.text_offset(by_byte[bytes([byte])]))
        detokenizer.append(by_byte[bytes([byte])])
    assert offsets == [0, 1, 1, 1, 2]


# -- stop strings ------------------------------------------------------------------------------------------------------


def letters_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return [encode(tokenizer, letter)[0] for letter in text]


def test_a_stop_string_may_begin_and_end_inside_tokens(tokenizer):
    token_ids = encode(tokenizer, "my cat is called Mia. yes")
    detokenizer, taken = stream(tokenizer, token_ids, "t is cal")
    assert detokenizer.is_stopped
    assert "".join(taken) == detokenizer.text == "my ca"


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_does_not(tokenizer):
    _, taken = stream(tokenizer, letters_of(tokenizer, "xabaabay"), "abab", "aabb")
    # after "xa" a; after "xab" ab; "xaba" aba; "xabaa" aa (not aba: abaa is no stop); "aab"; "aaba" -> aba; then "abay"
    assert taken == ["x", "", "", "", "ab", "", "a", "abay"]


def test_the_first_stop_string_in_the_text_wins(tokenizer):
    token_ids = letters_of(tokenizer, "abcdef")
    assert stream(tokenizer, token_ids, "ef", "cd")[0].text == "ab"
    assert stream(tokenizer, token_ids, "cde", "de")[0].text == "ab"


def test_a_stop_string_that_was_complete_too_early_is_text(tokenizer):
    token_ids = letters_of(tokenizer, "abcabcd")
    detokenizer, taken = stream(tokenizer, token_ids, "ab", "x" * 30, may_stop_from=3)
    assert (detokenizer.text, "".join(taken)) == ("abc", "abc")
    detokenizer, taken = stream(tokenizer, token_ids, "bca", may_stop_from=3)  # ends when it may
    assert (detokenizer.text, "".join(taken)) == ("a", "a")


def expected_cut(pieces: Sequence[str], stop: Sequence[str], may_stop_from: int) -> tuple[str, str] | None:
    """By brute force: the text before the first stop string that ends in a token that may end the answer, and the string."""
    text = ""
    for index, piece in enumerate(pieces):
        for char in piece:
            text += char
            ending = [string for string in stop if text.endswith(string)]
            if ending and index >= may_stop_from:
                longest = max(ending, key=len)
                return text[: -len(longest)], longest
    return None


def can_go_on(text: str, stop: Sequence[str]) -> int:
    """By brute force: the length of the longest end of `text` that is the beginning, and not all, of a stop string."""
    return max((n for n in range(1, len(text) + 1) for s in stop if len(s) > n and s.startswith(text[-n:])), default=0)


FEW_LETTERS = st.text(alphabet="ab", min_size=1, max_size=6)


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=5), min_size=1, max_size=12),
    stop=st.lists(FEW_LETTERS, min_size=1, max_size=4),
    may_stop_from=st.integers(0, 6),
)
def test_stop_strings_are_found_as_by_brute_force(pieces, stop, may_stop_from):
    """Overlapping, over the borders of tokens, one inside the other, complete before they may end the answer."""
    detokenizer = Detokenizer(dict(enumerate(piece.encode() for piece in pieces)), (), stop)
    cut, stopped_by = expected_cut(pieces, stop, may_stop_from) or (None, None)
    taken = ""
    for index in range(len(pieces)):
        detokenizer.append(index, may_stop=index >= may_stop_from)
        if detokenizer.is_stopped:
            break
        taken += detokenizer.take_text(final=False)
        text = "".join(pieces[: index + 1])
        assert taken == text[: len(text) - can_go_on(text, stop)], "no less and no more is held back than has to be"
    assert detokenizer.stopped_by == stopped_by
    assert taken + detokenizer.take_text(final=True) == detokenizer.text == ("".join(pieces) if cut is None else cut)


class CountingDict(dict[str, int]):
    num_looks = 0

    def __contains__(self, key: object) -> bool:
        CountingDict.num_looks += 1
        return super().__contains__(key)


@pytest.mark.parametrize(
    "make_stop",
    [
        lambda: ["a" * (MAX_STOP_CHARS - 1) + "b"] * MAX_STOP_STRINGS,
        lambda: ["a" * (MAX_STOP_CHARS - i) + "b" for i in range(1, MAX_STOP_STRINGS)],
        lambda: ["aab" * 80, "ab" * 100, "b" * MAX_STOP_CHARS],
    ],
)
def test_a_character_costs_the_same_whatever_the_stop_strings(make_stop: Callable[[], list[str]]):
    stops = StopStrings(make_stop())
    assert len(stops._next) <= 1 + MAX_STOP_STRINGS * MAX_STOP_CHARS
    stops._next = [CountingDict(letters) for letters in stops._next]
    CountingDict.num_looks = 0
    rng = random.Random(0)
    text = ("a" * 300 + "c") * 20 + "".join(rng.choices("aab", k=4000))
    stops.pass_over(text)
    assert CountingDict.num_looks <= 2 * len(text), "each look goes on by a letter, or gives up letters read before"
