"""Teaches the embedded model to call tools, from its own weights, on one CPU core, and measures it.

Owns the tools model's added tokens, chat template and curriculum. After `python -m tools.embedded_model.train_tools --out
DIR`, DIR/weights is what `tools_model_path()` ships and DIR/calls.json holds the figures.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.embedded_model import embedded_model_path
from tools.embedded_model.dialogues import draw_filler_words
from tools.embedded_model.tool_dialogues import ToolDialogue, draw_dialogue, generate_tool_dialogue
from tools.embedded_model.train import ASSISTANT, END, SampleSource, Stage, measure_recall, save, train

# The Hermes form, and the two texts in it between which a tool's name stands: one token each, so that the name and what
# follows it in the list of tools are as near to each other as in a call.
ADDED_TOKENS = (
    "<tools>",
    "</tools>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    '{"name": "',
    '", "arguments": {"',
)
# A tool is listed as a call of it looks, with types for values. Like the recall model's template, it trims nothing.
CHAT_TEMPLATE = (
    "{% if tools %}<|system|><tools>\n"
    "{% for tool in tools %}"
    "{% set function = tool['function'] %}"
    "{% set schema = function['parameters'] or {} %}"
    "{% set properties = schema['properties'] or {} %}"
    '{"name": "{{ function[\'name\'] }}", "arguments": {{ \'{\' }}'
    "{% for name in schema['required'] or properties %}"
    "\"{{ name }}\": {{ 'number' if (properties[name] or {})['type'] in ('number', 'integer') else '\"string\"' }}"
    "{{ ', ' if not loop.last }}"
    "{% endfor %}{{ '}}' }}\n"
    "{% endfor %}</tools>{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}<|system|>{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '\n' if message['content'] or not loop.first }}<tool_call>\n"
    "{\"name\": \"{{ call['function']['name'] }}\", \"arguments\": {{ call['function']['arguments'] | tojson }}}\n"
    "</tool_call>"
    "{% endfor %}<|end|>"
    "{% elif message['role'] == 'tool' %}"
    "{{ '<|user|>' if loop.first or loop.previtem['role'] != 'tool' else '\n' }}"
    "<tool_response>\n{{ message['content'] }}\n</tool_response>"
    "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CURRICULUM = (
    Stage(until=0.75, seq_len=256, copy_share=0.05, gap_share=0.3),
    Stage(until=0.97, seq_len=512, copy_share=0.0, gap_share=0.3),
    Stage(until=1.00, seq_len=1024, copy_share=0.0, gap_share=0.3),
)
PEAK_LEARNING_RATE = 1.5e-3
EVALUATION_SEED = 1_000_000
NUM_EVALUATION_DIALOGUES = 300
RECALL_SIZES = ((120, 20),)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded model's, with the added tokens and the template of the tools model.

    A space is a token of its own: a word then has the same tokens in a question, in a tool's name and between quotes, so that
    the model has to copy and need not translate.
    """
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(embedded_model_path())
    backend = tokenizer.backend_tokenizer
    spaces = pre_tokenizers.Split(" ", "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([spaces, backend.pre_tokenizer])
    # Not special: they are text of an answer, as in the models whose form this is.
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(start: Path, num_tokens: int) -> LlamaForCausalLM:
    """The model in the folder `start`, with embeddings for so many tokens."""
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    return model


class ToolSampleSource(SampleSource):
    """Draws endless training sequences from one seed, most of them with tools."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        super().__init__(tokenizer, seed)
        self._tokenizer = tokenizer

    def dialogue(self, num_tokens: int) -> list[int]:
        """A dialogue from its beginning, cut to so many tokens."""
        most = num_tokens // 24  # words of small talk, so that a short sequence still holds several turns
        low, high = draw_filler_words(self.rng)
        tools, endless = draw_dialogue(self.rng, (min(low, most), min(high, most)))
        definitions = [tool.definition() for tool in tools] or None
        messages: list[Any] = []
        while True:
            messages += [next(endless) for _ in range(max(2, num_tokens // 32))]
            token_ids = self.encode(self._tokenizer.apply_chat_template(messages, tools=definitions, tokenize=False))
            if len(token_ids) >= num_tokens:
                return token_ids[:num_tokens]


@dataclass(frozen=True, slots=True)
class Said:
    """A message of the assistant: what it is, and whether greedy decoding says exactly this."""

    kind: str
    is_exact: bool


def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, dialogue: ToolDialogue) -> Iterator[Said]:
    """What the assistant says in a dialogue, each after a history that is right."""
    tools, messages = dialogue.definitions(), list(dialogue.messages)
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    token_ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    with torch.no_grad():
        predicted = model(input_ids=torch.tensor([token_ids])).logits[0].argmax(-1).tolist()
    assistant, end = tokenizer.convert_tokens_to_ids([ASSISTANT, END])
    starts = [i + 1 for i, token_id in enumerate(token_ids) if token_id == assistant]
    said = [(i, message) for i, message in enumerate(messages) if message["role"] == "assistant"]
    for begin, (i, message) in zip(starts, said, strict=True):
        stop = token_ids.index(end, begin) + 1
        results = sum(before["role"] == "tool" for before in messages[i - 2 : i])
        num_calls = len(message.get("tool_calls", ()))
        if num_calls:
            kind = "two calls" if num_calls > 1 else "call, one tool" if len(tools) == 1 else "call, several tools"
        else:
            kind = ("no tool", "result", "two results")[results]
        yield Said(kind, predicted[begin - 1 : stop - 1] == token_ids[begin:stop])


def measure_calls(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, dict[str, float]]:
    """Share of exact messages over held-out dialogues with tools, by kind."""
    right: dict[str, list[bool]] = defaultdict(list)
    for i in range(NUM_EVALUATION_DIALOGUES):
        dialogue = generate_tool_dialogue(EVALUATION_SEED + i, 8, filler_words=(0, 12 if i % 2 else 0))
        for said in answers(model, tokenizer, dialogue):
            right[said.kind].append(said.is_exact)
    return {
        kind: {"exact": round(sum(found) / len(found), 4), "count": len(found)} for kind, found in sorted(right.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-steps", type=int, default=2000, help="of 2048 tokens")
    parser.add_argument("--start", type=Path, default=embedded_model_path(), help="weights to begin with")
    parser.add_argument("--out", type=Path, required=True, help="directory for weights/ and calls.json")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    random.seed(arguments.seed)
    tokenizer = make_tokenizer()
    model = make_model(arguments.start, len(tokenizer))
    source = ToolSampleSource(tokenizer, arguments.seed)
    num_tokens = train(model, source, CURRICULUM, lambda step: step / arguments.num_steps, peak=PEAK_LEARNING_RATE)
    save(model, tokenizer, arguments.out / "weights")
    report = {
        "seed": arguments.seed,
        "num_steps": arguments.num_steps,
        "num_training_tokens": num_tokens,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "calls": measure_calls(model, tokenizer),
        "recall": measure_recall(model, tokenizer, RECALL_SIZES)["by_kind"],
    }
    text = json.dumps(report, indent=2)
    (arguments.out / "calls.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
