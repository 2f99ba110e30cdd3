"""An answer that one engine began and another one ends is the answer of one engine.

Tokens, text and log-probabilities, greedy and sampled, wherever it was cut.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.generation import Generation
from engine.tenant import Tenant
from engine.text.output import OutputDelta, merge_deltas
from engine.text.prompt import AnswerBeginning, ChatPrompt
from tests.engine.test_equivalence import assert_same_tokens

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
PENALISED = SamplingParams(
    temperature=1.1,
    top_p=0.9,
    seed=7,
    max_tokens=12,
    repetition_penalty=1.3,
    frequency_penalty=0.4,
    logit_bias=((30, 4.0), (40, -100.0)),
    ignore_eos=True,
    logprobs=2,
)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("sampling", [GREEDY, PENALISED], ids=["greedy", "sampled"])
def test_wherever_it_is_cut(family, sampling, tiny_model, make_driver) -> None:
    options = {"chunk_size": 8, "max_num_batched_tokens": 16, "max_num_seqs": 4, "max_model_len": 96}
    whole = make_driver(tiny_model(family), num_gpu_blocks=40, **options)
    prompt = [(7 * i + 3) % 250 + 2 for i in range(29)]
    answer = whole.generate("whole", prompt, sampling=sampling)
    num_ties = 0
    for cut in (1, 3, 8, 11):
        # An engine that knows nothing, and one whose cache has the prompt of another request.
        for warm in (False, True):
            other = make_driver(tiny_model(family), num_gpu_blocks=40, **options)
            if warm:
                other.generate("before", prompt[:20], sampling=GREEDY)
            other.add("whole", prompt, sampling=sampling, output_token_ids=answer[:cut])
            other.run()
            reference = [output for output in whole.outputs["whole"] if output.num_output_tokens > cut]
            assert [o.num_output_tokens for o in other.outputs["whole"]] == [o.num_output_tokens for o in reference]
            expected, whole.outputs["rest"] = whole.outputs["whole"], reference
            other.outputs["rest"] = other.outputs["whole"]
            num_ties += assert_same_tokens(other, whole, "rest")
            assert whole.outputs["whole"] is expected
            assert other.cached["whole"] == (16 if warm else 0)
            other.core.check_integrity()
    assert num_ties <= 1


async def collect(engine: AsyncEngine, messages, sampling, name: str, **options) -> list[OutputDelta]:
    generation = Generation(name, options.pop("session_id", None), ChatPrompt(messages), sampling, **options)
    return [delta async for delta in engine.generate(generation)]


@pytest.fixture
async def engines():
    config = {"num_gpu_blocks": 128, "chunk_size": 8, "max_model_len": 512, "num_threads": 1, "dtype": "float32"}
    both = [AsyncEngine(EngineConfig.from_options(config)) for _ in range(2)]
    yield both
    for engine in both:
        await engine.shutdown()


MESSAGES = (("user", "my cat is called Mia"), ("assistant", "i will remember."), ("user", "what is my cat called?"))
STOPPING = SamplingParams(temperature=0.0, max_tokens=40, stop=("called M", "zzz"))


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0, max_tokens=40),
        SamplingParams(temperature=1.5, seed=3, max_tokens=40),
        STOPPING,
        replace(STOPPING, min_tokens=3),
    ],
    ids=["greedy", "sampled", "stop string", "stop string, at least 3 tokens"],
)
async def test_text_goes_on_where_it_was_cut(engines, sampling) -> None:
    first, second = engines
    deltas = await collect(first, MESSAGES, sampling, "whole", session_id="s")
    # Token by token, whatever came together.
    whole = merge_deltas(deltas)
    assert len(whole.token_ids) > 3
    for cut in range(1, len(whole.token_ids)):
        # What has reached the client is not more than the text of those tokens, and may be less.
        begun = merge_deltas(await _first(first, cut, sampling))
        assert begun.token_ids == whole.token_ids[:cut]
        rest = merge_deltas(
            await collect(
                second,
                MESSAGES,
                sampling,
                f"rest-{cut}",
                session_id=f"s{cut}",
                beginning=AnswerBeginning(begun.token_ids, len(begun.text)),
            )
        )
        assert begun.text + rest.text == whole.text
        assert begun.token_ids + rest.token_ids == whole.token_ids
        assert (rest.finish_reason, rest.num_output_tokens) == (whole.finish_reason, whole.num_output_tokens)
        assert rest.num_prompt_tokens == whole.num_prompt_tokens
        assert sum(rest.cached_by_tier.values()) == rest.num_cached_tokens
        assert rest.transcript == whole.transcript
    await second.check_integrity()


async def _first(engine: AsyncEngine, num_tokens: int, sampling) -> list[OutputDelta]:
    """The deltas of the first tokens, one delta each."""
    deltas: list[OutputDelta] = []
    generator = engine.generate(Generation(f"begun-{num_tokens}", None, ChatPrompt(MESSAGES), sampling))
    try:
        async for delta in generator:
            deltas.append(delta)
            if sum(len(d.token_ids) for d in deltas) >= num_tokens:
                break
    finally:
        await generator.aclose()
    merged = merge_deltas(deltas)
    if len(merged.token_ids) > num_tokens:  # some came together: their text may be more than that of the first ones
        detokenizer = engine._tokenizer.detokenizer(sampling.stop)
        for token_id in merged.token_ids[:num_tokens]:
            detokenizer.append(token_id, may_stop=False)
        return [OutputDelta(detokenizer.take_text(final=False), merged.token_ids[:num_tokens])]
    return deltas


async def test_a_history_that_was_told_is_not_tokenised_again(engines) -> None:
    first, second = engines
    greedy = SamplingParams(temperature=0.0, max_tokens=40)
    answer = merge_deltas(await collect(first, MESSAGES, greedy, "1", session_id="s"))
    assert answer.transcript is not None
    assert answer.transcript.token_ids[-len(answer.token_ids) :].tolist() == list(answer.token_ids)
    longer = (*MESSAGES, ("assistant", answer.text), ("user", "and again: what is my cat called?"))

    # One engine remembers; the other one is told, under a name that it never heard. Token ids that no tokenizer would give
    # show that they were taken as they are.
    changed = answer.transcript.token_ids[:]
    cut = next(num_tokens for num_tokens, _ in answer.transcript.anchors if num_tokens > 3)
    changed[1:cut] = changed[1:cut][::-1]
    history = replace(answer.transcript, token_ids=changed)
    told = await collect(second, longer, greedy, "2", session_id="t", history=history, return_prompt_token_ids=True)
    assert told[0].prompt_token_ids[: len(changed)] == tuple(changed)
    remembered = await collect(first, longer, greedy, "2", session_id="s", return_prompt_token_ids=True)
    untouched = len(answer.transcript.token_ids)
    assert remembered[0].prompt_token_ids[untouched:] == told[0].prompt_token_ids[untouched:]

    # A history that is not that of the prompt does no harm.
    wrong = replace(history, text="something else entirely")
    again = await collect(second, longer, greedy, "3", session_id="u", history=wrong, return_prompt_token_ids=True)
    alone = await collect(second, longer, greedy, "4", session_id="v", return_prompt_token_ids=True)
    assert again[0].prompt_token_ids == alone[0].prompt_token_ids


async def test_an_engine_tells_the_prompt_that_another_one_would_tokenise_otherwise(engines) -> None:
    """A turn of a sampled conversation: its history consists of tokens that tokenising its text would not give."""
    first, second = engines
    sampling = SamplingParams(temperature=2.0, seed=1, max_tokens=30, min_tokens=30)
    answer = merge_deltas(await collect(first, MESSAGES, sampling, "1", session_id="s"))
    assert answer.prompt_transcript is None  # nothing was known
    longer = (*MESSAGES, ("assistant", answer.text), ("user", "and again: what is my cat called?"))
    options = {"return_prompt_token_ids": True}
    whole = merge_deltas(await collect(first, longer, sampling, "2", session_id="s", **options))
    prompt = whole.prompt_transcript
    assert prompt is not None
    assert tuple(prompt.token_ids) == whole.prompt_token_ids
    alone = merge_deltas(await collect(second, longer, sampling, "3", session_id="other", **options))
    assert alone.prompt_token_ids != whole.prompt_token_ids
    told = merge_deltas(await collect(second, longer, sampling, "4", session_id="s", history=prompt, **options))
    assert told.prompt_token_ids == whole.prompt_token_ids
    assert told.token_ids == whole.token_ids
    assert told.transcript == whole.transcript


async def test_tenants_share_neither_chunks_nor_histories(engines) -> None:
    engine = engines[0]
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    options = {"session_id": "same name"}
    a, b = Tenant("a"), Tenant("b", weight=2.0)
    first = merge_deltas(await collect(engine, MESSAGES, greedy, "1", tenant=a, **options))
    again = merge_deltas(await collect(engine, MESSAGES, greedy, "2", tenant=a, **options))
    other = merge_deltas(await collect(engine, MESSAGES, greedy, "3", tenant=b, **options))
    assert first.num_cached_tokens == other.num_cached_tokens == 0
    assert again.num_cached_tokens > 0
    assert first.text == again.text == other.text
    assert engine.get_statistics()["num_conversations"] == 2
