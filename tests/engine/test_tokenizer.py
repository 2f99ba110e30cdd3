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
from engine.tokenizer import Tokenizer

CHAT = [("user", "My cat is called Mia."), ("assistant", "ok."), ("user", "what is my cat called?")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(str(embedded_model_path()))


def encode(tokenizer: Tokenizer, text: str, known: TranscriptMatch = NO_MATCH) -> Transcript:
    return tokenizer.encode_prompt(text, known, add_special_tokens=False)


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
    expected = Transcript(known.token_ids, text, known.anchors, tokenizer.fingerprint)  # no anchor at the end
    assert encode(tokenizer, text, known) == expected


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


def test_the_fingerprint_tells_tokenizers_and_templates_apart(tmp_path, tokenizer, tiny_model):
    """Equal after a new start and a copy; another one for another vocabulary, added token or template."""
    path = embedded_model_path()
    assert Tokenizer(str(path)).fingerprint == tokenizer.fingerprint
    other = tokenizer._tokenizer.__class__.from_pretrained(path)
    other.save_pretrained(tmp_path / "copy")
    assert Tokenizer(str(tmp_path / "copy")).fingerprint == tokenizer.fingerprint
    other.chat_template += " "
    other.save_pretrained(tmp_path / "template")
    other = tokenizer._tokenizer.__class__.from_pretrained(path)
    other.add_tokens(["<|tool|>"], special_tokens=True)
    other.save_pretrained(tmp_path / "added")
    paths = [path, tmp_path / "template", tmp_path / "added", tiny_model("gpt2")]
    assert len({Tokenizer(str(path)).fingerprint for path in paths}) == 4


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
