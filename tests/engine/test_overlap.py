"""What overlaps with a step, and that it changes no answer: the same requests with `async_scheduling` and without."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.phases import RequestPhases
from engine.core.plan import StepPlan
from engine.core.request import SamplingParams
from engine.errors import EngineError
from engine.generation import Generation
from engine.text.detokenizer import Detokenizer
from engine.text.output import OutputDelta, merge_deltas
from engine.text.prompt import ChatPrompt
from tests.engine.interrupted_executor import InterruptedExecutor

WAIT_S = 60
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
CAT = ChatPrompt((("user", "My cat is called Mia."),))


class ScriptedExecutor(InterruptedExecutor):
    """Notes the plans. in_step: number of a step -> what happens during it."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.plans: list[StepPlan] = []
        self.in_step: dict[int, Callable[[], None]] = {}

    def interrupt(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self.in_step.get(len(self.plans), lambda: None)()


class AheadExecutor(ScriptedExecutor):
    """Takes a second step before the first one has a result, as on a GPU."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.max_steps_in_flight = 2


@pytest.fixture
async def make_engine() -> AsyncIterator[Callable[[bool], AsyncEngine]]:
    """(async_scheduling, executor) -> AsyncEngine of the embedded model with that executor, shut down at the end."""
    engines: list[AsyncEngine] = []

    def make(async_scheduling: bool, executor: type[ScriptedExecutor] = ScriptedExecutor) -> AsyncEngine:
        options = {"num_gpu_blocks": 256, "chunk_size": 8, "max_model_len": 512, "num_threads": 1}
        config = EngineConfig(async_scheduling=async_scheduling, max_num_batched_tokens=48, max_num_seqs=8, **options)
        engines.append(AsyncEngine(config, executor))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.shutdown()


@pytest.fixture(params=[True, False], ids=["overlapped", "in turn"])
def engine(request: pytest.FixtureRequest, make_engine: Callable[[bool], AsyncEngine]) -> AsyncEngine:
    return make_engine(request.param)


def executor(engine: AsyncEngine) -> ScriptedExecutor:
    assert isinstance(engine._executor, ScriptedExecutor)
    return engine._executor


async def ask(
    engine: AsyncEngine, prompt: ChatPrompt, sampling: SamplingParams, request_id: str, session_id: str | None = None
) -> OutputDelta:
    generation = Generation(request_id, session_id, prompt, sampling)
    deltas = [delta async for delta in engine.generate(generation)]
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    return merge_deltas(deltas)


async def ask_at_once(engine: AsyncEngine, *questions: tuple) -> list[OutputDelta]:
    """All in the queue before the engine takes the first one, so that the same steps come of it each time."""
    taking, go = threading.Event(), threading.Event()

    def hold() -> None:
        taking.set()
        assert go.wait(WAIT_S)

    engine._thread.put(hold)
    await asyncio.to_thread(taking.wait, WAIT_S)
    tasks = [asyncio.create_task(ask(engine, *question)) for question in questions]
    while engine._thread.num_commands < len(questions):
        await asyncio.sleep(0)
    go.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


def abandon(engine: AsyncEngine, request_id: str) -> None:
    """As when the client leaves, and its stream says so."""

    def command() -> None:
        stream = engine._outputs.streams[request_id]
        engine._outputs.abandon(stream)
        engine._outputs._send([(stream, EngineError("abandoned"))])

    engine._thread.put(command)


# -- the same answers --------------------------------------------------------------------------------------------------

NAMES = ("Mia", "Rex", "Tom", "Ann", "Bob", "Eve", "Max", "Leo")
ABANDONED = {8: "t0.4", 9: "t1.5", 12: "t1.7", 16: "t2.4"}  # step of the turn -> request


async def converse(engine: AsyncEngine) -> list[dict]:
    """Three turns of eight sessions side by side, of every kind, some of which are abandoned in the middle of a step."""
    kinds = [
        {},
        {"logprobs": 3, "prompt_logprobs": 2},
        {"stop": ("called", "is")},
        {"stop": ("a",), "min_tokens": 6, "logprobs": 0},
        {"ignore_eos": True},
        {"temperature": 1.5, "seed": 5, "ignore_eos": True, "max_tokens": 9, "logit_bias": ((70, 3.0), (71, -100.0))},
        {"temperature": 0.8, "seed": 6, "frequency_penalty": 0.7, "presence_penalty": 0.2},
        {"ignore_eos": True, "max_tokens": 16, "stop": ("zzz",)},
    ]
    messages = [[("user", f"My cat is called {name}.")] for name in NAMES]
    given: list[dict] = []
    for turn in range(3):
        first_step = len(executor(engine).plans)
        for step, request_id in ABANDONED.items():
            if request_id.startswith(f"t{turn}."):
                executor(engine).in_step[first_step + step] = lambda request_id=request_id: abandon(engine, request_id)
        questions = [
            (ChatPrompt(tuple(messages[i])), replace(GREEDY, **kinds[i]), f"t{turn}.{i}", f"s{i}") for i in range(8)
        ]
        answers = await ask_at_once(engine, *questions)
        for i, answer in enumerate(answers):
            if isinstance(answer, EngineError):
                messages[i] += [("assistant", "?"), ("user", "what is my cat called?")]
                given.append({"abandoned": questions[i][2]})
                continue
            assert isinstance(answer, OutputDelta), answer
            messages[i] += [("assistant", answer.text), ("user", "what is my cat called?")]
            stats = replace(answer.stats, arrival_s=0.0, first_token_s=0.0, finished_s=0.0, phases=RequestPhases())
            given.append({"answer": replace(answer, stats=stats), "session": f"s{i}"})
    return given


async def test_overlapped_or_in_turn_plans_answers_and_memories_are_the_same(make_engine):
    overlapped, in_turn = make_engine(True), make_engine(False)
    ours, theirs = await converse(overlapped), await converse(in_turn)
    assert ours == theirs
    assert executor(overlapped).plans == executor(in_turn).plans
    reasons = {each["answer"].finish_reason for each in ours if "answer" in each}
    assert reasons == {"stop", "length"}
    assert len([each for each in ours if "abandoned" in each]) == len(ABANDONED)
    assert any(each["answer"].num_cached_tokens > 0 for each in ours if "answer" in each)
    for i in range(len(NAMES)):
        branches = [engine._conversations._conversations[f"local\ns{i}"].branches for engine in (overlapped, in_turn)]
        assert branches[0] == branches[1]
    stats, others = overlapped.get_statistics(), in_turn.get_statistics()
    assert min(stats.pop("num_used_drafts"), stats.pop("num_discarded_drafts")) > 0
    assert (others.pop("num_used_drafts"), others.pop("num_discarded_drafts")) == (0, 0)
    assert stats == others
    for engine in (overlapped, in_turn):
        await engine.check_integrity()
        assert engine._outputs.streams == {}


async def test_with_steps_put_behind_each_other_the_answers_and_memories_are_the_same(make_engine, monkeypatch):
    """Ends by token, by string and by length, seeds, penalties.

    A request that ends unexpectedly is computed once more, and the result is dropped.
    """
    monkeypatch.setitem(globals(), "ABANDONED", {})
    ahead, in_turn = make_engine(True, AheadExecutor), make_engine(False)
    ours, theirs = [[given["answer"] for given in await converse(engine)] for engine in (ahead, in_turn)]
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.text, mine.token_ids, mine.finish_reason) == (other.text, other.token_ids, other.finish_reason)
        assert mine.num_cached_tokens == other.num_cached_tokens
        for one, another in zip(mine.logprobs, other.logprobs, strict=True):
            assert one.logprob == pytest.approx(another.logprob, abs=1e-4)
    for i in range(len(NAMES)):
        branches = [engine._conversations._conversations[f"local\ns{i}"].branches for engine in (ahead, in_turn)]
        assert branches[0] == branches[1]
    assert ahead.get_statistics()["num_steps_ahead"] > 20
    num_segments = [sum(len(plan.segments) for plan in executor(engine).plans) for engine in (ahead, in_turn)]
    assert num_segments[0] > num_segments[1]
    await ahead.check_integrity()


async def test_requests_abandoned_in_flight_harm_nobody_else(make_engine):
    engine = make_engine(True, AheadExecutor)
    expected = (await ask(engine, CAT, GREEDY, "first")).token_ids
    for step in range(2, 8):
        first_step = len(executor(engine).plans)
        executor(engine).in_step[first_step + step] = lambda: abandon(engine, "a")
        questions = [(CAT, replace(GREEDY, ignore_eos=True), "a"), (CAT, GREEDY, "b")]
        abandoned, other = await ask_at_once(engine, *questions)
        assert isinstance(abandoned, EngineError)
        assert other.token_ids == expected
    await engine.check_integrity()
    assert engine._outputs.streams == {}


async def test_what_an_abandoned_request_said_is_remembered_up_to_its_last_token(engine):
    """The client leaves in the middle of step 5, whose token is not in text when the request ends."""
    executor(engine).in_step[5] = lambda: abandon(engine, "a")
    sampling = replace(GREEDY, ignore_eos=True)
    with pytest.raises(EngineError, match="abandoned"):
        await ask(engine, CAT, sampling, "a", "s")
    whole = await ask(engine, CAT, sampling, "b")
    (branch,) = engine._conversations._conversations["local\ns"].branches
    prompt = engine._tokenizer.render_chat(CAT.dialogue)
    num_prompt_tokens = whole.num_prompt_tokens
    assert tuple(branch.token_ids[num_prompt_tokens:]) == whole.token_ids[:5]
    assert branch.text == prompt + engine._tokenizer.decode(whole.token_ids[:5])


# -- what runs beside a step -------------------------------------------------------------------------------------------


async def test_the_text_of_a_step_is_made_and_delivered_while_the_next_one_runs(make_engine, monkeypatch):
    """The text of step n is not made before step n+1 has begun, and step n+1 waits for that text.

    Neither waits in vain.
    """
    engine = make_engine(True)
    num_tokens = 6
    begun = [threading.Event() for _ in range(num_tokens + 2)]
    arrived = [threading.Event() for _ in range(num_tokens + 2)]
    append, texts = Detokenizer.append, iter(range(1, num_tokens + 1))

    def append_beside_the_next_step(self: Detokenizer, token_id: int, *, may_stop: bool = True) -> None:
        step = next(texts)
        assert step == num_tokens or begun[step + 1].wait(WAIT_S), f"step {step + 1} waits for the text of step {step}"
        append(self, token_id, may_stop=may_stop)

    def begin(step: int) -> None:
        begun[step].set()
        assert step == 1 or arrived[step - 1].wait(WAIT_S), f"the text of step {step - 1} waits for step {step}"

    monkeypatch.setattr(Detokenizer, "append", append_beside_the_next_step)
    executor(engine).in_step = {step: lambda step=step: begin(step) for step in range(1, num_tokens + 1)}
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    num_received = 0
    async for delta in engine.generate(Generation("a", None, CAT, sampling)):
        num_received += len(delta.token_ids)
        arrived[num_received].set()
    assert num_received == num_tokens
    assert engine.get_statistics()["num_used_drafts"] == num_tokens - 1


async def test_a_stop_string_ends_its_answer_before_the_next_step(engine):
    """Its text is made at once: no step is computed in vain."""
    whole = await ask(engine, CAT, replace(GREEDY, ignore_eos=True), "a")
    num_steps = len(executor(engine).plans)
    stop = engine._tokenizer.decode(whole.token_ids[3:4])
    assert stop not in engine._tokenizer.decode(whole.token_ids[:3])
    answer = await ask(engine, CAT, replace(GREEDY, stop=(stop,)), "b")
    assert len(answer.token_ids) == 4
    computing = [plan for plan in executor(engine).plans[num_steps:] if plan.segments]
    assert len(computing) == 4


async def test_an_id_used_again_before_the_last_text_of_its_request_was_delivered(engine):
    """The second request arrives during the last step of the first one. Each gets its own answer."""
    loop = asyncio.get_running_loop()
    sampling = replace(GREEDY, max_tokens=3)
    expected = await ask(engine, CAT, sampling, "other")
    second = None

    def arrive() -> None:
        nonlocal second
        second = asyncio.run_coroutine_threadsafe(ask(engine, CAT, GREEDY, "same"), loop)
        while not engine._thread.num_commands:
            assert not second.done()

    executor(engine).in_step[len(executor(engine).plans) + 3] = arrive
    first = await ask(engine, CAT, sampling, "same")
    assert (first.token_ids, first.text) == (expected.token_ids, expected.text)
    assert second is not None
    again = await asyncio.wrap_future(second)
    assert again.token_ids[:3] == expected.token_ids
    assert len(again.token_ids) > 3


async def test_an_answer_that_cannot_be_told_while_the_next_step_fails_harms_nobody_else(make_engine, monkeypatch):
    """The token of step 2 is put into text during step 3, which fails: the request ends once, by the first of its errors."""
    engine = make_engine(True)
    append, failed = Detokenizer.append, threading.Event()
    num_texts = 0

    def fail_at_the_second(self: Detokenizer, token_id: int, *, may_stop: bool = True) -> None:
        nonlocal num_texts
        num_texts += 1
        if num_texts == 2:
            failed.set()
            raise KeyError(token_id)
        append(self, token_id, may_stop=may_stop)

    def fail() -> None:
        assert failed.wait(WAIT_S)
        raise RuntimeError("injected fault")

    monkeypatch.setattr(Detokenizer, "append", fail_at_the_second)
    executor(engine).in_step[3] = fail
    with pytest.raises(EngineError, match="put into text"):
        await ask(engine, CAT, replace(GREEDY, ignore_eos=True), "a")
    assert (await ask(engine, CAT, GREEDY, "b")).finish_reason == "stop"
    await engine.check_integrity()
    assert engine._outputs.streams == {}
