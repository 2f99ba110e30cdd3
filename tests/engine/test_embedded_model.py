"""The shipped model: small, lossless in its text handling, and right about what it was told.

Plain transformers only, so that a failure here is the model's and a wrong answer elsewhere is the cache's.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from engine.embedded_model import EMBEDDED_MODEL_NAME, embedded_model_path
from tools.embedded_model.dialogues import UNKNOWN_ANSWER, generate_dialogue

RECALL_SEEDS = range(2_000_000, 2_000_008)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(embedded_model_path())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32).eval()


def generate_greedily(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]
) -> str:
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_package_data_is_small_and_complete() -> None:
    package = embedded_model_path().parent
    shipped = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in shipped) < 5_000_000
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= {path.name for path in Path(embedded_model_path()).iterdir()}


def test_name_states_the_size(model: PreTrainedModel) -> None:
    assert f"pensieve-recall-{model.num_parameters() / 1e6:.1f}m" == EMBEDDED_MODEL_NAME
    assert model.config.max_position_embeddings == 4096


@pytest.mark.parametrize(
    "text",
    [
        "My cat is called Mia.",
        "  two  leading spaces, and one behind ",
        "it 's n't . Spaces before , punctuation !",
        "a\tb\r\n\n  c\u00a0d\u2003e",
        "code 4711 and 3.14159, 1,000,000",
        "Grüße aus Zürich, naïve façade, e\u0301 versus é",
        "日本語とカタカナ 한국어 العربية עברית हिन्दी ไทย",
        "👩‍👩‍👧‍👦 🏳️‍🌈 🎉\U0001f9ff\ufffd",
        "\x00\x01\x7f\u200b\u202e\ufeff",
        "",
    ],
)
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_has_a_token_for_every_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    every_bmp_block = "".join(chr(code) for code in range(0, 0x30000, 41) if not 0xD800 <= code < 0xE000)
    assert tokenizer.decode(tokenizer(every_bmp_block).input_ids) == every_bmp_block
    assert len(tokenizer("4711").input_ids) == 4


def test_special_tokens(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    names = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert [tokenizer(name).input_ids for name in names] == [[0], [1], [2], [3], [4]]
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size == 1024


def test_chat_template_keeps_content_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "\n my cat is called Mia "},
        {"role": "assistant", "content": " ok, your cat is called Mia.\n\n"},
        {"role": "user", "content": "what is my cat called?"},
    ]
    history = (
        "<|system|> Be brief.\n<|user|>\n my cat is called Mia "
        "<|assistant|> ok, your cat is called Mia.\n\n<|end|><|user|>what is my cat called?"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == history
    assert (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == history + "<|assistant|>"
    )


def test_chat_template_refuses_an_unknown_role(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_next_turn_extends_the_tokens_of_the_last(tokenizer: PreTrainedTokenizerFast) -> None:
    """What was generated is what the history renders to: a cache of the one serves the other."""
    dialogue = generate_dialogue(seed=3, num_turns=12, filler_words=(0, 40))
    for turn_index, turn in enumerate(dialogue.turns[:-1]):
        prompt = tokenizer.apply_chat_template(dialogue.prompt(turn_index), add_generation_prompt=True).input_ids
        generated = [*tokenizer(turn.assistant).input_ids, tokenizer.eos_token_id]
        next_prompt = tokenizer.apply_chat_template(dialogue.prompt(turn_index + 1)).input_ids
        assert next_prompt[: len(prompt) + len(generated)] == prompt + generated


def test_filler_makes_long_messages(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = [len(tokenizer(turn.user).input_ids) for turn in generate_dialogue(8, 30, filler_words=(150, 160)).turns]
    assert 150 < sum(lengths) / len(lengths) < 250


def test_recalls_what_it_was_told(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    outcomes = []
    for seed in RECALL_SEEDS:
        dialogue = generate_dialogue(seed, 20, filler_words=(0, 24))
        for i in range(10, 20):  # after 300 to 600 tokens
            if dialogue.turns[i].kind == "ask":
                reply = generate_greedily(model, tokenizer, dialogue.prompt(i))
                outcomes.append(reply == dialogue.turns[i].assistant)
    assert len(outcomes) >= 15
    assert sum(outcomes) >= 0.9 * len(outcomes)


def test_says_so_when_it_was_not_told(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    history = generate_dialogue(2_000_010, 8, filler_words=(0, 16))
    told = {turn.subject for turn in history.turns}
    questions = {
        "cat": "what is my cat called?",
        "sister": "Who is my sister?",
        "bakery": "where is my bakery",
        "sport": "What is my favourite sport?",
        "locker": "what is the code of my locker?",
        "horse": "What's the name of my horse?",
    }
    replies = [
        generate_greedily(model, tokenizer, [*history.messages(), {"role": "user", "content": question}])
        for subject, question in questions.items()
        if subject not in told
    ]
    assert len(replies) >= 4
    assert sum(reply == UNKNOWN_ANSWER for reply in replies) >= 0.75 * len(replies)


def test_reported_recall_is_of_this_model(model: PreTrainedModel) -> None:
    report = json.loads((embedded_model_path().parent / "recall.json").read_text())
    assert report["num_parameters"] == model.num_parameters()
    assert report["recall"]["by_kind"]["ask"]["exact"] > 0.85
