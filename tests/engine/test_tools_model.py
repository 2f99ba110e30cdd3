"""The shipped model that calls tools: what it says by itself, by plain transformers."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from engine.embedded_model import TOOLS_MODEL_NAME, tools_model_path
from engine.model_files import default_model_name, is_hub_id, model_location
from engine.text.tokenizer import Tokenizer
from tools.embedded_model.tool_dialogues import generate_tool_dialogue
from tools.embedded_model.train_tools import ADDED_TOKENS, CHAT_TEMPLATE, answers


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tools_model_path())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tools_model_path(), dtype=torch.float32).eval()


def test_an_option_names_it(model: PreTrainedModel) -> None:
    assert model_location("embedded-tools") == str(tools_model_path())
    assert default_model_name("embedded-tools") == TOOLS_MODEL_NAME
    assert not is_hub_id("embedded-tools")
    assert f"pensieve-tools-{model.num_parameters() / 1e6:.1f}m" == TOOLS_MODEL_NAME


def test_the_template_is_the_one_that_the_script_writes(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert all(len(tokenizer(token).input_ids) == 1 for token in ADDED_TOKENS)


def test_tools_are_listed_as_calls_look() -> None:
    dialogue = generate_tool_dialogue(5, 4)
    chat = Tokenizer(str(tools_model_path())).chat
    assert chat.format_name == "hermes"
    assert chat.traits.knows_tools
    assert chat.traits.writes_calls
    assert chat.traits.has_parallel_calls
    assert dialogue.tools


def test_parameters_that_are_not_required_are_not_listed(tokenizer: PreTrainedTokenizerFast) -> None:
    parameters = {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}, "city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    plain = {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}}
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tools=[tool, plain], tokenize=False)
    assert text == (
        '<|system|><tools>\n{"name": "f", "arguments": {"city": "string", "days": number}}\n'
        '{"name": "g", "arguments": {}}\n</tools><|user|>x'
    )


def test_a_word_has_the_same_tokens_wherever_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    word = tokenizer("Glandkoll").input_ids
    for text in ("in Glandkoll?", '"Glandkoll"', "get_Glandkoll"):
        ids = tokenizer(text).input_ids
        assert any(ids[i : i + len(word)] == word for i in range(len(ids)))


def test_it_calls_and_answers_rightly(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    right: dict[str, list[bool]] = defaultdict(list)
    for seed in range(3_000_000, 3_000_090):
        dialogue = generate_tool_dialogue(seed, 4)
        if len(dialogue.tools) == 1:
            for said in answers(model, tokenizer, dialogue):
                right[said.kind].append(said.is_exact)
    for kind in ("call, one tool", "result"):
        assert len(right[kind]) >= 8
        assert sum(right[kind]) >= 0.85 * len(right[kind])


def test_reported_figures_are_of_this_model(model: PreTrainedModel) -> None:
    report = json.loads((tools_model_path().parent / "calls.json").read_text())
    assert report["num_parameters"] == model.num_parameters()
    assert report["calls"]["call, one tool"]["exact"] > 0.95
