"""Text to token ids and back, with the anchors that let a conversation be matched by text."""

from array import array

import pytest

from engine.embedded_model import embedded_model_path
from engine.errors import InvalidParameterError, ModelLoadError
from engine.text.tokenizer import Tokenizer
from engine.text.transcript import NO_MATCH, Transcript, TranscriptMatch
from tests.engine.text.trained_tokenizers import save_tokenizer

CHAT = [("user", "My cat is called Mia."), ("assistant", "ok."), ("user", "what is my cat called?")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(str(embedded_model_path()))


def encode(tokenizer: Tokenizer, text: str, known: TranscriptMatch = NO_MATCH) -> Transcript:
    return tokenizer.encode_prompt(text, known, is_chat=True, max_tokens=10_000)


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
    cut = text.index("<|assistant|>")
    strange = array("I", [9, 8, 7])
    known = TranscriptMatch(strange, cut, ((1, 4),))
    prompt = encode(tokenizer, text, known)
    assert prompt.token_ids[:3] == strange
    assert prompt.token_ids[3:] == encode(tokenizer, text[cut:]).token_ids
    assert prompt.text == text
    assert prompt.anchors[:2] == ((1, 4), (3, cut)), "where the known part ends, the text may be cut"
    assert all(3 <= num_tokens < len(prompt.token_ids) for num_tokens, _ in prompt.anchors[1:])
    assert strange == array("I", [9, 8, 7])


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
    assert error.value.param == "prompt"


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ messages[5].content.x() }}", "{{ messages | nope }}"]
)
def test_a_template_that_fails_is_the_requests_fault(tiny_model, template):
    tokenizer = Tokenizer(str(tiny_model("gpt2")))
    tokenizer._tokenizer.chat_template = template
    with pytest.raises(InvalidParameterError, match="chat template") as error:
        tokenizer.render_chat(CHAT)
    assert error.value.param == "prompt"


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ModelLoadError, match="cannot load a tokenizer from") as error:
        Tokenizer(str(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_special_tokens_that_mean_something_to_a_parser_can_be_text(tmp_path):
    tokenizer = Tokenizer(str(save_tokenizer("byte_level", tmp_path)))
    tokenizer._tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "<|other|>"]})
    tokenizer._tokenizer.save_pretrained(tmp_path)
    tokenizer = Tokenizer(str(tmp_path), tool_call_parser="mistral")
    text = "a[TOOL_CALLS]b<|other|>c"
    token_ids = tokenizer._encode(text).ids
    assert tokenizer.marker_ids == {"[TOOL_CALLS]": token_ids[1]}
    for keeps_markers, told in ((True, "a[TOOL_CALLS]bc"), (False, "abc")):
        detokenizer = tokenizer.detokenizer((), keeps_markers=keeps_markers)
        for token_id in token_ids:
            detokenizer.append(token_id)
        assert detokenizer.text == told
