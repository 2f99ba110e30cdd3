"""The text of an answer as its tokens come, and its end at a stop string."""

import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from engine.core.conversation import NO_MATCH
from engine.detokenizer import Detokenizer
from engine.embedded_model import embedded_model_path
from engine.tokenizer import Tokenizer

CHAT = [("user", "My cat is called Mia."), ("assistant", "ok."), ("user", "what is my cat called?")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(str(embedded_model_path()))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_prompt(text, NO_MATCH, is_chat=True, max_tokens=10_000).token_ids.tolist()


def stream(
    tokenizer: Tokenizer, token_ids, *stop: str, prompt=(5, 6), may_stop_from: int = 0
) -> tuple[Detokenizer, list[str]]:
    """The detokenizer, and the text taken after each token until it stops or the tokens end."""
    detokenizer = tokenizer.detokenizer(prompt, stop)
    taken = []
    for index, token_id in enumerate(token_ids):
        detokenizer.append(token_id, may_stop=index >= may_stop_from)
        taken.append(detokenizer.take_text(final=detokenizer.is_stopped or index == len(token_ids) - 1))
        if detokenizer.is_stopped:
            break
    return detokenizer, taken


@pytest.mark.parametrize(
    "text", ["my cat is called Mia.", "Grüße aus Zürich", "日本語 한국어", "👩‍👩‍👧‍👦 🎉", "  a \n b"]
)
def test_pieces_concatenate_to_the_text_and_no_piece_holds_half_a_character(tokenizer, text):
    token_ids = encode(tokenizer, text)
    _, taken = stream(tokenizer, token_ids)
    assert "".join(taken) == text
    assert not any("\ufffd" in piece for piece in taken)


def test_any_token_ids_can_be_streamed(tokenizer):
    """Also broken UTF-8, special ones, and ids beyond the vocabulary (models pad theirs); nothing raises, and what is shown
    is a beginning of what the whole decodes to."""
    rng = random.Random(0)
    num_ids = len(tokenizer._tokenizer)
    for _ in range(300):
        token_ids = [rng.choice([rng.randrange(num_ids + 5), rng.randrange(5, 270)]) for _ in range(12)]
        prompt = [rng.randrange(5, num_ids) for _ in range(3)]
        detokenizer, taken = stream(tokenizer, token_ids, prompt=prompt)
        assert "".join(taken) == detokenizer.text
        known = [token_id for token_id in token_ids if token_id < num_ids and not tokenizer.is_special(token_id)]
        before = tokenizer.decode(prompt)
        if not before.endswith("\ufffd"):
            assert tokenizer.decode(prompt + known).startswith(before + detokenizer.text)


def test_a_prompt_that_ends_in_half_a_character_is_not_repeated(tokenizer):
    prompt = encode(tokenizer, "my cat likes €")[:-1]
    assert tokenizer.decode(prompt).endswith("\ufffd"), "this test needs a character of several tokens"
    assert "".join(stream(tokenizer, encode(tokenizer, " yes"), prompt=prompt)[1]) == " yes"


def test_byte_fallback_tokens_can_be_streamed(tmp_path):
    """The kind of tokenizer that has one token for each byte it does not know."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁a": 257, "b": 258, "▁": 259}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = Tokenizer(str(tmp_path))
    euro = [byte + 1 for byte in "€".encode()]
    _, taken = stream(tokenizer, [257, *euro, 258, *euro[:2], 257])
    assert "".join(taken[:5]) == " a€b"
    rng = random.Random(1)
    for _ in range(300):
        token_ids = [rng.randrange(260) for _ in range(12)]
        detokenizer, taken = stream(tokenizer, [*token_ids, 257], prompt=[257, 258])
        assert "".join(taken) == detokenizer.text
        assert detokenizer.text.endswith(" a"), "broken bytes do not silence what follows them"


def test_a_stop_string_may_begin_and_end_inside_tokens(tokenizer):
    token_ids = encode(tokenizer, "my cat is called Mia. yes")
    detokenizer, taken = stream(tokenizer, token_ids, "t is cal")
    assert detokenizer.is_stopped
    assert "".join(taken) == detokenizer.text == "my ca"


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_does_not(tokenizer):
    token_ids = [encode(tokenizer, letter)[0] for letter in "xabaabay"]
    _, taken = stream(tokenizer, token_ids, "abab", "aabb")
    # after "xa" a; after "xab" ab; "xaba" aba; "xabaa" aa (not aba: abaa is no stop); "aab"; "aaba" -> aba; then "abay"
    assert taken == ["x", "", "", "", "ab", "", "a", "abay"]


def test_the_first_stop_string_in_the_text_wins(tokenizer):
    token_ids = [encode(tokenizer, letter)[0] for letter in "abcdef"]
    assert stream(tokenizer, token_ids, "ef", "cd")[0].text == "ab"
    assert stream(tokenizer, token_ids, "cde", "de")[0].text == "ab"


def test_a_stop_string_that_was_complete_too_early_is_text(tokenizer):
    token_ids = [encode(tokenizer, letter)[0] for letter in "abcabcd"]
    detokenizer, taken = stream(tokenizer, token_ids, "ab", "x" * 30, may_stop_from=3)
    assert (detokenizer.text, "".join(taken)) == ("abc", "abc")
    detokenizer, taken = stream(tokenizer, token_ids, "bca", may_stop_from=3)  # ends when it may
    assert (detokenizer.text, "".join(taken)) == ("a", "a")


def test_special_tokens_are_no_text(tokenizer):
    token_ids = encode(tokenizer, tokenizer.render_chat(CHAT[:1]))
    assert any(map(tokenizer.is_special, token_ids))
    text = "".join(stream(tokenizer, token_ids)[1])
    assert "My cat is called Mia." in text
    assert "<|" not in text
    assert tokenizer.decode(token_ids) == tokenizer.render_chat(CHAT[:1])
