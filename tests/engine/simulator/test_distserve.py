"""Step times that others measured on the same device with the same model, beside those of the roofline."""

import pytest

from engine.simulator.devices import DEVICES, MODELS
from engine.simulator.distserve import DistServe
from engine.simulator.step_cost import Roofline, StepWork

SHAPE = MODELS["opt-13b"]
BYTES_PER_BLOCK = SHAPE.kv_bytes_per_token * 32
DISTSERVE = DistServe(BYTES_PER_BLOCK)
ROOFLINE = Roofline(SHAPE, DEVICES["a100-80gb"], BYTES_PER_BLOCK)


def prompts(*lens: int) -> StepWork:
    return StepWork(num_prompt_tokens=sum(lens), num_prompt_pairs=sum(n * (n + 1) // 2 for n in lens))


def ratio(work: StepWork) -> float:
    """The roofline's time over DistServe's."""
    return ROOFLINE.step_time(work) / DISTSERVE.step_time(work)


def test_its_times_are_those_of_its_formulas():
    """By hand, from its coefficients; milliseconds."""
    assert DISTSERVE.step_time(prompts(512)) == pytest.approx(
        1e-3 * (18.1025 + 0.101912 * 512 + 7.12226e-6 * 512**2), rel=1e-4
    )
    assert DISTSERVE.step_time(prompts(100, 300)) == pytest.approx(
        1e-3 * (18.1025 + 0.101912 * 400 + 7.12226e-6 * (100**2 + 300**2)), rel=1e-4
    )
    assert DISTSERVE.step_time(StepWork(8, 8 * 400)) == pytest.approx(
        1e-3 * (19.9347 + 6.26936e-4 * 3200 + 0.038507 * 8), rel=1e-4
    )
    assert DISTSERVE.step_time(StepWork(128, 128 * 400)) == pytest.approx(
        1e-3 * (7.16619 + 5.798e-4 * 128 * 400 + 0.158311 * 128), rel=1e-4
    )


@pytest.mark.parametrize("context_len", [64, 256, 1024, 2048])
def test_decodes_agree(context_len):
    """Within a fifth up to the size at which DistServe takes another line, and a quarter behind it."""
    for num in (1, 2, 4, 8, 16, 32, 64, 94):
        assert ratio(StepWork(num, num * context_len)) == pytest.approx(1, abs=0.2)
    for num in (95, 128, 200, 256):
        assert ratio(StepWork(num, num * context_len)) == pytest.approx(1, abs=0.25)


def test_prompts_agree_from_some_hundred_tokens_on():
    """What of a step takes one prompt or several."""
    for lens in ((400,), (512,), (1024,), (2048,), (128,) * 8, (256,) * 8, (512,) * 4):
        assert ratio(prompts(*lens)) == pytest.approx(1, abs=0.15)


def test_prompts_differ_if_they_are_short_or_very_long():
    """Where, which way, and by how much.

    Short: the roofline takes the longer of reading the weights and computing, where DistServe's line adds its constant. Long:
    the paper's attention of prompts, from its Figure 4, takes 1.6 times as long as DistServe's.
    """
    assert ratio(prompts(128)) == pytest.approx(0.67, abs=0.02)
    assert ratio(prompts(8192)) == pytest.approx(1.30, abs=0.02)
    assert ROOFLINE.pair_s / DISTSERVE.pair_s == pytest.approx(1.6, abs=0.01)


def test_copies_and_steps_of_both_kinds():
    both = StepWork(8, 8 * 400, *prompts(512)[2:4])
    assert max(map(DISTSERVE.step_time, (prompts(512), StepWork(8, 8 * 400)))) < DISTSERVE.step_time(both)
    assert DISTSERVE.step_time(both) < DISTSERVE.step_time(prompts(512)) + DISTSERVE.step_time(StepWork(8, 8 * 400))
    copies = StepWork(num_swap_ins=100, num_swap_outs=30, num_evictions=5)
    assert DISTSERVE.step_time(copies) == pytest.approx(ROOFLINE.step_time(copies) - ROOFLINE.overhead_s)
    assert DISTSERVE.step_time(StepWork()) == 0
