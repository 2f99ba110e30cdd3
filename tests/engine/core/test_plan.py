"""Plans are plain data: they travel to workers and compare in tests."""

import dataclasses
import pickle

import pytest

from engine.core.plan import BlockAppend, BlockCopy, Logprobs, QuerySegment, RequestStart, StepPlan, StepResult
from engine.core.request import SamplingParams


def make_plan(num_decodes: int = 0) -> StepPlan:
    sampling = SamplingParams(temperature=0.5, stop=("\n",), stop_token_ids=(7,))
    decodes = tuple(QuerySegment(f"d{i}", 1000 + i, None, True) for i in range(num_decodes))
    return StepPlan(
        step_id=3,
        segments=(QuerySegment("r1", 0, (5, 6, 7, 8)), QuerySegment("r1", 8, (1, 2), True), *decodes),
        starts=(RequestStart("r1", 10, 10, sampling, (7,), (7, 3, 5), (5, 6, 7, 8, 1, 1, 1, 1, 1, 2)),),
        appends=(BlockAppend("r0", 2),),
        ended=("r9",),
        local_copies=(BlockCopy("gpu", 1, "gpu", 5),),
    )


def plain(value: object) -> bool:
    """Made of ints, strings, floats, tuples and frozen dataclasses alone."""
    if dataclasses.is_dataclass(value):
        return all(plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, tuple):
        return all(map(plain, value))
    return value is None or isinstance(value, (int, str, float))


def test_a_plan_survives_pickling_and_compares_by_value():
    plan = make_plan()
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert hash(again) == hash(plan)
    assert dataclasses.replace(plan, ended=()) != plan
    assert plain(plan)


def test_a_result_survives_pickling():
    result = StepResult(3, (4, 7), (Logprobs(-0.5, ((4, -0.5), (9, -1.0))), None), failed_swap_ins=(2,))
    assert pickle.loads(pickle.dumps(result)) == result
    assert plain(result)


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_plan().step_id = 4  # type: ignore[misc]


def test_a_decode_adds_few_bytes_to_a_plan():
    """A step is told as a difference: a decode with 30 blocks behind it sends no token and no block table."""
    per_decode = (len(pickle.dumps(make_plan(264))) - len(pickle.dumps(make_plan(64)))) / 200
    assert per_decode < 40


def test_lengths_of_a_plan_and_its_segments():
    plan = make_plan(2)
    assert plan.num_tokens == 8
    assert [(s.query_len, s.context_len) for s in plan.segments] == [(4, 4), (2, 10), (1, 1001), (1, 1002)]
