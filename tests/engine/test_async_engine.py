"""The asyncio facade over the engine thread, with the embedded model: streams, ends, faults, and conversations by text."""

import asyncio
import gc
import json
import pickle
import re
import threading
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

import llguidance
import pytest

from engine import engine_thread
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.cache import matching
from engine.core.cache.index import full_chunk_keys
from engine.core.grammar import GrammarSpec
from engine.core.plan import StepPlan
from engine.core.request import SamplingParams
from engine.dialogue.events import parse_answer
from engine.dialogue.messages import Message
from engine.dialogue.tools import Tool
from engine.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    EngineStoppedError,
    ExecutorError,
    GrammarFailedError,
    InvalidParameterError,
)
from engine.executor.local import LocalExecutor
from engine.generation import Generation
from engine.grammar import guidance
from engine.step_loop import MAX_FAILURES_IN_A_ROW
from engine.text.detokenizer import Detokenizer
from engine.text.output import OutputDelta, TokenLogprob
from engine.text.prompt import AnswerBeginning, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from engine.text.transcript import NO_MATCH
from tests.engine.interrupted_executor import InterruptedExecutor

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
CAT = (("user", "My cat is called Mia."),)
QUESTION = ("user", "what is my cat called?")


class FaultyExecutor(InterruptedExecutor):
    """Fails as many steps as it is told to; may be held in the middle of a step, where a test decides what happens."""

    num_to_fail = 0

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.go = threading.Event()
        self.go.set()
        self.in_step = threading.Event()

    def interrupt(self, plan: StepPlan) -> None:
        self.in_step.set()
        assert self.go.wait(60)
        if self.num_to_fail:
            self.num_to_fail -= 1
            raise RuntimeError("injected fault")


