"""Text to token ids and back, with the anchors that let a conversation be matched by text."""

import random
from array import array

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.core.conversation import NO_MATCH, Conversation, Transcript, TranscriptMatch
from engine.embedded_model import embedded_model_path
from engine.errors import InvalidParameterError, ModelLoadError
from engine.tokenizer import Detokenizer, Tokenizer

CHAT = [("user", "My cat is called Mia."), ("assistant", "ok."), ("user", "what is my cat called?")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(str(embedded_model_path()))


def encode(tokenizer: Tokenizer, text: str, known: TranscriptMatch = NO_MATCH) -> Transcript:
    return tokenizer.encode_prompt(text, known, add_special_tokens=False)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_a_chat_ends_where_the_assistant_is_to_speak(tokenizer):
    shorter, longer = tokenizer.render_chat(CHAT[:1]), tokenizer.render_chat(CHAT)
    assert longer.startswith(shorter)
    assert all(content in longer for _, content in CHAT)


def test_anchors_are_places_where_the_text_may_be_cut(tokenizer):
    """Tokenising the two sides of an anchor apart gives the tokens of the whole."""
    prompt = encode(tokenizer, tokenizer.render_chat(CHAT))
    assert len(prompt.anchors) >= 4
    assert list(prompt.anchors) == sorted(set(prompt.anchors))
    for num_tokens, num_chars in prompt.anchors:
        assert 0 < num_tokens < len(prompt.token_ids)
        before, after = prompt.text[:num_chars], prompt.text[num_chars:]
        assert encode(tokenizer, before).token_ids == prompt.token_ids[:num_tokens]
        assert encode(tokenizer, after).token_ids == prompt.token_ids[num_tokens:]


def test_only_what_is_not_known_is_tokenised(tokenizer):
    """The known ids are kept although the tokenizer would say others for that text."""
    text = tokenizer.render_chat(CHAT)
    strange = array("I", [9, 8, 7])
    known = TranscriptMatch(strange, 10, ((1, 4),), num_computed=2)
    prompt = encode(tokenizer, text, known)
    assert prompt.token_ids[:3] == strange
    assert prompt.token_ids[3:] == encode(tokenizer, text[10:]).token_ids
    assert prompt.text == text
    assert prompt.anchors[:2] == ((1, 4), (3, 10)), "where the known part ends, the text may be cut"
    assert all(3 <= num_tokens < len(prompt.token_ids) for num_tokens, _ in prompt.anchors[1:])


def test_what_is_known_to_its_end_is_taken_as_it_is(tokenizer):
    text = tokenizer.render_chat(CHAT)
    known = TranscriptMatch(array("I", [9, 8, 7]), len(text), ((1, 4),), num_computed=2)
    assert encode(tokenizer, text, known) == Transcript(known.token_ids, text, known.anchors)  # none at the end


def test_a_match_of_an_edited_chat_gives_the_tokens_of_that_chat(tokenizer):
    """From any turn of a conversation to any other chat: cutting at anchors never changes the token ids."""
    rng = random.Random(0)
    words = ["cat", "Mia", " ", "?", "grüße", "\n", "4711", "👩‍👩"]
    conversation, chats = Conversation("c"), [CHAT[:1]]
    for _ in range(60):
        chat = list(rng.choice(chats))
        edit = rng.randrange(len(chat))
        chat[edit] = (chat[edit][0], " ".join(rng.choices(words, k=rng.randint(1, 6))))
        chat = chat[: rng.randrange(edit // 2, len(chat) // 2 + 1) * 2 + 1]
        text = tokenizer.render_chat(chat)
        known = conversation.match_text(text)
        prompt = encode(tokenizer, text, known)
        assert prompt.token_ids == encode(tokenizer, text).token_ids
        answer = " ".join(rng.choices(words, k=3))
        conversation.record_turn(prompt, encode(tokenizer, answer).token_ids, answer)
        chats.append([*chat, ("assistant", answer), ("user", "more")])
    assert len(conversation.branches) == 8


def test_without_a_chat_template_messages_become_lines(tiny_model, caplog):
    tokenizer = Tokenizer(str(tiny_model("gpt2")))
    assert tokenizer.render_chat(CHAT[:2]) == "user: My cat is called Mia.\nassistant: ok.\nassistant:"
    assert "no chat template" in caplog.text


def test_what_the_template_refuses_is_the_requests_fault(tiny_model):
    tokenizer = Tokenizer(str(tiny_model("gpt2")))
    tokenizer._tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidParameterError, match="roles must alternate") as error:
        tokenizer.render_chat(CHAT)
    assert error.value.param == "messages"


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ModelLoadError, match="cannot load a tokenizer from") as error:
        Tokenizer(str(tmp_path))
    assert str(tmp_path) in str(error.value)


# -- answers -----------------------------------------------------------------------------------------------------------


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
    token_ids = encode(tokenizer, text).token_ids
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
    prompt = encode(tokenizer, "my cat likes €").token_ids[:-1]
    assert tokenizer.decode(prompt).endswith("\ufffd"), "this test needs a character of several tokens"
    assert "".join(stream(tokenizer, encode(tokenizer, " yes").token_ids, prompt=prompt)[1]) == " yes"


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
    token_ids = encode(tokenizer, "my cat is called Mia. yes").token_ids
    detokenizer, taken = stream(tokenizer, token_ids, "t is cal")
    assert detokenizer.is_stopped
    assert "".join(taken) == detokenizer.text == "my ca"


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_does_not(tokenizer):
    token_ids = [encode(tokenizer, letter).token_ids[0] for letter in "xabaabay"]
    _, taken = stream(tokenizer, token_ids, "abab", "aabb")
    # after "xa" a; after "xab" ab; "xaba" aba; "xabaa" aa (not aba: abaa is no stop); "aab"; "aaba" -> aba; then "abay"
    assert taken == ["x", "", "", "", "ab", "", "a", "abay"]


def test_the_first_stop_string_in_the_text_wins(tokenizer):
    token_ids = [encode(tokenizer, letter).token_ids[0] for letter in "abcdef"]
    assert stream(tokenizer, token_ids, "ef", "cd")[0].text == "ab"
    assert stream(tokenizer, token_ids, "cde", "de")[0].text == "ab"


def test_a_stop_string_that_was_complete_too_early_is_text(tokenizer):
    token_ids = [encode(tokenizer, letter).token_ids[0] for letter in "abcabcd"]
    detokenizer, taken = stream(tokenizer, token_ids, "ab", "x" * 30, may_stop_from=3)
    assert (detokenizer.text, "".join(taken)) == ("abc", "abc")
    detokenizer, taken = stream(tokenizer, token_ids, "bca", may_stop_from=3)  # ends when it may
    assert (detokenizer.text, "".join(taken)) == ("a", "a")


def test_special_tokens_are_no_text(tokenizer):
    token_ids = encode(tokenizer, tokenizer.render_chat(CHAT[:1])).token_ids
    assert any(map(tokenizer.is_special, token_ids))
    text = "".join(stream(tokenizer, token_ids)[1])
    assert "My cat is called Mia." in text
    assert "<|" not in text
    assert tokenizer.decode(token_ids) == tokenizer.render_chat(CHAT[:1])


def test_a_tokenizer_that_begins_texts_with_a_space_does_not_do_so_in_the_middle(tmp_path):
    """As Llama-2's: a prompt of which the beginning is known gets the ids that the whole would get."""
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", "\u2581", "a", "b", "\u2581a", "\u2581b", "ab"])}
    backend = Backend(models.BPE(vocab=vocab, merges=[("\u2581", "a"), ("\u2581", "b"), ("a", "b")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = Tokenizer(str(tmp_path))
    for whole, num_known in [("aab", 2), ("aa b", 2), ("ba</s>ab", 6), ("ba</s> ab", 6)]:
        known_ids = tokenizer.encode_prompt(whole[:num_known], NO_MATCH, add_special_tokens=False).token_ids
        known = TranscriptMatch(known_ids, num_known, (), len(known_ids))
        ids = tokenizer.encode_prompt(whole, known, add_special_tokens=False).token_ids
        assert tokenizer.decode(ids) == tokenizer.decode(
            tokenizer.encode_prompt(whole, NO_MATCH, add_special_tokens=False).token_ids
        )
        assert vocab["\u2581"] not in ids[len(known_ids) :] or " " in whole[num_known:]
