"""Guesses against brute force, and what is verified of them."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core import drafting, speculation
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.drafting import MAX_MATCH, MAX_RECENT_TOKENS, Drafter, HitRates, RecentAnswers, TokenIndex
from engine.core.engine_core import EngineCore
from engine.core.plan import QuerySegment, StepResult
from engine.core.request import Request, SamplingParams
from engine.core.speculation import (
    MAX_STEPS_IN_A_ROW,
    PRIOR_ROW_COST,
    Speculation,
    SpeculativeOptions,
    StepCost,
)
from engine.errors import ConfigError


def longest_match(token_ids: list[int], end_ids: list[int], *, is_own: bool) -> int:
    """How many of the last tokens of `end_ids` were in `token_ids` before, by looking everywhere."""
    best = 0
    for position in range(1, len(token_ids) + (not is_own)):
        length = 0
        while (
            length < min(position, len(end_ids), MAX_MATCH) and token_ids[position - 1 - length] == end_ids[-1 - length]
        ):
            length += 1
        best = max(best, length)
    return best


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=20))
def test_the_longest_match_is_that_of_brute_force(token_ids, other_ids):
    index, other = TokenIndex(token_ids), TokenIndex(other_ids)
    index.extend(len(token_ids))
    other.extend(len(other_ids))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "MAX_PLACES", 100)
        (own_place, own_len), (place, length) = index.find_own_end(), index.find(other)
    assert own_len == longest_match(token_ids, token_ids, is_own=True)
    assert length == longest_match(token_ids, other_ids, is_own=False)
    for position, matched, end_ids in ((own_place, own_len, token_ids), (place, length, other_ids)):
        assert token_ids[position - matched : position] == end_ids[len(end_ids) - matched :] or not matched


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 60), st.integers(1, 5))
def test_guesses_follow_an_earlier_place_however_tokens_come(token_ids, num_prompt, num_at_once):
    """What is guessed has followed an equal row of tokens, or repeats what is guessed."""
    context = token_ids[:num_prompt]
    drafter = Drafter(context, len(context), None, HitRates())
    while True:
        drafter.catch_up(100)
        guess = drafter.guess(8)
        assert len(guess) in (0, 8)
        chances = drafter.chances(8)
        assert len(chances) <= 8
        assert chances == sorted(chances, reverse=True)
        if guess:
            places = [i for i, token_id in enumerate(context[:-1], 1) if token_id == context[-1]]
            assert any((context[i:] + guess)[:8] == guess for i in places)
        if len(context) >= len(token_ids):
            break
        context += token_ids[len(context) : len(context) + num_at_once]


def test_a_long_prompt_is_taken_in_over_several_calls_and_guesses_nothing_before():
    drafter = Drafter([1, 2, 3, 4] * 6, 24, None, HitRates())
    assert [(drafter.catch_up(10), drafter.guess(5)) for _ in range(4)] == [
        (10, []),
        (10, []),
        (4, [1, 2, 3, 4, 1]),
        (0, [1, 2, 3, 4, 1]),
    ]


def test_what_is_indexed_in_a_step_and_in_all_is_bounded_and_ends_with_its_request(monkeypatch):
    monkeypatch.setattr(speculation, "MAX_INDEXED_AT_ONCE", 10)
    monkeypatch.setattr(speculation, "MAX_INDEXED_TOKENS", 25)
    guessing = Speculation(SpeculativeOptions("ngram", 4), 8, keeps_answers=True)
    requests = [Request(name, [1, 2] * 6, SamplingParams()) for name in "abc"]
    for request in requests:
        request.max_total_tokens = 100

    def num_indexed() -> list[int]:
        return [drafter.num_indexed for drafter in guessing._drafters.values()]

    for expected in ([10, 0, 0], [12, 8, 0], [12, 12, 1], [12, 12, 1]):
        guessing.take_in_prompts(requests)
        assert num_indexed() == expected
    guessing.end(requests.pop(0))
    guessing.take_in_prompts(requests)
    assert num_indexed() == [12, 11]
    assert not guessing._answers  # the one that has ended had none


def test_contexts_are_indexed_while_their_prompts_are_computed():
    """So that the first decode has guesses; a context that is only prepared has no decode."""
    core = EngineCore(
        CacheConfig(num_gpu_blocks=64, chunk_size=4),
        SchedulingConfig(max_model_len=64, max_num_batched_tokens=8, speculative={"method": "ngram"}),
    )
    core.add_request(Request("prepared", [3] * 20, SamplingParams(), is_prewarm=True), 0.0)
    assert core.schedule(0.0) is not None
    assert not core._scheduler._speculation._drafters
    core = EngineCore(core.cache_config, core.scheduling_config)
    core.add_request(Request("r", [1, 2] * 10, SamplingParams()), 0.0)
    plan = core.schedule(0.0)
    assert plan is not None
    assert plan.num_tokens == 8
    assert [drafter.num_indexed for drafter in core._scheduler._speculation._drafters.values()] == [20]


@pytest.mark.parametrize("is_ahead", [False, True])
def test_all_of_a_long_prompt_is_indexed_by_its_steps_and_what_decodes_say_is_not(monkeypatch, is_ahead):
    """In steps that are launched ahead, too, beside a request that decodes."""
    monkeypatch.setattr(speculation, "MAX_INDEXED_AT_ONCE", 8)
    core = EngineCore(
        CacheConfig(num_gpu_blocks=64, chunk_size=4),
        SchedulingConfig(max_model_len=64, max_num_batched_tokens=9, speculative={"method": "ngram"}),
    )
    core.add_request(Request("decodes", [5] * 4, SamplingParams(max_tokens=20)), 0.0)
    plan = core.schedule(0.0)
    core.update(plan, StepResult(plan.step_id, (6,)), 0.0)
    core.add_request(Request("long", [1, 2] * 16, SamplingParams()), 0.0)
    plan = core.schedule(0.0)
    indexed = []
    for _ in range(3):
        drafters = core._scheduler._speculation._drafters
        indexed.append({request.request_id: drafter.num_indexed for request, drafter in drafters.items()})
        after = core.schedule_ahead(0.0) if is_ahead else None
        core.update(plan, StepResult(plan.step_id, (7,)), 0.0)
        plan = after or core.schedule(0.0)
    assert indexed == [{"decodes": 4, "long": 8}, {"decodes": 4, "long": 16}, {"decodes": 4, "long": 24}]


def test_answers_of_others_are_looked_in_and_never_run_into_each_other():
    answers = RecentAnswers()
    answers.add([5, 6, 7])
    answers.add([8, 9])
    drafter = Drafter([1, 5, 6], 3, answers, HitRates())
    drafter.catch_up(100)
    assert drafter.guess(4) == [7]


def test_a_request_of_which_nothing_is_verified_is_looked_at_less_and_less_until_something_is():
    """What it has said meanwhile is indexed."""
    context = [1, 2, 3]
    drafter = Drafter(context, 3, None, HitRates())
    looks = []
    for token_id in range(100, 200):
        if not drafter.num_tokens_to_rest:
            looks.append(len(context))
            drafter.catch_up(100)
            assert drafter.num_indexed == len(context)
            drafter.note_use(False, 20)
        context.append(token_id)
    pauses = [after - before for before, after in itertools.pairwise(looks)]
    assert pauses == [1, 2, 4, 8, 16, 20, 20, 20]
    context += [1, 2] * 20
    drafter.catch_up(100)
    assert drafter.guess(2) == [1, 2]
    drafter.note_use(True, 20)
    assert not drafter.num_tokens_to_rest
    for _ in range(5):  # so nothing keeps a request from being followed token by token if looking costs next to nothing
        drafter.note_use(False, 1)
    assert drafter.num_unused == 0


NEW_TOKENS = itertools.count(1000)


def looks_of(guessing: Speculation, requests: list[Request], num_steps: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many contexts are looked at in so many steps, which each give each request a token that was nowhere before."""
    looks = []
    catch_up = Drafter.catch_up
    with monkeypatch.context() as patch:
        patch.setattr(Drafter, "catch_up", lambda *args: looks.append(args) or catch_up(*args))
        for _ in range(num_steps):
            assert guessing.guess(requests, 8) == {}
            for request in requests:
                request.token_ids.append(next(NEW_TOKENS))
    return len(looks)


