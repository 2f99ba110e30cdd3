"""Answers with guesses that are verified are those without, token for token, whatever else happens to their requests."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
import torch

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.grammar import GrammarSpec
from engine.core.request import SamplingParams
from engine.generation import Generation
from engine.step_loop import LookAhead
from engine.text.output import OutputDelta, merge_deltas
from engine.text.prompt import ChatPrompt

TIE = 1e-4
SPECULATIVE = {"method": "ngram", "num_tokens": 6}
# Answers of few different tokens, so that rows of them come again.
FEW = tuple((token_id, 25.0) for token_id in range(60, 66))
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, logprobs=2, ignore_eos=True, logit_bias=FEW)
# Every way in which a token depends on those before it, or on its place.
KINDS = (
    GREEDY,
    replace(GREEDY, repetition_penalty=1.2, frequency_penalty=0.3),
    replace(GREEDY, presence_penalty=0.5, logit_bias=(*FEW[:4], (64, 26.0), (65, -100.0))),
    replace(GREEDY, min_tokens=9, stop_token_ids=(60, 61, 62)),
    replace(GREEDY, temperature=0.7, seed=5),
    replace(GREEDY, temperature=1.0, seed=6, top_p=0.8, top_k=20),
    replace(GREEDY, stop_token_ids=(63,)),
)


def repetitive(rng: random.Random, num_tokens: int) -> list[int]:
    """A prompt that says the same again and again, with changes."""
    phrase = rng.choices(range(3, 250), k=7)
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        tokens += phrase if rng.random() < 0.8 else rng.choices(range(3, 250), k=3)
    return tokens[:num_tokens]


def assert_same(ours: list, theirs: list) -> int:
    """Up to a tie of the two best logits. Returns whether there was one."""
    for mine, other in zip(ours, theirs, strict=False):
        if mine.token_id != other.token_id:
            margin = other.logprobs.top[0][1] - other.logprobs.top[1][1]
            assert margin < TIE, f"{mine} != {other}"
            return 1
        assert mine.num_output_tokens == other.num_output_tokens
        assert mine.logprobs.chosen == pytest.approx(other.logprobs.chosen, abs=1e-3)
    assert len(ours) == len(theirs)
    assert ours[-1].finish_reason == theirs[-1].finish_reason
    return 0


@pytest.mark.parametrize(
    ("family", "mode", "look_ahead"),
    [
        ("llama", "pensieve", LookAhead.LAUNCH),
        ("qwen3", "pensieve", LookAhead.DRAFT),
        ("mistral", "pensieve", LookAhead.NOTHING),
        ("gemma2", "pensieve", LookAhead.DRAFT),
        ("gpt2", "stateless", LookAhead.LAUNCH),
        ("opt", "pensieve", LookAhead.DRAFT),
    ],
)
def test_answers_are_those_without_guesses(family, mode, look_ahead, tiny_model, make_driver):
    """Conversations over tiny tiers: evictions, suspensions, aborts, chunks that end within guesses; in both modes."""
    rng = random.Random(family)
    options = {"chunk_size": 4, "max_num_batched_tokens": 48, "max_num_seqs": 5, "max_model_len": 160}
    guessing = make_driver(
        tiny_model(family),
        num_gpu_blocks=64 if mode == "pensieve" else 52,
        num_cpu_blocks=48,
        decode_reserve=0.02,
        mode=mode,
        speculative=SPECULATIVE,
        **options,
    )
    plain = make_driver(tiny_model(family), num_gpu_blocks=400, mode="stateless", **options)
    guessing.loop.look_ahead = look_ahead
    histories = {f"c{i}": repetitive(rng, 30) for i in range(8)}
    prompts: dict[str, tuple[list[int], SamplingParams]] = {}
    running: dict[str, str] = {}
    num_turns = 0
    while num_turns < 16 or running or guessing.loop.in_flight:
        idle = [c for c in histories if c not in running.values()]
        if num_turns < 16 and idle and rng.random() < 0.5:
            conversation = rng.choice(idle)
            histories[conversation] = histories[conversation][-90:] + repetitive(rng, rng.randint(1, 20))
            request_id, num_turns = f"r{num_turns}", num_turns + 1
            sampling = rng.choice(KINDS)
            prompts[request_id] = histories[conversation][:], sampling
            guessing.add(request_id, histories[conversation], conversation, sampling)
            running[request_id] = conversation
        victim = rng.choice(list(running)) if running and rng.random() < 0.02 else None
        for output in guessing.step(victim):
            if output.finish_reason is not None:
                conversation = running.pop(output.request_id)
                histories[conversation] = histories[conversation] + guessing.tokens(output.request_id)
        guessing.core.check_integrity()
        for request_id in [name for name in running if name not in guessing.core._requests]:
            del running[request_id], prompts[request_id]
    num_ties = 0
    for request_id, (prompt, sampling) in prompts.items():
        plain.add(request_id, prompt, None, sampling)
        plain.run()
        num_ties += assert_same(guessing.outputs[request_id], plain.outputs[request_id])
    assert num_ties <= 1
    stats = guessing.core.get_statistics()
    assert 0 < stats["num_accepted_tokens"] < stats["num_guessed_tokens"]
    assert stats["num_suspensions"] > 0
    assert plain.core.get_statistics()["num_guessed_tokens"] == 0


@pytest.mark.parametrize("sampling", [GREEDY, replace(GREEDY, temperature=0.7, seed=5)], ids=["greedy", "drawn"])
def test_what_one_engine_began_with_guesses_another_ends_with_guesses(sampling, tiny_model, make_driver):
    """A replica is lost in the middle of an answer; what the client has got by then may end within a row of guesses."""
    options = {"chunk_size": 4, "max_model_len": 160, "num_gpu_blocks": 100}
    prompt = repetitive(random.Random(2), 40)
    plain = make_driver(tiny_model("llama"), **options)
    plain.generate("answer", prompt, sampling=sampling)
    lost = make_driver(tiny_model("llama"), speculative=SPECULATIVE, **options)
    lost.add("answer", prompt, None, sampling)
    while len(lost.outputs["answer"]) < 12:
        lost.step()
    assert lost.core.get_statistics()["num_accepted_tokens"] > 0
    for num_told in (6, 11):
        other = make_driver(tiny_model("llama"), speculative=SPECULATIVE, **options)
        other.add("answer", prompt, None, sampling, output_token_ids=lost.tokens("answer")[:num_told])
        other.run()
        assert assert_same(lost.outputs["answer"][:num_told] + other.outputs["answer"], plain.outputs["answer"]) == 0
        assert other.core.get_statistics()["num_accepted_tokens"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with GPUs each rank takes one")
def test_ranks_of_a_group_verify_what_rank_0_chooses(tiny_model, make_driver):
    """They sample nothing, and are told how many of the guesses came true by what is computed next."""
    rng = random.Random(1)
    options = {"chunk_size": 4, "max_num_seqs": 4, "max_model_len": 160, "num_gpu_blocks": 100}
    group = make_driver(tiny_model("llama"), tensor_parallel_size=2, speculative=SPECULATIVE, **options)
    plain = make_driver(tiny_model("llama"), **options)
    for number in range(2):
        prompt = repetitive(rng, 40)
        for driver in (group, plain):
            driver.add(f"greedy {number}", prompt, None, GREEDY)
            driver.add(f"drawn {number}", prompt, None, replace(GREEDY, temperature=1.0, seed=3))
    group.run()
    plain.run()
    assert sum(assert_same(group.outputs[name], plain.outputs[name]) for name in plain.outputs) <= 1
    assert group.core.get_statistics()["num_accepted_tokens"] > 0


JSON = GrammarSpec("regex", '\\[("(ab|ac)+", )*"x"\\]')


def test_with_a_grammar_a_limit_of_thinking_and_stop_strings_answers_are_the_same():
    """Through the whole engine, where text and masks are made; what ends within guesses ends there, and is counted so."""

    async def answers(**options: object) -> tuple[list[OutputDelta], dict]:
        engine = AsyncEngine(
            EngineConfig.from_options({"model": "embedded", "dtype": "float32", "num_threads": 1, **options})
        )
        base = SamplingParams(temperature=0.0, max_tokens=40)
        kinds = [
            base,
            replace(base, ignore_eos=True),
            replace(base, ignore_eos=True, stop=("Mia",)),
            replace(base, ignore_eos=True, stop=("is c", "zzz"), min_tokens=3),
            # Its last token is chosen again in a step of its own, and is the same.
            *(replace(base, ignore_eos=True, stop=("zzz",), temperature=4.0, seed=seed) for seed in range(4)),
            replace(base, grammar=JSON),
            replace(base, grammar=JSON, temperature=1.0, seed=3),
            replace(base, grammar=GrammarSpec.choice(["your cat is called Mia.", "your dog"]), logprobs=1),
        ]
        prompt = ChatPrompt((("user", "My cat is called Mia."),))
        try:
            given = []
            for turn in range(2):  # the second time, the first answers are there to be quoted
                for number, sampling in enumerate(kinds):
                    generation = Generation(f"{turn}.{number}", None, prompt, sampling)
                    given.append(merge_deltas([delta async for delta in engine.generate(generation)]))
            await engine.check_integrity()
            return given, engine.get_statistics()
        finally:
            await engine.shutdown()

    plain, _ = asyncio.run(answers())
    guessing, statistics = asyncio.run(answers(speculative=SPECULATIVE))
    for ours, theirs in zip(guessing, plain, strict=True):
        assert (ours.text, ours.token_ids, ours.finish_reason) == (theirs.text, theirs.token_ids, theirs.finish_reason)
        assert ours.num_output_tokens == theirs.num_output_tokens
        assert ours.stats.num_output_tokens == theirs.stats.num_output_tokens
        assert (ours.stop_string, len(ours.logprobs)) == (theirs.stop_string, len(theirs.logprobs))
    assert statistics["num_accepted_tokens"] > 20
    assert sum(delta.num_accepted_tokens for delta in guessing) == statistics["num_accepted_tokens"]
    assert sum(delta.num_guessed_tokens for delta in guessing) == statistics["num_guessed_tokens"]
