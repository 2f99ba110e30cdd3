"""Hints, learned pauses and prepared contexts in a whole engine, with the embedded model: no answer changes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import pytest

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.core.retention import KeptSpan, RetentionHint
from engine.generation import Generation
from engine.text.output import OutputDelta, merge_deltas
from engine.text.prompt import TokenPrompt

GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


@pytest.fixture
async def make_engine() -> AsyncIterator[Callable[..., AsyncEngine]]:
    engines: list[AsyncEngine] = []

    def make(**options: object) -> AsyncEngine:
        sizes = {"num_gpu_blocks": 64, "num_cpu_blocks": 0, "chunk_size": 8, "max_model_len": 256, "num_threads": 1}
        engines.append(AsyncEngine(EngineConfig(**{**sizes, **options})))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.check_integrity()
        await engine.shutdown()


async def answer(engine: AsyncEngine, name: str, session: str, prompt: list[int], **options: object) -> OutputDelta:
    generation = Generation(name, session, TokenPrompt(tuple(prompt)), GREEDY, **options)
    return merge_deltas([delta async for delta in engine.generate(generation)])


def tokens(number: int, length: int) -> list[int]:
    return [(7 * i + 31 * number) % 200 + 5 for i in range(length)]


def some_hint(rng: random.Random) -> RetentionHint | None:
    start = rng.randrange(40)
    return rng.choice(
        [
            None,
            RetentionHint.of(release=True),
            RetentionHint.of(ttl_s=rng.choice([0.01, 60.0])),
            RetentionHint.of(expected_return_s=rng.choice([0.001, 5.0])),
            RetentionHint((KeptSpan(start, start + 20, 100, 60.0),), rest_priority=rng.choice([0, 50])),
        ]
    )


@pytest.mark.parametrize("mode", ["client", "learned"])
async def test_no_answer_depends_on_what_is_said_of_its_context(mode, make_engine):
    """Four conversations on tiers for less than two, with any hints, between turns too, and contexts that are prepared."""
    rng = random.Random(5)
    kept = make_engine(kv_hints=mode, num_gpu_blocks=16, num_cpu_blocks=4, max_model_len=112)
    stateless = make_engine(mode="stateless", num_gpu_blocks=16, max_model_len=112)
    contexts = {f"s{number}": tokens(number, 24) for number in range(4)}
    for turn in range(4):
        for session in sorted(contexts, key=lambda _: rng.random()):
            name, context = f"{session}.{turn}", contexts[session]
            if rng.random() < 0.3:
                warmed = await answer(kept, f"{name} warm", session, context, prewarms=True)
                assert (warmed.finish_reason, warmed.token_ids, warmed.num_output_tokens) == ("stop", (), 0)
            elif rng.random() < 0.3 and turn:
                await kept.retain(f"local\n{session}", some_hint(rng) or RetentionHint.of(priority=90))
            mine = await answer(kept, name, session, context, retention=some_hint(rng))
            reference = await answer(stateless, name, session, context)
            assert mine.token_ids == reference.token_ids
            contexts[session] = [*context, *mine.token_ids, *tokens(turn, 8)]


async def test_a_hint_holds_for_later_turns_until_it_is_released(make_engine):
    engine = make_engine(kv_hints="client")
    assert await engine.cache_state("local\ns") is None
    first = await answer(engine, "1", "s", tokens(1, 40))
    assert first.retention is None, "nothing was said"
    outcome = await engine.retain("local\ns", RetentionHint.of(ttl_s=60.0))
    assert (outcome.outcome, outcome.num_tokens) == ("accepted", 44)
    context = [*tokens(1, 40), *first.token_ids, 9, 9]
    second = await answer(engine, "2", "s", context)
    assert (second.retention.outcome, second.retention.num_tokens) == ("accepted", 51)
    assert second.stats.num_written_tokens == 7
    state = await engine.cache_state("local\ns")
    assert (state.num_tokens, state.tokens_by_tier, state.hint) == (52, {"gpu": 51}, RetentionHint.of(ttl_s=60.0))
    assert engine.get_statistics()["retention"]["num_kept_tokens"] == 56
    await engine.retain("local\ns", RetentionHint.of(release=True))
    assert engine.get_statistics()["retention"]["num_kept_tokens"] == 0
    assert (await answer(engine, "3", "s", [*context, *second.token_ids, 9])).retention is None


async def test_hints_are_refused_unless_they_are_taken(make_engine):
    engine = make_engine()
    answered = await answer(engine, "1", "s", tokens(1, 40), retention=RetentionHint.of(ttl_s=60.0))
    assert answered.retention.outcome == "refused"
    assert (await engine.retain("local\ns", RetentionHint.of(ttl_s=60.0))).outcome == "refused"
    assert (await engine.cache_state("local\ns")).hint is None
    assert engine.get_statistics()["retention"]["refused"] == 2


async def test_what_is_missing_of_an_expected_conversation_is_computed_while_nothing_else_is_to_be_done(make_engine):
    engine = make_engine(kv_hints="client")
    first = await answer(engine, "1", "s", tokens(1, 100), retention=RetentionHint.of(expected_return_s=25.0))
    await engine.hold_back(gpu_blocks_left=4)
    await engine.hold_back()
    for _ in range(500):
        state = await engine.cache_state("local\ns")
        if state.tokens_by_tier == {"gpu": 104}:
            break
        await asyncio.sleep(0.01)
    second = await answer(engine, "2", "s", [*tokens(1, 100), *first.token_ids, 9], explains_misses=True)
    assert second.num_cached_tokens == 104
    assert [(miss.start, miss.end, miss.reason) for miss in second.misses] == [(104, 106, "new")]


async def test_why_a_prompt_was_computed(make_engine):
    engine = make_engine()
    prompt = tokens(1, 100)
    new = await answer(engine, "1", "s", prompt, explains_misses=True)
    assert [(miss.start, miss.end, miss.reason) for miss in new.misses] == [(0, 100, "new")]
    await engine.hold_back(gpu_blocks_left=4)
    await engine.hold_back()
    again = await answer(engine, "2", "s", [*prompt, *new.token_ids], explains_misses=True)
    evicted = again.misses[0]
    assert (evicted.start, evicted.reason) == (0, "gpu_dropped")
    assert evicted.time_s is not None
    assert evicted.end % 8 == 0
