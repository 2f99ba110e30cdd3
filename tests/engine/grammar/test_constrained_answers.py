"""Answers of a model that would say anything, held to a grammar: what is complete is right, whatever happens on the way."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from jsonschema import Draft202012Validator, FormatChecker

from engine.core.grammar import GrammarSpec
from engine.core.request import FinishReason, SamplingParams
from engine.core.thinking import ThinkingLimit, ThinkingSpan
from engine.grammar.guidance import GuidanceCompiler
from engine.grammar.store import GrammarStore
from engine.step_loop import LookAhead
from engine.text.tokenizer import Tokenizer
from tests.engine.grammar.random_schemas import random_schema
from tests.nightly import IS_NIGHTLY

CLOSING = "</think>"
EOS = 1  # of the tiny models' tokenizer
NUM_SCHEMAS = 1000 if IS_NIGHTLY else 240
NUM_EVICTED = 250 if IS_NIGHTLY else 16  # four of five have a schema
MAX_TOKENS = 300


@pytest.fixture
def make_constrained(tiny_model, make_driver) -> Callable:
    """Options -> Driver whose executor knows grammars."""

    def make(family: str = "llama", **options: object):
        driver = make_driver(tiny_model(family), **{"chunk_size": 8, "max_model_len": 400, **options})
        tokenizer = Tokenizer(str(tiny_model(family)))
        vocabulary = tokenizer.vocabulary(driver.executor.facts.model.vocab_size, (EOS,))
        driver.executor.use_grammars(GrammarStore(lambda: GuidanceCompiler(vocabulary), tokenizer.token_bytes))
        return driver

    return make


def sampling(schema: dict | GrammarSpec, seed: int, **options) -> SamplingParams:
    spec = schema if isinstance(schema, GrammarSpec) else GrammarSpec.json_schema(schema)
    options = {"temperature": 2.0, "max_tokens": MAX_TOKENS, "seed": seed, **options}
    return SamplingParams(grammar=spec, **options)


def limited(params: SamplingParams, tokenizer: Tokenizer, max_tokens: int) -> SamplingParams:
    """The same for an answer that begins within thinking; a grammar holds behind it."""
    limit = ThinkingLimit(ThinkingSpan("", CLOSING), max_tokens, tokenizer.encode_marker(CLOSING))
    grammar = None if params.grammar is None else replace(params.grammar, begins_behind=CLOSING)
    return replace(params, thinking_limit=limit, grammar=grammar)


def check_answer(schema: dict, text: str) -> None:
    value = json.loads(text)
    errors = [e.message for e in Draft202012Validator(schema, format_checker=FormatChecker()).iter_errors(value)]
    assert errors == [], (schema, text)


def test_every_complete_answer_is_valid(make_constrained, tiny_model):
    """Random schemas, all ways of sampling, 48 answers at the same time."""
    rng = random.Random("schemas")
    driver = make_constrained(num_gpu_blocks=3000, max_num_seqs=48, max_num_batched_tokens=512)
    decode = Tokenizer(str(tiny_model("llama"))).decode
    schemas = {f"r{i}": random_schema(rng) for i in range(NUM_SCHEMAS)}
    ways = [
        {},
        {"temperature": 0.0},
        {"top_k": 5},
        {"top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"logprobs": 2},
    ]
    for number, (request_id, schema) in enumerate(schemas.items()):
        prompt = [rng.randrange(3, 250) for _ in range(5)]
        driver.add(request_id, prompt, None, sampling(schema, number, **rng.choice(ways)), eos_token_ids=(EOS,))
    driver.run()
    complete = [request_id for request_id in schemas if driver.finished[request_id] is FinishReason.STOP]
    for request_id in complete:
        *tokens, end = driver.tokens(request_id)
        assert end == EOS
        check_answer(schemas[request_id], decode(tokens))
    assert len(complete) > 0.9 * len(schemas)


@pytest.mark.parametrize("look_ahead", [LookAhead.DRAFT, LookAhead.LAUNCH])
def test_answers_are_the_same_whatever_is_evicted_and_suspended(look_ahead, make_constrained, tiny_model):
    """Many at once in tiers for a few of them; the other engine keeps nothing and has room for all.

    Of every second request the beginning of the answer came from elsewhere, as after the loss of a replica; some
    have a limit of thinking.
    """
    rng = random.Random(f"evictions, {look_ahead.name}")
    decode = Tokenizer(str(tiny_model("llama"))).decode
    options = {"max_num_batched_tokens": 48, "max_num_seqs": 6, "max_model_len": 288}
    kept = make_constrained(num_gpu_blocks=36, num_cpu_blocks=20, decode_reserve=0.03, **options)
    kept.loop.look_ahead = look_ahead
    fresh = make_constrained(num_gpu_blocks=600, mode="stateless", max_num_seqs=1)
    tokenizer = Tokenizer(str(tiny_model("llama")))
    requests, schemas = {}, {}
    for number in range(NUM_EVICTED):
        grammar = None if number % 5 == 4 else random_schema(rng)
        params = SamplingParams(temperature=2.0, max_tokens=60, seed=number)
        if grammar is not None:
            schemas[f"r{number}"] = grammar
            params = sampling(grammar, number, max_tokens=200, logprobs=2 if number % 3 == 0 else None)
        if grammar is None or number % 8 == 0:
            params = limited(params, tokenizer, 9)
        prompt = [rng.randrange(3, 250) for _ in range(rng.randint(3, 60))]
        fresh.add(f"r{number}", prompt, None, params, eos_token_ids=(EOS,))
        fresh.run()
        requests[f"r{number}"] = (prompt, params)
    for number, (request_id, (prompt, params)) in enumerate(requests.items()):
        whole = fresh.tokens(request_id)
        begun = whole[: len(whole) // 2] if number % 2 else []
        kept.add(request_id, prompt, f"c{number % 7}", params, eos_token_ids=(EOS,), output_token_ids=begun)
        kept.outputs[request_id] = list(fresh.outputs[request_id][: len(begun)])
        for _ in range(rng.randint(0, 4)):
            kept.step()
    kept.run()
    kept.core.check_integrity()
    for request_id, (_, params) in requests.items():
        assert kept.tokens(request_id) == fresh.tokens(request_id)
        if params.thinking_limit is not None:
            thought = tokenizer.decode(kept.tokens(request_id)[: 9 + len(params.thinking_limit.closing_ids) + 3])
            assert CLOSING in thought
    complete = [request_id for request_id in schemas if kept.finished[request_id] is FinishReason.STOP]
    for request_id in complete:
        check_answer(schemas[request_id], decode(kept.tokens(request_id)[:-1]).rpartition(CLOSING)[2])
    assert len(complete) > 0.6 * len(schemas)
    stats = kept.core.get_statistics()
    assert stats["num_suspensions"] > 0
    assert sum(stats["evictions"].values()) > 10
    if look_ahead is LookAhead.LAUNCH:
        assert stats["num_steps_ahead"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with GPUs each rank takes one")
def test_ranks_that_do_not_sample_need_no_grammars(make_constrained):
    sharded = make_constrained(num_gpu_blocks=60, tensor_parallel_size=2)
    whole = make_constrained(num_gpu_blocks=60)
    rng = random.Random("ranks")
    for number in range(4):
        params = sampling(random_schema(rng), number, max_tokens=40)
        for driver in (sharded, whole):
            driver.add(f"r{number}", [7, 8, number], None, params, eos_token_ids=(EOS,))
    for driver in (sharded, whole):
        driver.run()
    assert [sharded.tokens(f"r{i}") for i in range(4)] == [whole.tokens(f"r{i}") for i in range(4)]