def resting(name: str) -> Request:
    request = Request(name, [1], SamplingParams())
    request.max_total_tokens = 1000
    return request


@pytest.mark.parametrize(("step_s", "num_looks"), [(1e-1, 20), (1e-4, 5)])
def test_requests_rest_only_if_looking_at_them_is_a_part_of_the_step(step_s, num_looks, monkeypatch):
    guessing = Speculation(SpeculativeOptions("ngram", 4), 8, keeps_answers=True)
    for _ in range(2):
        guessing.note_step([QuerySegment("r", 0, (1,), True)], step_s)
    assert looks_of(guessing, [resting("r")], 20, monkeypatch) == num_looks


def test_a_request_rests_at_once_if_the_one_before_it_did_and_is_looked_at_beside_requests_that_rest(monkeypatch):
    guessing = Speculation(SpeculativeOptions("ngram", 4), 8, keeps_answers=True)
    for segments in ([QuerySegment("r", 0, (1,), True)], [QuerySegment(name, 0, (1,), True) for name in "ab"]):
        for _ in range(2):
            guessing.note_step(segments, 1e-4)
    first, second = resting("a"), resting("b")
    looks_of(guessing, [first], 100, monkeypatch)
    guessing.take_in_prompts([second])
    assert looks_of(guessing, [first, second], 1, monkeypatch) == 1  # at what is new
    guessing.end(first)
    assert looks_of(guessing, [resting("c")], 17, monkeypatch) == 2


