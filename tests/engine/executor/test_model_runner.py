"""Steps that are launched before the one in front of them is complete, with a real model.

Tokens that stay on the device, tokens that turn out to be others, failures that are not the next step's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.core.executor_protocol import ComputationFailedError, SamplingFailedError
from engine.core.grammar import GrammarSpec
from engine.core.plan import QuerySegment, RequestStart, StepPlan
from engine.core.request import SamplingParams
from engine.errors import InvalidParameterError
from engine.executor import sampler
from engine.executor.sampler import Draw, SamplingBatch
from tests.copies import swap_in, swap_out

GREEDY = SamplingParams(temperature=0.0)
FLAT = SamplingParams(temperature=20.0, top_p=0.99, seed=3)


@pytest.fixture
def make_runner(tiny_model, make_driver) -> Callable:
    def make(**options):
        driver = make_driver(tiny_model("llama"), num_gpu_blocks=32, chunk_size=8, max_model_len=128, **options)
        return driver.executor.runner

    return make


def start(name: str, prompt: list[int], first_block: int, sampling: SamplingParams) -> RequestStart:
    table = tuple(range(first_block, first_block + 8))
    token_ids = tuple(prompt) if sampling.needs_token_ids else ()
    return RequestStart(name, len(prompt), len(prompt), sampling, (), table, token_ids)


def first_step(*requests: tuple[str, list[int], SamplingParams]) -> StepPlan:
    starts = tuple(start(name, prompt, 8 * i, sampling) for i, (name, prompt, sampling) in enumerate(requests))
    segments = tuple(QuerySegment(name, 0, tuple(prompt), True) for name, prompt, _ in requests)
    return StepPlan(1, segments, starts)


def decodes(step_id: int, **positions: int) -> StepPlan:
    segments = tuple(QuerySegment(name, position, None, True) for name, position in positions.items())
    return StepPlan(step_id, segments)


def run(runner, plans: list[StepPlan], *, ahead: bool) -> list[tuple[int, ...]]:
    """The tokens of each step; ahead: each is launched before the one in front of it is complete."""
    tokens = []
    if not ahead:
        return [runner.execute(plan).token_ids for plan in plans]
    runner.launch(plans[0])
    for plan in plans[1:]:
        runner.launch(plan)
        tokens.append(runner.complete().token_ids)
    return [*tokens, runner.complete().token_ids]


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParams(temperature=1.0, seed=5),
        SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=6, logprobs=2),
        SamplingParams(temperature=0.8, seed=7, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.5),
        SamplingParams(temperature=0.0, min_tokens=5),
        SamplingParams(temperature=0.0, logit_bias=((5, 3.0), (40, -100.0))),
    ],
    ids=["greedy", "drawn", "filtered", "penalties", "min_tokens", "bias"],
)
def test_a_step_goes_on_from_tokens_that_the_host_does_not_know(sampling, make_runner):
    prompts = [[5, 6, 7, 8, 9], [40, 41, 42]]
    plans = [
        first_step(("a", prompts[0], sampling), ("b", prompts[1], GREEDY)),
        *(decodes(2 + i, a=5 + i, b=3 + i) for i in range(6)),
        *(decodes(8 + i, a=11 + i) for i in range(3)),
    ]
    expected = run(make_runner(), plans, ahead=False)
    assert run(make_runner(), plans, ahead=True) == expected


def test_tokens_that_turn_out_to_be_others_are_computed_with_again(make_runner, monkeypatch):
    """A filter that keeps more than was looked at, in every step, for one of two requests."""
    prompts = [[5, 6, 7, 8, 9], [40, 41, 42]]
    plans = [
        first_step(("a", prompts[0], FLAT), ("b", prompts[1], GREEDY)),
        *(decodes(2 + i, a=5 + i, b=3 + i) for i in range(6)),
    ]
    expected = run(make_runner(), plans, ahead=False)

    finish, num_corrected = Draw.finish, 0

    def counted(draw: Draw):
        nonlocal num_corrected
        result = finish(draw)
        num_corrected += draw.was_corrected
        return result

    draw = SamplingBatch.draw
    monkeypatch.setattr(SamplingBatch, "draw", lambda self, *args: draw(self, *args, looks_later=True))
    monkeypatch.setattr(Draw, "finish", counted)
    monkeypatch.setattr(sampler, "MIN_CANDIDATES_UNSEEN", 1)
    assert run(make_runner(), plans, ahead=True) == expected
    assert num_corrected >= len(plans) - 1


@pytest.mark.parametrize("place", ["_forward", "_sample"])
def test_a_failure_is_told_with_its_own_step(place, make_runner, monkeypatch):
    runner = make_runner()
    real, num_calls = getattr(runner, place), 0

    def fails_at_the_second(*args):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise RuntimeError("injected fault")
        return real(*args)

    monkeypatch.setattr(runner, place, fails_at_the_second)
    a, b = ("a", [5, 6, 7], GREEDY), ("b", [40, 41], GREEDY)
    starts = first_step(a, b).starts
    runner.launch(StepPlan(1, (QuerySegment("a", 0, (5, 6, 7), True),), starts))
    runner.launch(StepPlan(2, (QuerySegment("a", 3, None, True),)))
    assert len(runner.complete().token_ids) == 1
    runner.launch(StepPlan(3, (QuerySegment("b", 0, (40, 41), True),)))
    with pytest.raises(SamplingFailedError if place == "_sample" else ComputationFailedError, match="injected fault"):
        runner.complete()
    expected = make_runner().execute(StepPlan(1, (QuerySegment("b", 0, (40, 41), True),), starts)).token_ids
    assert runner.complete().token_ids == expected


def test_a_step_behind_one_that_could_not_begin_fails_by_itself(make_runner, monkeypatch):
    runner = make_runner()
    follow = runner._follow

    def fails_once(plan: StepPlan) -> None:
        monkeypatch.setattr(runner, "_follow", follow)
        raise MemoryError("injected fault")

    monkeypatch.setattr(runner, "_follow", fails_once)
    runner.launch(first_step(("a", [5, 6, 7], GREEDY)))
    runner.launch(decodes(2, a=3))
    with pytest.raises(MemoryError):
        runner.complete()
    with pytest.raises(ComputationFailedError, match="KeyError"):
        runner.complete()


def test_copies_of_a_step_end_before_those_of_the_next_one_begin(make_runner, monkeypatch):
    runner = make_runner(num_cpu_blocks=4)
    events = []
    begin, finish = runner.swapper.begin, runner.swapper.finish
    monkeypatch.setattr(runner.swapper, "begin", lambda plan: (events.append(f"begin {plan.step_id}"), begin(plan))[1])
    monkeypatch.setattr(runner.swapper, "finish", lambda: (events.append("finish"), finish())[1])
    runner._kv_store.storage[3] = 7.0
    runner.launch(StepPlan(1, (), swap_outs=(swap_out(3, 1),)))
    runner.launch(StepPlan(2, (), swap_ins=(swap_in(1, 5),)))
    out, back = runner.complete().swap_seconds, runner.complete().swap_seconds
    assert events == ["begin 1", "finish", "begin 2", "finish"]
    assert out[0] == back[1] == 0 < min(out[1], back[0]), "each step tells the time of its own copies"
    assert torch.equal(runner._kv_store.storage[5], torch.full_like(runner._kv_store.storage[5], 7.0))


def test_copies_that_fail_are_their_own_steps_too(make_runner, monkeypatch):
    runner = make_runner(num_cpu_blocks=4)
    finish, num_calls = runner.swapper.finish, 0

    def fails_once():
        nonlocal num_calls
        num_calls += 1
        finish()
        if num_calls == 1:
            raise OSError("a copy failed")
        return ()

    monkeypatch.setattr(runner.swapper, "finish", fails_once)
    a = ("a", [5, 6, 7], GREEDY)
    runner.launch(first_step(a))
    runner.launch(decodes(2, a=3))
    with pytest.raises(OSError, match="a copy failed"):
        runner.complete()
    assert len(runner.complete().token_ids) == 1


class Countdown:
    """A matcher that allows one token after the other, and has an error at the end of them."""

    def __init__(self, token_ids: list[int], error: str | None = None) -> None:
        self._left = list(token_ids)
        self._error_at_the_end = error
        self.error: str | None = None

    def fill(self, mask: np.ndarray) -> None:
        mask[:] = 0
        if not self._left:
            self.error = self._error_at_the_end
            mask[:] = 0xFF
        else:
            mask[self._left[0] // 8] = 1 << self._left[0] % 8

    def accept(self, token_id: int) -> None:
        if self.error is None and self._left.pop(0) != token_id:
            self.error = "not allowed"

    def copy(self) -> Countdown:
        other = Countdown(self._left, self._error_at_the_end)
        other.error = self.error
        return other


class Countdowns:
    """As a GrammarStore, for grammars that name their tokens."""

    def matcher(self, spec: GrammarSpec, token_ids, thinking) -> Countdown:
        if spec.text == "[]":
            raise InvalidParameterError("refused", param="grammar")
        matcher = Countdown([int(number) for number in spec.text.split(",")], "no more numbers")
        for token_id in token_ids:
            matcher.accept(token_id)
        return matcher


def counting(*token_ids: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, grammar=GrammarSpec("regex", ",".join(map(str, token_ids)) or "[]"))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_mask_is_made_of_what_the_step_before_sampled(ahead, make_runner):
    """Also where that step is still under way; and of what was sampled before the request was started again."""
    runner = make_runner()
    runner.grammars = Countdowns()
    sampling = counting(100, 101, 102, 103, 104, 105)
    resumed = RequestStart("c", 5, 3, sampling, (), tuple(range(16, 24)), (1, 2, 3, 100, 101))
    first = first_step(("a", [5, 6, 7, 8, 9], sampling), ("b", [40, 41, 42], GREEDY))
    plans = [
        StepPlan(1, (*first.segments, QuerySegment("c", 0, (1, 2, 3, 100, 101), True)), (*first.starts, resumed)),
        *(decodes(2 + i, a=5 + i, b=3 + i, c=5 + i) for i in range(3)),
    ]
    tokens = run(runner, plans, ahead=ahead)
    assert [step[0] for step in tokens] == [100, 101, 102, 103]
    assert [step[2] for step in tokens] == [102, 103, 104, 105]


def test_masks_are_made_while_the_device_computes(make_runner, monkeypatch):
    runner = make_runner()
    runner.grammars = Countdowns()
    order = []
    forward, fill = runner._forward, Countdown.fill
    monkeypatch.setattr(runner, "_forward", lambda *args: order.append("forward") or forward(*args))
    monkeypatch.setattr(Countdown, "fill", lambda self, mask: order.append("fill") or fill(self, mask))
    run(runner, [first_step(("a", [5, 6, 7], counting(100, 101))), decodes(2, a=3)], ahead=False)
    assert order == ["forward", "fill"] * 2


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_whose_grammar_ends_in_an_error_fails_alone(ahead, make_runner):
    runner = make_runner()
    runner.grammars = Countdowns()
    others = [("b", [40, 41, 42], GREEDY), ("c", [50, 51], counting(100, 101, 102, 103))]
    plans = [
        first_step(("a", [5, 6, 7], counting(100, 101)), *others),
        *(decodes(2 + i, a=3 + i, b=3 + i, c=2 + i) for i in range(3)),
    ]
    results = []
    if ahead:
        runner.launch(plans[0])
    for number in range(len(plans)):
        if not ahead:
            results.append(runner.execute(plans[number]))
            continue
        if number + 1 < len(plans):
            runner.launch(plans[number + 1])
        results.append(runner.complete())
    assert [result.failed_requests for result in results[:2]] == [(), ()]
    assert [result.failed_requests for result in results[2:]] == [(("a", "no more numbers"),)] * 2
    assert [result.token_ids[2] for result in results] == [100, 101, 102, 103]
    runner = make_runner()
    alone = [first_step(("b", [40, 41, 42], GREEDY)), *(decodes(2 + i, b=3 + i) for i in range(3))]
    assert [result.token_ids[1] for result in results] == [step[0] for step in run(runner, alone, ahead=False)]


@pytest.mark.parametrize("num_taken", [1, 2])
def test_behind_guesses_a_grammar_goes_on_from_what_was_taken_of_them(num_taken, make_runner):
    """Its error behind true guesses is the answer's; behind a wrong one it is none."""
    runner = make_runner()
    runner.grammars = Countdowns()
    a, b = ("a", [5, 6, 7], counting(100, 101, 102)), ("b", [40, 41, 42], counting(100, 101, 102, 103))
    assert runner.execute(first_step(a, b)).token_ids == (100, 100)
    guessing = tuple(
        QuerySegment(name, 3, (100, *guesses), True, num_guesses=2)
        for name, guesses in (("a", (101, 102)), ("b", (101, 99)))
    )
    result = runner.execute(StepPlan(2, guessing))
    assert (result.token_ids[:2], result.token_ids[3:5]) == ((101, 102), (101, 102))
    assert result.failed_requests == (("a", "no more numbers"),)
    last = 100 + num_taken
    result = runner.execute(StepPlan(3, (QuerySegment("b", 3 + num_taken, (last,), True),)))
    assert (result.token_ids, result.failed_requests) == ((last + 1,), ())


@pytest.mark.parametrize("has_grammars", [False, True])
def test_a_grammar_that_cannot_be_used_here_is_its_own_requests_fault(has_grammars, make_runner):
    runner = make_runner()
    runner.grammars = Countdowns() if has_grammars else None
    result = runner.execute(first_step(("a", [5, 6, 7], counting()), ("b", [40, 41, 42], GREEDY)))
    assert result.failed_requests == (("a", "refused" if has_grammars else "this executor was given no grammars"),)
    assert len(result.token_ids) == 2