class FaultyAheadExecutor(FaultyExecutor):
    """Takes a second step before the first one has a result, as on a GPU."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.max_steps_in_flight = 2


@pytest.fixture(
    params=[(True, FaultyAheadExecutor), (True, FaultyExecutor), (False, FaultyExecutor)],
    ids=["ahead", "overlapped", "in turn"],
)
async def make_engine(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., AsyncEngine]]:
    """Options -> AsyncEngine of the embedded model with a FaultyExecutor, shut down at the end."""
    engines: list[AsyncEngine] = []

    def make(**options: object) -> AsyncEngine:
        config = {"num_gpu_blocks": 128, "chunk_size": 8, "max_model_len": 512, "num_threads": 1, **options}
        async_scheduling, executor_class = request.param
        config.setdefault("async_scheduling", async_scheduling)
        engines.append(AsyncEngine(EngineConfig.from_options(config), executor_class))
        return engines[-1]

    yield make
    for engine in engines:
        executor(engine).go.set()
        await engine.shutdown()


@pytest.fixture
def engine(make_engine: Callable[..., AsyncEngine]) -> AsyncEngine:
    return make_engine()


def executor(engine: AsyncEngine) -> FaultyExecutor:
    assert isinstance(engine._executor, FaultyExecutor)
    return engine._executor


class Answer:
    """All deltas of one answer."""

    def __init__(self) -> None:
        self.deltas: list[OutputDelta] = []

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for delta in self.deltas for token_id in delta.token_ids)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [logprob for delta in self.deltas for logprob in delta.logprobs]

    @property
    def last(self) -> OutputDelta:
        return self.deltas[-1]


names = iter(f"r{number}" for number in range(1_000_000))


async def ask(
    engine: AsyncEngine,
    prompt: Prompt | tuple[tuple[str, str], ...],
    sampling: SamplingParams = GREEDY,
    session: str | None = None,
    **options: object,
) -> Answer:
    if isinstance(prompt, tuple):
        prompt = ChatPrompt(prompt)
    answer = Answer()
    options = {"request_id": next(names), **options}
    generation = Generation(session_id=session, prompt=prompt, sampling=sampling, **options)  # type: ignore[arg-type]
    async for delta in engine.generate(generation):
        answer.deltas.append(delta)
    return answer


async def assert_all_free(engine: AsyncEngine) -> None:
    """Once it has come to rest: an answer may be there before the step behind it, and its copies, have ended."""
    async with asyncio.timeout(60):
        while not engine._thread.is_idle:
            await asyncio.sleep(0.001)
    await engine.check_integrity()
    statistics = engine.get_statistics()
    assert statistics["num_gpu_blocks_pinned"] == 0
    assert statistics["num_requests_running"] == statistics["num_requests_waiting"] == 0
    assert engine._outputs.streams == {}


async def test_on_a_cpu_a_step_takes_few_prompts_unless_more_are_asked_for(make_engine):
    assert make_engine()._core.scheduling_config.prefill_batch_tokens == 128
    assert make_engine(prefill_batch_tokens=500)._core.scheduling_config.prefill_batch_tokens == 500


# -- streams -----------------------------------------------------------------------------------------------------------


async def test_deltas_concatenate_to_the_answer(engine):
    answer = await ask(
        engine, (*CAT, ("assistant", "ok, your cat is called Mia."), QUESTION), return_prompt_token_ids=True
    )
    assert "Mia" in answer.text
    assert len(answer.deltas) > 1
    visible = answer.token_ids[:-1] if answer.last.finish_reason == "stop" else answer.token_ids
    assert answer.text == engine._tokenizer.decode(visible)
    assert [delta.finish_reason for delta in answer.deltas[:-1]] == [None] * (len(answer.deltas) - 1)
    totals = [delta.num_output_tokens for delta in answer.deltas]
    assert totals == sorted(totals)
    assert totals[-1] == len(answer.token_ids) == answer.last.stats.num_output_tokens
    prompt_ids = answer.deltas[0].prompt_token_ids
    assert len(prompt_ids) == answer.last.num_prompt_tokens
    assert all(delta.prompt_token_ids == () for delta in answer.deltas[1:])
    assert engine._tokenizer.decode(prompt_ids).endswith(engine._tokenizer.render_chat([QUESTION]))


async def test_a_prompt_of_token_ids_is_taken_as_it_is(engine):
    by_text = await ask(engine, TextPrompt("my cat"), return_prompt_token_ids=True)
    token_ids = by_text.deltas[0].prompt_token_ids
    by_ids = await ask(engine, TokenPrompt(token_ids), return_prompt_token_ids=True)
    assert by_ids.deltas[0].prompt_token_ids == token_ids
    assert by_ids.token_ids == by_text.token_ids


async def test_logprobs_come_with_every_token_and_name_the_alternatives(engine):
    answer = await ask(engine, CAT, SamplingParams(temperature=0.0, max_tokens=5, logprobs=3, ignore_eos=True))
    logprobs = answer.logprobs
    assert tuple(logprob.token_id for logprob in logprobs) == answer.token_ids
    for logprob in logprobs:
        assert len(logprob.top) == 3
        assert logprob.top[0] == logprob._replace(text_offset=0, top=()), "greedy takes the most probable"
        values = [other.logprob for other in logprob.top]
        assert values == sorted(values, reverse=True)


async def test_the_bytes_of_logprobs_join_to_the_text(engine):
    """Of answers with parts of characters in them."""
    num_parts = 0
    for seed in range(3):
        sampling = SamplingParams(temperature=2.0, max_tokens=60, logprobs=0, ignore_eos=True, seed=seed)
        answer = await ask(engine, CAT, sampling)
        joined = b"".join(logprob.token_bytes or b"" for logprob in answer.logprobs)
        assert joined.decode(errors="replace").startswith(answer.text)
        for logprob in answer.logprobs:
            if logprob.token_bytes and logprob.text.encode() == logprob.token_bytes:
                assert answer.text.startswith(logprob.text, logprob.text_offset)
            num_parts += logprob.text.startswith("\\x")
    assert num_parts > 3


async def test_thirty_requests_at_once_answer_as_each_alone(engine):
    pets, names = ["cat", "dog", "horse"], ["Mia", "Rex", "Tom", "Ann", "Bob", "Eve", "Max", "Leo", "Kim", "Zoe"]
    prompts = [
        ChatPrompt(
            (
                ("user", f"My {pet} is called {name}."),
                ("assistant", f"ok, your {pet} is called {name}."),
                ("user", f"what is my {pet} called?"),
            )
        )
        for pet in pets
        for name in names
    ]
    sampling = SamplingParams(temperature=0.0, max_tokens=24, logprobs=2)
    alone = [await ask(engine, prompt, sampling) for prompt in prompts]
    together = await asyncio.gather(*(ask(engine, prompt, sampling) for prompt in prompts))
    assert len({answer.token_ids for answer in alone}) > 10
    for one, other in zip(alone, together, strict=True):
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=False):
            if mine.token_id != theirs.token_id:  # batch shapes change rounding: either of two equals may win
                assert abs(mine.top[0].logprob - mine.top[1].logprob) < 1e-4
                break
        else:
            assert len(one.token_ids) == len(other.token_ids)
    assert engine.get_statistics()["num_finished"] == 60
    await assert_all_free(engine)


async def test_requests_of_two_event_loops_are_served(engine):
    here = await ask(engine, CAT)
    elsewhere = await asyncio.to_thread(lambda: asyncio.run(ask(engine, CAT)))
    assert elsewhere.token_ids == here.token_ids


# -- how an answer ends ------------------------------------------------------------------------------------------------


async def long_text(engine: AsyncEngine) -> Answer:
    return await ask(engine, CAT, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))


async def test_a_stop_string_over_several_tokens_ends_the_answer_and_is_never_shown(engine):
    whole = await long_text(engine)
    pieces = [engine._tokenizer.decode([token_id]) for token_id in whole.token_ids]
    stop = pieces[2][-1:] + pieces[3] + pieces[4][:1]
    end = whole.text.index(stop)
    answer = await ask(engine, CAT, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, stop=(stop,)))
    assert answer.text == whole.text[:end]
    assert (answer.last.finish_reason, answer.last.stop_string) == ("stop", stop)
    assert len(answer.token_ids) < 20
    shown = ""
    for delta in answer.deltas:
        shown += delta.text
        assert whole.text[:end].startswith(shown)
    await assert_all_free(engine)


async def test_text_held_back_for_a_stop_string_that_does_not_come_is_shown_at_the_end(engine):
    whole = await long_text(engine)
    stop = (whole.text[-3:] + "\x00", whole.text[5:8] + "\x00")
    answer = await ask(engine, CAT, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, stop=stop))
    assert (answer.text, answer.last.finish_reason) == (whole.text, "length")
    assert answer.last.stop_string is None


async def test_a_prompt_that_is_only_encoded_has_the_tokens_that_it_would_be_computed_with(engine):
    for question in (CAT, (*CAT, ("assistant", "Nice."), QUESTION)):  # the second one in a conversation that is known
        options = {"session": "encoded", "return_prompt_token_ids": True}
        counted = await ask(engine, question, only_encodes=True, **options)
        answered = await ask(engine, question, **options)
        assert counted.token_ids == ()
        assert counted.last.prompt_token_ids == answered.deltas[0].prompt_token_ids
        assert counted.last.num_prompt_tokens == len(counted.last.prompt_token_ids) > 0
        assert (await ask(engine, question, only_encodes=True)).last.prompt_token_ids == ()
    with pytest.raises(ContextLengthError):
        await ask(engine, (("user", "x " * 10 * engine.max_model_len),), only_encodes=True)


async def test_more_tokens_than_the_window_leaves_are_an_error_or_what_it_leaves(engine):
    many = SamplingParams(temperature=0.0, max_tokens=10 * engine.max_model_len, ignore_eos=True)
    with pytest.raises(ContextLengthError, match="lower max_tokens"):
        await ask(engine, CAT, many)
    answer = await ask(engine, CAT, many, clamps_max_tokens=True)
    assert answer.last.finish_reason == "length"
    assert answer.last.num_prompt_tokens + answer.last.num_output_tokens == engine.max_model_len
    few = replace(many, max_tokens=3)
    assert (await ask(engine, CAT, few, clamps_max_tokens=True)).last.num_output_tokens == 3
    with pytest.raises(ContextLengthError):
        await ask(engine, TokenPrompt((1,) * engine.max_model_len), many, clamps_max_tokens=True)


async def test_a_stop_id_ends_the_answer_and_is_not_in_its_text(engine):
    whole = await long_text(engine)
    stop_id = whole.token_ids[4]
    first = whole.token_ids.index(stop_id)
    sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, stop_token_ids=(stop_id,))
    answer = await ask(engine, CAT, sampling)
    assert answer.token_ids == whole.token_ids[: first + 1]
    assert answer.text == engine._tokenizer.decode(whole.token_ids[:first])
    assert answer.last.finish_reason == "stop"


async def test_min_tokens_bars_the_stop_id_until_then(engine):
    whole = await long_text(engine)
    stop_id = whole.token_ids[2]
    options = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, "stop_token_ids": (stop_id,)}
    answer = await ask(engine, CAT, SamplingParams(min_tokens=8, **options))
    assert stop_id not in answer.token_ids[:8]
    assert len(answer.token_ids) > 8


async def test_ignore_eos_goes_on_after_the_end(engine):
    ended = await ask(engine, CAT)
    assert ended.last.finish_reason == "stop"
    assert len(ended.token_ids) < 20
    whole = await long_text(engine)
    assert (len(whole.token_ids), whole.last.finish_reason) == (20, "length")
    assert whole.token_ids[: len(ended.token_ids)] == ended.token_ids


async def test_max_tokens_one_gives_one_token_in_one_delta(engine):
    answer = await ask(engine, CAT, SamplingParams(temperature=0.0, max_tokens=1))
    assert (len(answer.deltas), len(answer.token_ids), answer.last.finish_reason) == (1, 1, "length")
    assert answer.last.stats.num_output_tokens == 1


async def test_a_stop_string_inside_min_tokens_neither_ends_nor_cuts_the_answer(engine):
    """A stop string that is complete before `min_tokens` is over is text like any other, also later on."""
    whole = await long_text(engine)
    visible = [engine._tokenizer.decode(whole.token_ids[: n + 1]) for n in range(20)]
    early = visible[3][-1:], "\x00" * 40  # a long second one must not make the search look far back
    options = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
    answer = await ask(engine, CAT, SamplingParams(min_tokens=4, stop=early, **options))
    rest = visible[5][len(visible[3]) :]
    expected = visible[3] + rest.split(early[0])[0]
    assert answer.text == expected


# -- sampling ----------------------------------------------------------------------------------------------------------


async def test_a_seed_repeats_the_answer_whoever_else_runs(engine):
    sampling = SamplingParams(temperature=1.5, max_tokens=16, seed=7, ignore_eos=True)
    first = await ask(engine, CAT, sampling)
    others = [ask(engine, (QUESTION,), SamplingParams(temperature=1.5, max_tokens=16, seed=n)) for n in range(4)]
    second, *_ = await asyncio.gather(ask(engine, CAT, sampling), *others)
    assert second.token_ids == first.token_ids
    third = await ask(engine, CAT, SamplingParams(temperature=1.5, max_tokens=16, seed=8, ignore_eos=True))
    assert third.token_ids != first.token_ids


async def test_without_a_seed_answers_differ(engine):
    sampling = SamplingParams(temperature=2.0, max_tokens=16, ignore_eos=True)
    answers = {(await ask(engine, CAT, sampling)).token_ids for _ in range(4)}
    assert len(answers) > 1


# -- conversations -----------------------------------------------------------------------------------------------------


async def test_history_sent_again_is_found_in_the_cache(engine):
    """From turn 2 on only the new text is computed, and the last token of the answer, which no step has computed yet."""
    messages = list(CAT)
    previous = None
    for turn in range(4):
        answer = await ask(engine, tuple(messages), session="s", return_prompt_token_ids=True)
        rendered = engine._tokenizer.render_chat(messages)
        assert engine._tokenizer.decode(answer.deltas[0].prompt_token_ids) == rendered
        if previous is not None:
            history_len = previous.last.num_prompt_tokens + len(previous.token_ids)
            assert answer.last.num_cached_tokens == history_len - 1, f"turn {turn}"
        messages += [("assistant", answer.text), QUESTION]
        previous = answer
    assert engine.get_statistics()["num_conversations"] == 1


async def test_history_is_found_where_tokenising_it_again_gives_other_ids(engine):
    """The answer is a row of tokens that no tokenizer would ever give for that text."""
    tokenizer = engine._tokenizer
    for seed in range(40):
        sampling = SamplingParams(temperature=5.0, seed=seed, max_tokens=6, ignore_eos=True)
        first = await ask(engine, CAT, sampling, session=f"s{seed}", return_prompt_token_ids=True)
        computed = first.deltas[0].prompt_token_ids + first.token_ids
        history = (*CAT, ("assistant", first.text), QUESTION)
        again = tuple(tokenizer._tokenizer(tokenizer.render_chat(history), add_special_tokens=False).input_ids)
        is_plain = not any(map(tokenizer.is_special, first.token_ids))
        if is_plain and "\ufffd" not in tokenizer.decode(first.token_ids) and again[: len(computed)] != computed:
            break
    else:
        pytest.fail("this test needs an answer that tokenises differently")
    second = await ask(engine, history, session=f"s{seed}", return_prompt_token_ids=True)
    assert second.deltas[0].prompt_token_ids[: len(computed)] == computed
    assert tokenizer.decode(second.deltas[0].prompt_token_ids) == tokenizer.render_chat(history)
    assert second.last.num_cached_tokens == len(computed) - 1
    stranger = await ask(engine, history, return_prompt_token_ids=True)
    assert stranger.deltas[0].prompt_token_ids == again


TYPED = "my cat is called Mia and the unbelievable gardener is called Theodora"


async def test_a_prompt_that_is_typed_further_has_the_tokens_and_the_answer_of_a_fresh_session(engine):
    """Wherever the typing paused, and whatever the model said there; also if another client of the session typed."""
    fresh = await ask(engine, TextPrompt(TYPED), return_prompt_token_ids=True)
    one = SamplingParams(temperature=0.0, max_tokens=1)
    for cut in range(3, len(TYPED), 4):
        await ask(engine, TextPrompt(TYPED[:cut]), one, session="all")
        await ask(engine, TextPrompt(TYPED[:cut]), one, session=f"s{cut}")
        for session in ("all", f"s{cut}"):
            answer = await ask(engine, TextPrompt(TYPED), session=session, return_prompt_token_ids=True)
            assert answer.deltas[0].prompt_token_ids == fresh.deltas[0].prompt_token_ids, TYPED[:cut]
            assert answer.token_ids == fresh.token_ids


async def test_history_in_ids_of_another_tokenizer_is_text_only(engine):
    """As after a change of the model behind a conversation store: also where its ids are beyond the vocabulary."""
    first = await ask(engine, CAT, session="s")
    told = first.last.transcript
    assert told.fingerprint == engine._tokenizer.fingerprint
    chat = (*CAT, ("assistant", first.text), QUESTION)
    fresh = await ask(engine, chat, return_prompt_token_ids=True)
    strange = array("I", [token_id + 10 for token_id in told.token_ids])
    beyond = array("I", [token_id + 100_000 for token_id in told.token_ids])
    for history in (
        replace(told, token_ids=strange, fingerprint="another"),
        replace(told, token_ids=strange, fingerprint=""),
        replace(told, token_ids=beyond),
    ):
        answer = await ask(engine, chat, history=history, return_prompt_token_ids=True)
        assert answer.deltas[0].prompt_token_ids == fresh.deltas[0].prompt_token_ids
        assert answer.token_ids == fresh.token_ids
    own = await ask(engine, chat, history=replace(told, token_ids=strange), return_prompt_token_ids=True)
    assert own.deltas[0].prompt_token_ids != fresh.deltas[0].prompt_token_ids, "this test needs a history that is used"


async def test_a_resumed_answer_goes_on_from_the_prompt_that_its_engine_had(engine):
    """Another client of the session had that answer in other tokens here, which the first engine never saw."""
    chat = (*CAT, ("assistant", "my cat"), QUESTION)
    fresh = await ask(engine, chat, return_prompt_token_ids=True)
    prompt = engine._tokenizer.encode_prompt(engine._tokenizer.render_chat(CAT), NO_MATCH, is_chat=True, max_tokens=512)
    engine._conversations.record_turn("local\ns", prompt, list(b"my cat"), "my cat")
    here = await ask(engine, chat, session="s", return_prompt_token_ids=True)
    assert here.deltas[0].prompt_token_ids != fresh.deltas[0].prompt_token_ids, (
        "this test needs an answer in other tokens"
    )
    resumed = await ask(
        engine,
        chat,
        session="s",
        beginning=AnswerBeginning(fresh.token_ids[:2], 0),
        return_prompt_token_ids=True,
    )
    assert resumed.deltas[0].prompt_token_ids == fresh.deltas[0].prompt_token_ids
    assert (*fresh.token_ids[:2], *resumed.token_ids) == fresh.token_ids
    with pytest.raises(InvalidParameterError, match="token id 99999 is outside the vocabulary"):
        await ask(engine, chat, beginning=AnswerBeginning((99999,), 0))


async def test_a_diverging_history_is_cut_at_the_divergence(engine):
    first = await ask(engine, CAT, session="s")
    second_turn = (*CAT, ("assistant", first.text), QUESTION)
    second = await ask(engine, second_turn, session="s")
    edited = (*CAT, ("assistant", first.text), ("user", "what is my dog called?"))
    answer = await ask(engine, edited, session="s")
    assert first.last.num_prompt_tokens < answer.last.num_cached_tokens < second.last.num_prompt_tokens
    fresh = await ask(engine, edited)
    assert answer.token_ids == fresh.token_ids
    back = await ask(engine, (*second_turn, ("assistant", second.text), QUESTION), session="s")
    assert back.last.num_cached_tokens == second.last.num_prompt_tokens + len(second.token_ids) - 1


async def test_a_turn_hashes_only_what_the_conversation_did_not_say_before(engine, monkeypatch):
    hashed: list[int] = []

    def spied(parent_key: bytes, token_ids: Sequence[int], chunk_size: int) -> list[bytes]:
        hashed.append(len(token_ids))
        return full_chunk_keys(parent_key, token_ids, chunk_size)

    monkeypatch.setattr(matching, "full_chunk_keys", spied)
    first = await ask(engine, CAT, session="s")
    num_known = first.last.num_prompt_tokens // 8 * 8
    assert hashed[0] == first.last.num_prompt_tokens
    hashed.clear()
    history = (*CAT, ("assistant", first.text), QUESTION)
    second = await ask(engine, history, session="s")
    assert hashed[0] == second.last.num_prompt_tokens - num_known
    assert second.token_ids == (await ask(engine, history)).token_ids
    hashed.clear()
    edited = await ask(engine, (("user", "A dog. " + CAT[0][1]), *history[1:]), session="s")
    assert hashed[0] > edited.last.num_prompt_tokens - num_known
    await assert_all_free(engine)


async def test_a_fork_shares_what_is_full_and_both_go_on_right(engine):
    first = await ask(engine, CAT, session="a")
    history = (*CAT, ("assistant", first.text), QUESTION)
    fork, own = await asyncio.gather(ask(engine, history, session="b"), ask(engine, history, session="a"))
    assert fork.token_ids == own.token_ids
    assert "Mia" in own.text
    assert fork.last.num_cached_tokens > 0
    assert own.last.num_cached_tokens >= first.last.num_prompt_tokens + len(first.token_ids) - 1
    await assert_all_free(engine)


async def test_an_answer_cut_by_a_stop_string_is_continued_from_the_cache(make_engine):
    engine = make_engine(chunk_size=1, num_gpu_blocks=512)  # the tokens of the stop string are in no chunk of the rest
    whole = await long_text(engine)
    stop = engine._tokenizer.decode(whole.token_ids[5:7])
    sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, stop=(stop,))
    first = await ask(engine, CAT, sampling, session="s")
    assert 0 < len(first.text) < len(whole.text)
    second = await ask(engine, (*CAT, ("assistant", first.text), QUESTION), session="s")
    num_kept = len(first.token_ids) - 2
    assert second.last.num_cached_tokens == first.last.num_prompt_tokens + num_kept
    fresh = await ask(engine, (*CAT, ("assistant", first.text), QUESTION))
    assert second.text == fresh.text


async def test_stateless_finds_nothing_and_answers_the_same(make_engine):
    kept, stateless = make_engine(), make_engine(mode="vllm")
    messages = list(CAT)
    for _ in range(3):
        one, other = await ask(kept, tuple(messages), session="s"), await ask(stateless, tuple(messages), session="s")
        assert one.token_ids == other.token_ids
        assert other.last.num_cached_tokens == 0
        messages += [("assistant", one.text), QUESTION]
    assert stateless.get_statistics()["mode"] == "stateless"
    assert stateless.get_statistics()["num_chunks"] == 0


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "sampling", "error", "param"),
    [
        (TextPrompt("cat " * 600), GREEDY, ContextLengthError, "prompt"),
        (TextPrompt("cat " * 900_000), GREEDY, ContextLengthError, "prompt"),
        (ChatPrompt((("user", "cat " * 900_000),)), GREEDY, ContextLengthError, "prompt"),
        (ChatPrompt((("user", ""),) * 130_000), GREEDY, ContextLengthError, "prompt"),
        (ChatPrompt((("user", "cat " * 600),), drops_oldest=True), GREEDY, ContextLengthError, "prompt"),
        (TokenPrompt((1,) * 513), GREEDY, ContextLengthError, "prompt"),
        (ChatPrompt((("user", "cat"),)), SamplingParams(max_tokens=512), ContextLengthError, "prompt"),
        (TokenPrompt(()), GREEDY, InvalidParameterError, "prompt"),
        (TokenPrompt((1, 1024)), GREEDY, InvalidParameterError, "prompt"),
        (TokenPrompt((-1,)), GREEDY, InvalidParameterError, "prompt"),
        (TextPrompt("cat"), SamplingParams(stop_token_ids=(99999,)), InvalidParameterError, "stop_token_ids"),
    ],
)
async def test_a_request_at_fault_is_refused_and_leaves_nothing(engine, prompt, sampling, error, param):
    with pytest.raises(error) as caught:
        await ask(engine, prompt, sampling)
    assert caught.value.param == param
    await assert_all_free(engine)
    assert (await ask(engine, CAT)).text


async def test_an_id_in_use_is_refused_and_its_owner_is_not_disturbed(engine):
    expected = await long_text(engine)
    executor(engine).go.clear()
    executor(engine).in_step.clear()
    sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    owner = asyncio.create_task(ask(engine, CAT, sampling, request_id="same"))
    await asyncio.to_thread(executor(engine).in_step.wait, 60)
    second = asyncio.create_task(ask(engine, (QUESTION,), request_id="same"))
    await asyncio.sleep(0)
    executor(engine).go.set()
    with pytest.raises(InvalidParameterError, match="'same' is running"):
        await second
    assert (await owner).token_ids == expected.token_ids


async def test_the_first_delta_says_how_an_answer_is_to_be_read(engine):
    plain, told = await ask(engine, CAT), await ask(engine, CAT, return_answer_format=True)
    assert {delta.answer_format for delta in plain.deltas} == {None}
    first, *others = told.deltas
    assert {delta.answer_format for delta in others} <= {None}
    assert parse_answer(first.answer_format.parser(), told.text).content == plain.text == told.text
    text = await ask(engine, TextPrompt("my cat"), return_answer_format=True)
    assert text.deltas[0].answer_format is None


async def test_tools_reach_a_model_whose_template_knows_none(engine):
    tools = (Tool("weather", "Tells the weather."),)
    answer = await ask(engine, ChatPrompt((QUESTION,), tools=tools), return_prompt_token_ids=True)
    assert '"name": "weather"' in engine._tokenizer.decode(answer.deltas[0].prompt_token_ids)


async def test_what_cannot_fit_is_refused_before_it_is_tokenised(engine, monkeypatch):
    """Megabytes of text, and 130,000 messages, which are not even rendered."""
    tokenizer = engine._tokenizer
    tokenised, rendered, encode, render = [], [], tokenizer._encode, tokenizer.render_chat
    monkeypatch.setattr(tokenizer, "_encode", lambda text: tokenised.append(text) or encode(text))
    monkeypatch.setattr(tokenizer, "render_chat", lambda chat: rendered.append(chat) or render(chat))
    for prompt in (
        TextPrompt("a b " * 900_000),
        ChatPrompt((("user", "a b " * 900_000),)),
        ChatPrompt((("user", ""), ("assistant", "")) * 65_000),
    ):
        with pytest.raises(ContextLengthError, match="the context window is 512 tokens, but the prompt has"):
            await ask(engine, prompt)
    assert tokenised == []
    assert [len(chat.messages) for chat in rendered] == [1]
    assert ChatPrompt((("user", ""),) * 130_000).num_chars > 130_000, "messages count though they are empty"


async def test_long_prompts_are_tokenised_in_threads_of_their_own(engine, monkeypatch):
    tokenizer, names, encode = engine._tokenizer, [], engine._tokenizer._encode
    monkeypatch.setattr(
        tokenizer, "_encode", lambda text: names.append(threading.current_thread().name) or encode(text)
    )
    long = (("user", "cat " * 100), ("assistant", "ok.")) * 20
    await ask(engine, ChatPrompt((*CAT, *long, QUESTION), drops_oldest=True))
    assert set(names) == {"tokenizer"}
    names.clear()
    await ask(engine, CAT)
    assert names == ["MainThread"]


async def test_the_oldest_messages_are_left_out_of_a_prompt_that_may_be_shortened(engine, monkeypatch):
    """As few tenths as will do, so that the answer fits, too; found by halves; the same place for some turns."""
    render, rendered = engine._tokenizer.render_chat, []
    monkeypatch.setattr(engine._tokenizer, "render_chat", lambda chat: rendered.append(chat) or render(chat))
    system = ("system", "my dog is called Rex.")
    turns = [message for number in range(100) for message in (("user", f"fact {number}"), ("assistant", "ok."))]
    sampling = SamplingParams(temperature=0.0, max_tokens=100)
    prompt = ChatPrompt((system, *turns, QUESTION), drops_oldest=True)
    answer = await ask(engine, prompt, sampling, return_prompt_token_ids=True)
    assert len(rendered) <= 8
    sent = engine._tokenizer.decode(answer.deltas[0].prompt_token_ids)
    kept = next(shorter for shorter in prompt.shorter() if render(shorter.dialogue) == sent)
    assert kept.messages[0] == Message(*system)
    assert kept.messages[1].role == "user"
    assert kept.messages[1:] == prompt.messages[-len(kept.messages) + 1 :]
    assert answer.last.num_prompt_tokens + 100 <= 512
    longer = prompt.shorter()[prompt.shorter().index(kept) - 1]
    assert len(engine._tokenizer._tokenizer(render(longer.dialogue)).input_ids) + 100 > 512
    whole = await ask(
        engine, ChatPrompt((system, *turns[:4], QUESTION), drops_oldest=True), return_prompt_token_ids=True
    )
    assert engine._tokenizer.decode(whole.deltas[0].prompt_token_ids) == render((system, *turns[:4], QUESTION))
    with pytest.raises(ContextLengthError, match="the context window is 512 tokens"):
        await ask(engine, ChatPrompt((system, ("user", "cat " * 700)), drops_oldest=True))


# -- cancellation ------------------------------------------------------------------------------------------------------

ENDLESS = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


async def test_closing_the_generator_frees_the_blocks(engine):
    generator = engine.generate(Generation("a", "s", ChatPrompt(CAT), ENDLESS))
    async with aclosing(generator):
        async for delta in generator:
            assert delta.finish_reason is None
            break
    await assert_all_free(engine)
    assert engine.get_statistics()["num_aborted"] == 1
    # What it had computed is still there.
    assert (await ask(engine, CAT)).last.num_cached_tokens > 0


async def test_cancelling_the_consumer_frees_the_blocks(engine):
    started = asyncio.Event()

    async def consume() -> None:
        async for _ in engine.generate(Generation("a", None, ChatPrompt(CAT), ENDLESS)):
            started.set()

    task = asyncio.create_task(consume())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await assert_all_free(engine)
    assert engine.get_statistics()["num_aborted"] == 1


async def test_cancelling_before_the_engine_has_taken_the_request_harms_nobody(engine):
    """A client that leaves while the engine thread is in the middle of a step: its request waits in the command queue."""
    executor(engine).go.clear()
    executor(engine).in_step.clear()
    running = asyncio.create_task(ask(engine, CAT))
    await asyncio.to_thread(executor(engine).in_step.wait, 60)
    leaving = [asyncio.create_task(ask(engine, (QUESTION,), ENDLESS)) for _ in range(3)]
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    results = await asyncio.gather(*leaving, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    executor(engine).go.set()
    assert (await running).last.finish_reason == "stop"
    await assert_all_free(engine)


async def test_cancelling_while_the_engine_takes_the_request_frees_its_blocks(engine, monkeypatch):
    taking, go, add = threading.Event(), threading.Event(), engine._add

    def held_add(*arguments: object) -> None:
        taking.set()
        assert go.wait(60)
        add(*arguments)

    monkeypatch.setattr(engine, "_add", held_add)
    task = asyncio.create_task(ask(engine, CAT, ENDLESS))
    await asyncio.to_thread(taking.wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    await assert_all_free(engine)
    assert engine.get_statistics()["num_aborted"] == 1


async def test_many_cancellations_at_any_moment_leak_nothing(engine):
    async def leave_after(num_turns: int) -> None:
        task = asyncio.create_task(ask(engine, CAT, ENDLESS, session=f"s{num_turns % 3}"))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    await asyncio.gather(*(leave_after(num_turns) for num_turns in range(0, 400, 8)))
    await assert_all_free(engine)
    assert (await ask(engine, CAT)).last.finish_reason == "stop"


# -- faults ------------------------------------------------------------------------------------------------------------


async def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(engine):
    expected = await ask(engine, CAT, session="s")
    executor(engine).num_to_fail = 1
    with pytest.raises(ExecutorError, match="injected fault"):
        await ask(engine, (*CAT, ("assistant", expected.text), QUESTION), session="s")
    engine.check_health()
    await assert_all_free(engine)
    second = await ask(engine, (*CAT, ("assistant", expected.text), QUESTION), session="s")
    fresh = await ask(engine, (*CAT, ("assistant", expected.text), QUESTION))
    assert second.token_ids == fresh.token_ids
    assert "Mia" in second.text
    assert engine.get_statistics()["num_failed"] == 1


async def test_a_request_that_waited_during_the_failed_step_is_served(make_engine):
    engine = make_engine(max_num_seqs=1)
    executor(engine).go.clear()
    first = asyncio.create_task(ask(engine, CAT))
    second = asyncio.create_task(ask(engine, (QUESTION,)))
    await asyncio.to_thread(executor(engine).in_step.wait, 60)
    executor(engine).num_to_fail = 1
    executor(engine).go.set()
    with pytest.raises(ExecutorError):
        await first
    assert (await second).last.finish_reason == "stop"


async def test_deltas_before_a_failure_are_delivered(engine):
    received = []

    async def consume() -> None:
        async for delta in engine.generate(Generation("a", None, ChatPrompt(CAT), ENDLESS)):
            received.append(delta)
            executor(engine).num_to_fail = 1

    with pytest.raises(ExecutorError):
        await consume()
    assert received
    await assert_all_free(engine)


async def test_failures_in_a_row_make_the_engine_unhealthy_and_one_success_resets_the_count(engine):
    for _ in range(2):
        for _ in range(MAX_FAILURES_IN_A_ROW - 1):
            executor(engine).num_to_fail = 1
            with pytest.raises(ExecutorError):
                await ask(engine, CAT)
        assert (await ask(engine, CAT)).text
    for _ in range(MAX_FAILURES_IN_A_ROW):
        engine.check_health()
        executor(engine).num_to_fail = 1
        with pytest.raises(ExecutorError):
            await ask(engine, CAT)
    with pytest.raises(EngineStoppedError, match="last 3 steps failed"):
        engine.check_health()
    with pytest.raises(EngineStoppedError):
        await ask(engine, CAT)


async def test_a_step_that_never_ends_makes_the_engine_unhealthy(engine, monkeypatch):
    executor(engine).go.clear()
    asking = asyncio.create_task(ask(engine, CAT))
    await asyncio.to_thread(executor(engine).in_step.wait, 60)
    engine.check_health()
    monkeypatch.setattr(engine_thread, "MAX_STEP_S", 0.0)
    with pytest.raises(EngineStoppedError, match="hangs"):
        engine.check_health()
    executor(engine).go.set()
    monkeypatch.undo()
    assert (await asking).text
    while not engine._thread.is_idle:  # it does the last of its work
        await asyncio.sleep(0.01)
    monkeypatch.setattr(engine_thread, "MAX_STEP_S", 0.0)
    engine.check_health()  # with nothing to do, nothing hangs


async def test_shutdown_ends_running_and_waiting_requests(make_engine):
    engine = make_engine(max_num_seqs=1)
    executor(engine).go.clear()
    tasks = [asyncio.create_task(ask(engine, CAT, ENDLESS)) for _ in range(3)]
    await asyncio.to_thread(executor(engine).in_step.wait, 60)
    stopping = asyncio.create_task(engine.shutdown())
    await asyncio.sleep(0)
    executor(engine).go.set()
    await stopping
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [EngineStoppedError] * 3
    with pytest.raises(EngineStoppedError, match="shut down"):
        await ask(engine, CAT)
    with pytest.raises(EngineStoppedError, match="shut down"):
        await engine.check_integrity()
    await engine.shutdown()


async def test_an_engine_that_cannot_start_gives_its_executor_back():
    stopped = []

    class Noting(LocalExecutor):
        def shutdown(self) -> None:
            super().shutdown()
            stopped.append(self)

    config = EngineConfig(num_gpu_blocks=8, chunk_size=8, max_model_len=128, num_threads=1)
    with pytest.raises(ConfigError, match="GPU tier holds only 8 blocks"):
        AsyncEngine(config, Noting)
    assert len(stopped) == 1


async def test_a_call_that_comes_as_the_thread_ends_is_not_left_waiting(engine, monkeypatch):
    """The thread has looked for commands for the last time, but is not yet gone."""
    await engine.shutdown()
    monkeypatch.setattr(engine._thread, "_thread", threading.current_thread())
    with pytest.raises(EngineStoppedError):
        await asyncio.wait_for(engine.check_integrity(), 30)


async def test_an_engine_whose_thread_died_says_so(engine):
    def explode() -> None:
        raise ValueError("a defect")

    task = asyncio.create_task(ask(engine, CAT, ENDLESS))
    await asyncio.to_thread(executor(engine).in_step.wait, 60)
    engine._thread.put(explode)
    with pytest.raises(EngineStoppedError):
        await task
    with pytest.raises(EngineStoppedError, match="a defect"):
        await ask(engine, CAT)


async def test_an_answer_cut_by_a_stop_string_leaves_a_tail_that_the_next_turn_uses(engine):
    """The tokens of the stop string are computed, but not part of what the conversation goes on from."""
    messages = [("user", "my cat is called Mia")]
    sampling = SamplingParams(temperature=0.0, max_tokens=30, stop=("called",))
    text, last = "", None
    async for delta in engine.generate(Generation("cut-1", "cut", ChatPrompt(tuple(messages)), sampling)):
        text, last = text + delta.text, delta
    assert last is not None
    assert last.finish_reason == "stop"
    messages += [("assistant", text), ("user", "what is my cat called?")]
    async for delta in engine.generate(Generation("cut-2", "cut", ChatPrompt(tuple(messages)), sampling)):
        num_kept = delta.num_cached_tokens - last.num_prompt_tokens
        assert 0 < num_kept < last.num_output_tokens
        break


async def test_an_answer_that_cannot_be_put_into_text_ends_alone(engine, monkeypatch):
    append = Detokenizer.append

    def fail_for_one(self, token_id, *, may_stop=True):
        if self._stop is not None:
            raise KeyError(token_id)
        append(self, token_id, may_stop=may_stop)

    monkeypatch.setattr(Detokenizer, "append", fail_for_one)

    async def ask(request_id: str, stop: tuple[str, ...]) -> str:
        sampling = SamplingParams(temperature=0.0, max_tokens=20, stop=stop)
        prompt = ChatPrompt((("user", "my cat is called Mia"),))
        generation = Generation(request_id, None, prompt, sampling)
        return "".join([delta.text async for delta in engine.generate(generation)])

    good, bad = await asyncio.gather(ask("good", ()), ask("bad", ("poison",)), return_exceptions=True)
    assert "Mia" in good
    assert isinstance(bad, EngineError)
    await engine.check_integrity()
    engine.check_health()


# -- grammars ----------------------------------------------------------------------------------------------------------

PET = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "name": {"type": "string", "maxLength": 6}},
    "required": ["kind", "name"],
    "additionalProperties": False,
}


def held_to(grammar: GrammarSpec, **options: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 60, "grammar": grammar, **options})


async def test_an_answer_is_what_the_schema_says_and_the_conversation_goes_on(engine):
    answer = await ask(engine, CAT, held_to(GrammarSpec.json_schema(PET)), "s")
    pet = json.loads(answer.text)
    assert list(pet) == ["kind", "name"]
    assert pet["kind"] in ("cat", "dog")
    assert len(pet["name"]) <= 6
    assert answer.last.finish_reason == "stop"
    assert answer.token_ids[-1] in engine._eos_token_ids
    following = await ask(engine, (*CAT, ("assistant", answer.text), QUESTION), GREEDY, "s")
    assert following.last.num_cached_tokens >= answer.last.num_prompt_tokens + len(answer.token_ids) - 1
    await assert_all_free(engine)


async def test_requests_with_and_without_a_grammar_run_together_as_alone(make_engine):
    engine = make_engine(dtype="float32")
    grammars = [None, GrammarSpec.json_schema(PET), GrammarSpec.choice(["yes", "no"]), GrammarSpec("regex", "[a-f]{9}")]
    samplings = [
        SamplingParams(temperature=1.5, seed=seed, max_tokens=24, top_k=seed % 3 * 20, grammar=grammars[seed % 4])
        for seed in range(8)
    ]
    alone = [await ask(engine, CAT, sampling) for sampling in samplings]
    together = await asyncio.gather(*(ask(engine, CAT, sampling) for sampling in samplings))
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert {alone[number].text for number in range(2, 8, 4)} <= {"yes", "no"}
    assert all(re.fullmatch("[a-f]{9}", alone[number].text) for number in range(3, 8, 4))
    await assert_all_free(engine)


async def test_a_schema_that_cannot_be_used_never_reaches_the_engine(engine, monkeypatch):
    threads = []
    compile_ = engine._grammars.compile
    monkeypatch.setattr(
        engine._grammars, "compile", lambda spec: threads.append(threading.current_thread().name) or compile_(spec)
    )
    with pytest.raises(
        InvalidParameterError, match=r'the grammar cannot be used: Unimplemented keys: \["not"\]'
    ) as caught:
        await ask(engine, CAT, held_to(GrammarSpec.json_schema({"not": {}})))
    assert caught.value.param == "grammar"
    assert engine.get_statistics()["num_requests"] == 0
    assert threads == ["grammar"]
    await assert_all_free(engine)


async def test_a_grammar_is_compiled_once_and_the_executor_finds_it(engine):
    grammar = GrammarSpec.choice(["yes", "no"])
    await ask(engine, CAT, held_to(grammar))
    compiler, compiled = engine._grammars._compiler, []
    compile_ = compiler.compile
    compiler.compile = lambda spec: compiled.append(spec) or compile_(spec)
    await asyncio.gather(*(ask(engine, CAT, held_to(grammar)) for _ in range(5)))
    assert not compiled
    engine._grammars._kept.clear()  # as if many others had come since
    gc.collect()
    await asyncio.gather(*(ask(engine, CAT, held_to(grammar)) for _ in range(5)))
    assert len(compiled) <= 5  # by those who ask; never by the executor, which finds what they hold
    assert set(compiled) <= {grammar}


async def test_an_answer_whose_grammar_grows_too_complex_ends_with_an_error_alone(engine, monkeypatch):
    """What was said until then is told; the others, and the next ones, go on."""
    complex_ = GrammarSpec("regex", "(a|b)*a(a|b){20}")
    monkeypatch.setattr(guidance, "LIMITS", llguidance.LLParserLimits(max_lexer_states=45, verbose_errors=False))
    deltas: list[OutputDelta] = []

    async def fail() -> None:
        sampling = SamplingParams(temperature=5.0, seed=1, max_tokens=200, grammar=complex_)
        generation = Generation(request_id="fails", session_id="s", prompt=ChatPrompt(CAT), sampling=sampling)
        async for delta in engine.generate(generation):
            deltas.append(delta)

    others = [asyncio.create_task(ask(engine, CAT, GREEDY)) for _ in range(2)]
    with pytest.raises(
        GrammarFailedError, match=r"cannot go on within its grammar: .*too many states.*simplify"
    ) as caught:
        await fail()
    assert caught.value.param == "grammar"
    said = "".join(delta.text for delta in deltas)
    assert re.fullmatch("[ab]{5,}", said)
    assert deltas[-1].finish_reason is None
    expected = await ask(engine, CAT, GREEDY)
    assert [(await other).token_ids for other in others] == [expected.token_ids] * 2
    assert (await ask(engine, CAT, held_to(GrammarSpec.choice(["yes"])), "s")).text == "yes"
    await assert_all_free(engine)


async def test_wherever_another_engine_left_off_the_grammar_goes_on(make_engine):
    engine = make_engine(dtype="float32")
    sampling = held_to(GrammarSpec.json_schema(PET), temperature=2.0, seed=4, max_tokens=30)
    whole = await ask(engine, CAT, sampling)
    prompt_ids = (await ask(engine, CAT, sampling, return_prompt_token_ids=True)).deltas[0].prompt_token_ids
    for cut in (1, 4, 11, 23):
        begun = engine._tokenizer.decode(whole.token_ids[:cut])
        beginning = AnswerBeginning(whole.token_ids[:cut], len(begun))
        rest = await ask(engine, TokenPrompt(prompt_ids), sampling, beginning=beginning)
        assert whole.token_ids[:cut] + rest.token_ids == whole.token_ids
        assert begun + rest.text == whole.text


async def test_a_beginning_that_the_grammar_does_not_allow_is_an_error(engine):
    wrong = engine._tokenizer._encode("my").ids
    with pytest.raises(GrammarFailedError, match="doesn't satisfy the grammar"):
        await ask(engine, CAT, held_to(GrammarSpec.json_object()), beginning=AnswerBeginning(tuple(wrong), 0))
    await assert_all_free(engine)


async def test_a_stop_string_may_end_an_answer_within_its_grammar(engine):
    answer = await ask(engine, CAT, held_to(GrammarSpec.json_schema(PET), stop=('"name"',)))
    assert answer.last.finish_reason == "stop"
    assert answer.text.startswith("{")
    assert "name" not in answer.text


async def test_an_answer_that_is_cut_ends_by_its_length(engine):
    answer = await ask(engine, CAT, held_to(GrammarSpec.json_schema(PET), max_tokens=4))
    assert answer.last.finish_reason == "length"
    assert answer.text.startswith("{")
    await assert_all_free(engine)


@pytest.mark.parametrize(("name", "value"), [("min_tokens", 1), ("ignore_eos", True)])
def test_parameters_that_contradict_a_grammar(name, value):
    with pytest.raises(InvalidParameterError, match=f"{name} must be .* with a grammar") as caught:
        held_to(GrammarSpec.json_object(), **{name: value})
    assert caught.value.param == name


def test_sampling_with_a_grammar_travels_and_compares():
    sampling = held_to(GrammarSpec.json_schema(PET, begins_behind="</think>"))
    assert pickle.loads(pickle.dumps(sampling)) == sampling
    assert hash(sampling.grammar) == hash(GrammarSpec.json_schema(dict(PET), begins_behind="</think>"))
    assert sampling.grammar != GrammarSpec.json_schema(PET)
    assert sampling.needs_token_ids
    assert not sampling.has_penalties
