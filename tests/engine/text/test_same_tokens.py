"""The same prompt has the same tokens, whatever the session or another client sent before.

What a client wrote has those of a fresh session, what the model generated its own. With tokenizers of five kinds.
"""

from __future__ import annotations

import json
import unicodedata
import zlib
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from engine.errors import ContextLengthError
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_rules import MAX_COMPOSED_CHARS, TokenBound, find_cut_tokens, find_token_bound
from engine.text.transcript import NO_MATCH, ConversationTable, Transcript
from tests.engine.text.trained_tokenizers import KINDS, save_tokenizer

WINDOW = 1 << 20
PIECES = [
    *[
        "my cat is ca",
        "lled Mia",
        "led",
        "def fib",
        "ers = 1",
        "roblast",
        "Mia",
        " Mia",
        "cat",
        "\n\nYes.",
        "\n",
        "  ",
        " ",
    ],
    *["é", "e\u0301", "日", "1234", "<|im_end|>", "<|im_end|>x", "<|im_start|>", "<|im_", "<|endoftext|>", "<|end|>"],
    *["<|user|>", "</s>", "<s>", "<|mask|>", ""],
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder: Path = tmp_path_factory.mktemp("tokenizers")
    return {kind: Tokenizer(str(save_tokenizer(kind, folder / kind))) for kind in KINDS}


class Sessions:
    """What an engine remembers, and beside it, told in another way, what it should say.

    An answer is kept as the beginning of a prompt that goes on from it, with the ids that this beginning has. A prompt's ids
    are those of the longest one that it goes on from, with a token behind it that the tokenizer always finds, and then those
    of the rest tokenised as it stands; of the whole prompt if there is none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.table = ConversationTable(1 << 30, tokenizer.cut_tokens)
        self._answers: dict[tuple[str, str], dict[str, list[int]]] = {}  # by session and fingerprint

    def fresh(self, text: str, *, is_chat: bool) -> list[int]:
        return self.tokenizer._tokenizer(text, add_special_tokens=not is_chat).input_ids

    def fingerprint(self, *, is_chat: bool) -> str:
        return self.tokenizer.fingerprint if is_chat else self.tokenizer.text_fingerprint

    def expected(self, session: str, text: str, *, is_chat: bool) -> list[int]:
        known = self._answers.get((session, self.fingerprint(is_chat=is_chat)), {})
        cut_texts = tuple(self.tokenizer.cut_tokens.values())
        used = [said for said in known if text.startswith(said) and text.startswith(cut_texts, len(said))]
        if not used:
            return self.fresh(text, is_chat=is_chat)
        said = max(used, key=len)
        return known[said] + self.fresh(text[len(said) :], is_chat=True)

    def prompt(self, session: str, text: str, *, is_chat: bool) -> Transcript:
        known = self.table.match_text(session, text, self.fingerprint(is_chat=is_chat))
        prompt = self.tokenizer.encode_prompt(text, known, is_chat=is_chat, max_tokens=WINDOW)
        assert list(prompt.token_ids) == self.expected(session, text, is_chat=is_chat), text
        return prompt

    def answer(self, session: str, prompt: Transcript, text: str, *, is_chat: bool, ends: bool) -> None:
        """The model says `text`, in ids that no tokenizer would give it, the same ones whenever it says that here.

        Equal ids stand for equal texts, as those of a tokenizer do.
        """
        ids = [ord(character) % 7 + 3 for character in prompt.text[-3:] + text]
        ids += [part + 3 for part in divmod(zlib.crc32(text.encode()) % 250_000, 500)]
        said = prompt.text + text
        self._answers.setdefault((session, self.fingerprint(is_chat=is_chat)), {})[said] = [*prompt.token_ids, *ids]
        if ends:
            end, end_text = next(iter(self.tokenizer.cut_tokens.items()))
            self.table.record_turn(session, prompt, [*ids, end], text + end_text)
        else:
            self.table.record_turn(session, prompt, ids, text)


texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join)
turns = st.lists(
    st.tuples(
        st.sampled_from(["chat", "chat", "text"]),  # of the same session
        st.integers(0, 20),  # which of the prompts before it goes on from
        st.sampled_from(["go on", "go on", "edit the answer", "edit a message", "again", "cut"]),
        st.integers(0, 200),
        texts,  # what the client says next
        texts,  # what the model answers
        st.booleans(),  # whether the answer comes to its end
    ),
    min_size=2,
    max_size=7,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(turns)
def test_a_prompt_has_the_tokens_of_a_fresh_session_but_for_the_answers_that_it_goes_on_from(tokenizers, kind, turns):
    """Chats and completions in one session, by one client or several: continued, edited, cut anywhere, and sent again."""
    sessions = Sessions(tokenizers[kind])
    chats: list[list[tuple[str, str]]] = [[]]
    prefixes = [""]
    for mode, of, edit, place, said, answer, ends in turns:
        answer += "~"  # no client writes by itself what the model says at the same place before or after
        if mode == "text":
            text = prefixes[of % len(prefixes)]
            if edit not in ("go on", "again"):
                text = text[: place % (len(text) + 1)]
            text = text + said if edit != "again" else text
            prompt = sessions.prompt("s", text, is_chat=False)
            sessions.answer("s", prompt, answer, is_chat=False, ends=ends)
            prefixes += [text, text + answer]
            continue
        chat = list(chats[of % len(chats)])
        if edit == "edit the answer" and chat:
            chat[-1] = ("assistant", said)
        if edit == "edit a message" and chat:
            at = place % len(chat)
            chat[at] = (chat[at][0], said)
        if edit == "cut" and chat:
            chat[-1] = (chat[-1][0], chat[-1][1][: place % (len(chat[-1][1]) + 1)])
        if edit != "again" or not chat:
            chat.append(("user", said))
        else:
            chat = chat[:-1]  # the same question again
        text = sessions.tokenizer.render_chat(chat)
        prompt = sessions.prompt("s", text, is_chat=True)
        sessions.answer("s", prompt, answer, is_chat=True, ends=ends)
        chats.append([*chat, ("assistant", answer)])
        prefixes.append(text)  # a client may send that as a completion


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_a_text_may_be_cut_wherever_a_cut_token_stands(tokenizers, kind, text):
    """Also where other added tokens that strip, overlap, or look at their neighbours are beside it."""
    tokenizer = tokenizers[kind]
    whole = tokenizer._tokenizer(text, add_special_tokens=False).input_ids
    for cut_text in tokenizer.cut_tokens.values():
        for place in [i for i in range(len(text)) if text.startswith(cut_text, i)]:
            parts = (
                tokenizer._tokenizer(part, add_special_tokens=False).input_ids for part in (text[:place], text[place:])
            )
            assert [token_id for part in parts for token_id in part] == whole
    prompt = tokenizer.encode_prompt(text, NO_MATCH, is_chat=True, max_tokens=WINDOW)
    assert list(prompt.token_ids) == whole
    for num_tokens, num_chars in prompt.anchors:
        assert text.startswith(tokenizer.cut_tokens[whole[num_tokens]], num_chars)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, "x" * 40, " " * 40, "\n" * 9, "\x04", "가", "ﬁ"]), max_size=12).map("".join))
def test_no_text_has_fewer_tokens_than_its_length_says(tokenizers, kind, text):
    bound = tokenizers[kind]._token_bound
    if bound is not None:
        assert bound.min_tokens(text) <= len(tokenizers[kind]._tokenizer(text, add_special_tokens=False).input_ids)


def rules_of(backend: Backend) -> dict:
    return json.loads(backend.to_str())


def test_which_tokenizers_have_a_bound():
    """None where characters can vanish, or any number of them be one token."""
    vocab = {
        letter: index for index, letter in enumerate(["<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "abc"])
    }
    bytewise = Backend(models.BPE(vocab=vocab, merges=[]))
    assert find_token_bound(rules_of(bytewise)) is None, "without bytes, unknown letters vanish"
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert find_token_bound(rules_of(bytewise)) == TokenBound(5, "")
    bytewise.normalizer = normalizers.NFC()
    assert find_token_bound(rules_of(bytewise)) == TokenBound(20, "")
    bytewise.normalizer = normalizers.Sequence([normalizers.Replace("abcd", "a"), normalizers.Lowercase()])
    assert find_token_bound(rules_of(bytewise)) == TokenBound(20, "")
    for normalizer in (normalizers.Replace(Regex(" +"), " "), normalizers.Strip(), normalizers.StripAccents(),
                       normalizers.Replace(" ", ""), normalizers.BertNormalizer()):  # fmt: skip
        bytewise.normalizer = normalizer
        assert find_token_bound(rules_of(bytewise)) is None
    bytewise.normalizer = None
    bytewise.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert find_token_bound(rules_of(bytewise)) is None
    few = {letter: index for letter, index in vocab.items() if letter != "a"}
    without_a = Backend(models.BPE(vocab=few, merges=[]))
    without_a.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert find_token_bound(rules_of(without_a)) == TokenBound(5, "a")
    without_a.add_special_tokens([AddedToken("<|end|>", rstrip=True)])
    bound = find_token_bound(rules_of(without_a))
    assert bound is not None
    assert bound.min_tokens("aaa  \n<|end|> bb\u3000" * 7) == 9
    assert find_token_bound(rules_of(Backend(models.WordLevel(vocab={"<unk>": 0}, unk_token="<unk>")))) is None
    fused = Backend(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>", fuse_unk=True))
    assert find_token_bound(rules_of(fused)) is None
    apart = Backend(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>"))
    assert find_token_bound(rules_of(apart)) == TokenBound(5, "")


def test_so_many_characters_at_most_are_composed_to_one():
    assert max(len(unicodedata.normalize("NFD", chr(code))) for code in range(0x110000)) == MAX_COMPOSED_CHARS


def test_which_tokens_cut():
    backend = Backend(models.BPE(vocab={"a": 0}, merges=[]))

    def cuts(*tokens: AddedToken) -> set[str]:
        fresh = Backend.from_str(backend.to_str())
        fresh.add_tokens(list(tokens))
        return set(find_cut_tokens(rules_of(fresh)).values())

    plain = AddedToken("<e>", normalized=False)
    assert cuts(plain) == {"<e>"}
    assert cuts(AddedToken("<e>", normalized=False, rstrip=True)) == {"<e>"}
    assert cuts(AddedToken("<e>", normalized=False, lstrip=True)) == set()
    assert cuts(AddedToken("<e>", normalized=False, single_word=True)) == set()
    assert cuts(AddedToken(" <e>", normalized=False)) == set()
    assert cuts(plain, AddedToken("<e>!", normalized=False)) == {"<e>!"}, "the longer one wins"
    assert cuts(plain, AddedToken("!<", normalized=False)) == {"!<"}, "one that begins before may take its beginning"
    assert cuts(plain, AddedToken("!<e>?", normalized=False)) == {"!<e>?"}
    assert cuts(AddedToken("aa", normalized=False)) == set(), "aaa"
    assert cuts(AddedToken("<e>", normalized=True)) == {"<e>"}
    backend.normalizer = normalizers.NFC()
    assert cuts(AddedToken("<e>", normalized=True)) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_too_long_is_refused_before_it_is_tokenised_if_its_length_tells(tokenizers, kind, monkeypatch):
    tokenizer = tokenizers[kind]
    given = []
    encode = tokenizer._encode
    monkeypatch.setattr(tokenizer, "_encode", lambda text: given.append(len(text)) or encode(text))
    with pytest.raises(ContextLengthError, match=r"window is 8 tokens, but the prompt has (at least )?[0-9]+; shorten"):
        tokenizer.encode_prompt("my cat" * 1000, NO_MATCH, is_chat=True, max_tokens=8)
    assert given == ([6000] if kind == "unigram" else [])
    given.clear()
    cut_text = next(iter(tokenizer.cut_tokens.values()))
    text = (cut_text + "!?") * 50_000
    with pytest.raises(ContextLengthError, match="window is 60000 tokens, but the prompt has at least"):
        tokenizer.encode_prompt(text, NO_MATCH, is_chat=True, max_tokens=60_000)
    assert given
    assert sum(given) < len(text), "it ends with the piece that shows it"
    assert max(given) < 70_000


def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(tokenizers):
    for tokenizer in tokenizers.values():
        cut_text = next(iter(tokenizer.cut_tokens.values()))
        text = (cut_text + "my cat  \n" * 3000) * 6
        whole = tokenizer._tokenizer(text, add_special_tokens=True).input_ids
        prompt = tokenizer.encode_prompt(text, NO_MATCH, is_chat=False, max_tokens=WINDOW)
        assert prompt.token_ids == array("I", whole)
        assert len(prompt.anchors) == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["\n\nYes.", "  two spaces", "\nYes", "Yes\n", " "])
def test_an_answer_that_the_client_edited_has_the_tokens_of_a_fresh_session(tokenizers, kind, answer):
    """Though templates end in a line end, with which the tokens of an edited answer may merge."""
    sessions = Sessions(tokenizers[kind])
    render = sessions.tokenizer.render_chat
    for said in ["No", *([answer[:-1]] if answer[:-1].strip() != answer.strip() else []), answer + "!"]:
        prompt = sessions.prompt("s", render([("user", "tell me something")]), is_chat=True)
        sessions.answer("s", prompt, said, is_chat=True, ends=True)
    text = render([("user", "tell me something"), ("assistant", answer), ("user", "and now?")])
    assert list(sessions.prompt("s", text, is_chat=True).token_ids) == sessions.fresh(text, is_chat=True)


@pytest.mark.parametrize("kind", KINDS)
def test_turns_of_a_chat_have_the_tokens_of_its_text_if_the_model_gives_the_tokenizers_own(tokenizers, kind):
    """Five turns; also with end tokens that take in the line end behind them.

    From the second turn on only what is new is tokenised.
    """
    tokenizer = tokenizers[kind]
    end, end_text = next(item for item in tokenizer.cut_tokens.items() if item[0] == tokenizer.eos_token_id)
    table = ConversationTable(1 << 20, tokenizer.cut_tokens)
    chat: list[tuple[str, str]] = []
    for turn in range(5):
        chat.append(("user", f"my cat is called Mia {turn}"))
        text = tokenizer.render_chat(chat)
        known = table.match_text("s", text, tokenizer.fingerprint)
        prompt = tokenizer.encode_prompt(text, known, is_chat=True, max_tokens=WINDOW)
        fresh = tokenizer._tokenizer(text, add_special_tokens=False).input_ids
        assert list(prompt.token_ids) == fresh
        if turn:
            assert text[known.num_chars :].count("Mia") == 1
        whole = tokenizer._tokenizer(text + "ok" + end_text, add_special_tokens=False).input_ids
        assert whole[: len(fresh)] == fresh, "this test needs an answer that merges with nothing"
        assert whole[-1] == end
        table.record_turn("s", prompt, whole[len(fresh) :], "ok" + end_text)
        chat.append(("assistant", "ok"))


def test_a_completion_and_a_chat_of_one_text_do_not_share_the_token_that_texts_begin_with(tokenizers):
    sessions = Sessions(tokenizers["llama_2"])
    text = sessions.tokenizer.render_chat([("user", "my cat"), ("assistant", "Mia"), ("user", "cat")])
    for is_chat in (True, False, True, False):
        prompt = sessions.prompt("s", text, is_chat=is_chat)
        assert prompt.token_ids[1] == prompt.token_ids[0] or is_chat
        sessions.answer("s", prompt, "called", is_chat=is_chat, ends=True)