def test_steps_of_another_number_of_requests_are_noted_after_a_rest(monkeypatch):
    """Or it would never be known what they take, and none of them would have guesses."""
    guessing = Speculation(SpeculativeOptions("ngram", 4), 8, keeps_answers=True)
    for _ in range(2):
        guessing.note_step([QuerySegment("r", 0, (1,), True)], 1e-4)
    requests = [resting("a")]
    looks_of(guessing, requests, 40, monkeypatch)
    requests.append(resting("b"))
    for _ in range(40):
        looks_of(guessing, requests, 1, monkeypatch)
        guessing.note_step([QuerySegment(request.request_id, 0, (1,), True) for request in requests], 1e-4)
    assert guessing._costs[2].base_s is not None


def test_of_answers_only_so_many_tokens_are_kept():
    answers = RecentAnswers()
    for _ in range(5):
        answers.add(random.Random(0).choices(range(1000), k=MAX_RECENT_TOKENS))
    assert len(answers.indexes) == 2
    assert sum(index.num_indexed for index in answers.indexes) <= 2 * (MAX_RECENT_TOKENS + 1)


def test_rates_follow_what_comes_true_by_the_length_of_the_match():
    rates = HitRates()
    for _ in range(40):
        rates.note(2, False)
        rates.note(20, True)
    assert sum(rates.chances(2, 8)) < 0.1
    assert rates.chances(20, 2)[1] > 0.9
    assert HitRates(rates).chances(20, 2) == rates.chances(20, 2)


def test_what_is_verified_is_what_gives_most_tokens_for_its_cost():
    """Against all choices, with the costs that were observed."""
    cost = StepCost()
    assert cost.needs_plain_step
    for _ in range(2):
        cost.note(0, 1.0)
    assert not cost.needs_plain_step
    for _ in range(200):
        for num in (1, 4, 8):
            cost.note(num, 1.2 + 0.1 * num)
    for chances in ([0.9, 0.8, 0.7, 0.6, 0.5], [0.3, 0.2], [0.2], [0.99] * 8):
        rates = [(1 + sum(chances[:num])) / (1.2 + 0.1 * num) for num in range(1, len(chances) + 1)]
        best = 1 + rates.index(max(rates))
        assert cost.choose(1, chances) == (best if max(rates) > 1.05 else 0)
    for _ in range(MAX_STEPS_IN_A_ROW):
        cost.note(1, 1.0)
    assert cost.needs_plain_step


def test_costs_that_were_high_once_are_tried_again_some_time():
    cost = StepCost()
    for _ in range(2):
        cost.note(0, 1.0)
    for _ in range(4):
        cost.note(4, 50.0)
    assert cost.choose(1, [0.3] * 4) == 0
    for _ in range(4000):
        cost.note(0, 1.0)
    assert cost.choose(1, [0.3] * 4) > 0
    assert PRIOR_ROW_COST < 0.1


@pytest.mark.parametrize(("chosen", "num_true"), [((5, 6, 7), 2), ((5, 9, 7), 1), ((9, 6, 7), 0)])
def test_true_guesses_are_those_that_were_chosen_up_to_the_first_that_was_not(chosen, num_true):
    segment = QuerySegment("r", 9, (4, 5, 6), True, num_guesses=2)
    assert (segment.guesses, segment.num_chosen) == ((5, 6), 3)
    assert segment.count_true(chosen) == num_true


def test_the_option_says_what_is_wrong_with_it():
    with pytest.raises(
        ConfigError, match=r"speculative must be a mapping of method to ngram .*, got {'method': 'eagle'}"
    ):
        SpeculativeOptions.of({"method": "eagle"})
