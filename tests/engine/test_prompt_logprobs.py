"""How probable the tokens of a prompt were: as transformers' forward says it, whatever is cached, evicted or suspended.

And the tokens that are generated behind it are those of a request that does not ask.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.core import scheduler
from engine.core.request import SamplingParams
from engine.step_loop import LookAhead
from tests.engine.test_equivalence import assert_same_tokens

OPTIONS = {"chunk_size": 8, "max_num_batched_tokens": 24, "max_num_seqs": 4, "max_model_len": 128}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, logprobs=2, ignore_eos=True)
SCORED = replace(GREEDY, prompt_logprobs=3)
PROMPT = [(7 * i + 3) % 250 + 2 for i in range(61)]


def scores(driver, request_id: str):
    first, *others = driver.outputs[request_id]
    assert not any(output.prompt_logprobs for output in others)
    return first.prompt_logprobs


def assert_same_scores(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.chosen == pytest.approx(other.chosen, abs=1e-3)
        assert [value for _, value in mine.top] == pytest.approx([value for _, value in other.top], abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_they_are_those_of_a_plain_forward(family, tiny_model, make_driver):
    """With the prompt in the cache before, and for two requests at once."""
    driver = make_driver(tiny_model(family), num_gpu_blocks=64, **OPTIONS)
    driver.generate("plain", PROMPT, sampling=GREEDY, conversation_id="c")
    driver.add("scored", PROMPT, sampling=SCORED, conversation_id="c")
    driver.add("other", PROMPT[:40], sampling=replace(SCORED, prompt_logprobs=0))
    driver.run()
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family)).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    for request_id, num_tokens, num_top in (("scored", len(PROMPT), 3), ("other", 40, 0)):
        told = scores(driver, request_id)
        assert len(told) == num_tokens - 1
        for position, each in enumerate(told):
            row = expected[position]
            assert each.chosen == pytest.approx(row[PROMPT[position + 1]].item(), abs=1e-3)
            assert [value for _, value in each.top] == pytest.approx(row.topk(num_top).values.tolist(), abs=1e-3)
            assert all(value == pytest.approx(row[i].item(), abs=1e-3) for i, value in each.top)
            assert abs(each.rank - 1 - int((row > each.chosen).sum())) <= 1  # equal ones, by rounding
    assert driver.cached["scored"] == 0
    assert assert_same_tokens(driver, _renamed(driver, "plain", "scored"), "scored") == 0
    driver.generate("after", PROMPT, sampling=GREEDY, conversation_id="d")
    assert driver.cached["after"] >= len(PROMPT) // 8 * 8 - 8
    driver.core.check_integrity()


def _renamed(driver, name: str, as_name: str):
    class Renamed:
        outputs = {as_name: driver.outputs[name]}  # noqa: RUF012

    return Renamed


@pytest.mark.parametrize(("look_ahead", "max_rows"), [(LookAhead.DRAFT, 256), (LookAhead.LAUNCH, 5)])
def test_stateful_is_stateless(look_ahead, max_rows, tiny_model, make_driver, monkeypatch):
    """Conversations over a GPU tier for few of them, with suspensions; some ask and others do not."""
    monkeypatch.setattr(scheduler, "MAX_SCORED_ROWS", max_rows)
    rng = random.Random(max_rows)
    kept = make_driver(
        tiny_model("llama"), num_gpu_blocks=19, num_cpu_blocks=6, decode_reserve=0.01, verify_swaps=True, **OPTIONS
    )
    fresh = make_driver(tiny_model("llama"), num_gpu_blocks=100, mode="stateless", **OPTIONS)
    kept.loop.look_ahead = look_ahead
    prompts, histories = {}, {f"c{number}": PROMPT[:19] for number in range(8)}
    for turn in range(3):
        for conversation in rng.sample(list(histories), len(histories)):
            request_id = f"{conversation}.{turn}"
            prompts[request_id] = histories[conversation] + rng.choices(range(3, 250), k=rng.randint(1, 20))
            sampling = rng.choice([SCORED, SCORED, GREEDY])
            kept.add(request_id, prompts[request_id], conversation, replace(sampling, max_tokens=rng.randint(4, 16)))
            kept.step()
            kept.core.check_integrity()
        kept.run()
        kept.core.check_integrity()
        for conversation in histories:
            histories[conversation] = prompts[f"{conversation}.{turn}"][:50]
    num_ties = 0
    for request_id, prompt in prompts.items():
        first = kept.outputs[request_id][0]
        sampling = SCORED if first.prompt_logprobs else GREEDY
        fresh.generate(request_id, prompt, sampling=replace(sampling, max_tokens=len(kept.outputs[request_id])))
        num_ties += assert_same_tokens(kept, fresh, request_id)
        assert_same_scores(scores(kept, request_id), scores(fresh, request_id))
        assert len(first.prompt_logprobs) in (0, len(prompt) - 1)
    assert num_ties <= 1
    stats = kept.core.get_statistics()
    assert stats["num_suspensions"]
    assert stats["num_gpu_cached_tokens"]
    for plan in kept.plans:
        assert sum(len(segment.targets) for segment in plan.segments) <= max_rows


def test_a_request_that_is_suspended_in_its_prompt_goes_on_there(tiny_model, make_driver):
    """Positions that have told what they know are taken from the cache; no token is told twice, and none is left out."""
    driver = make_driver(tiny_model("llama"), num_gpu_blocks=64, **OPTIONS)
    whole = make_driver(tiny_model("llama"), num_gpu_blocks=64, **OPTIONS)
    whole.generate("r", PROMPT, sampling=SCORED)
    driver.add("r", PROMPT, sampling=SCORED)
    driver.step()
    (request,) = driver.core._scheduler.running
    assert (request.num_scored, request.unscored) == (24, range(24, 60))
    driver.core._scheduler._suspend(request, driver.now)
    driver.core._scheduler._ahead = None
    num_computed = driver.core.stats.num_computed_tokens
    driver.run()
    assert driver.core.stats.num_computed_tokens - num_computed == len(PROMPT) - 24 + 5
    assert_same_scores(scores(driver, "r"), scores(whole, "r"))
    assert driver.tokens("r") == whole.tokens("r")


def test_a_prompt_of_one_token_has_none(tiny_model, make_driver):
    driver = make_driver(tiny_model("llama"), num_gpu_blocks=64, **OPTIONS)
    driver.generate("r", [5], sampling=SCORED)
    assert scores(driver, "r") == ()
