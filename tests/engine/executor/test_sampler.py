"""Sampling against transformers' own logits processors, and its promise that a draw depends on seed and position alone."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.core.grammar import GrammarSpec
from engine.core.request import SamplingParams
from engine.executor import sampler
from engine.executor.sampler import SamplingBatch, SamplingState, sample, uniform

VOCABULARY = 40


def make_logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2.5


def state(token_ids=(1, 2, 3), num_prompt=None, stop=(), **params) -> SamplingState:
    params = {"temperature": 1.0, "seed": 0, **params}
    num_prompt = len(token_ids) if num_prompt is None else num_prompt
    return SamplingState(SamplingParams(**params), len(token_ids), num_prompt, stop, token_ids)


def tensors_of(batch: SamplingBatch) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in {**batch.arrays, **batch.make_masks()}.items()}


def chosen(logits: torch.Tensor, states: list[SamplingState]) -> list[int]:
    return list(sample(logits, states)[0])


def distribution(logits: torch.Tensor, sampling_state: SamplingState, monkeypatch) -> torch.Tensor:
    """Probabilities from which the next token of one request is drawn."""
    seen = {}
    inner = sampler._invert_cdf

    def spy(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        seen["probs"] = probs[0] / probs[0].sum()
        return inner(probs, uniforms)

    def spy_filter(scaled: torch.Tensor, params: list[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
        probs, ids = filter_(scaled, params)
        seen["ids"] = ids[0]
        return probs, ids

    filter_ = sampler._filter
    monkeypatch.setattr(sampler, "_invert_cdf", spy)
    monkeypatch.setattr(sampler, "_filter", spy_filter)
    sample(logits, [sampling_state])
    monkeypatch.undo()
    ids = seen.get("ids", torch.arange(logits.shape[-1]))
    return torch.zeros(logits.shape[-1]).scatter(0, ids, seen["probs"])


# -- against transformers ----------------------------------------------------------------------------------------------

FILTERS = [
    {},
    {"temperature": 0.4},
    {"temperature": 3.0},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 1000},
    {"top_p": 0.7},
    {"top_p": 0.05},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.8},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.9, "top_p": 0.9, "min_p": 0.2, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_probabilities_equal_those_of_transformers_processors(params, monkeypatch):
    token_ids = (3, 3, 7, 11, 20, 21)
    for seed in range(10):
        logits = make_logits(1, seed)
        processors = LogitsProcessorList()
        if "repetition_penalty" in params:
            processors.append(RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
        if "temperature" in params:
            processors.append(TemperatureLogitsWarper(params["temperature"]))
        if "top_k" in params:
            processors.append(TopKLogitsWarper(params["top_k"]))
        if "top_p" in params:
            processors.append(TopPLogitsWarper(params["top_p"]))
        if "min_p" in params:
            processors.append(MinPLogitsWarper(params["min_p"]))
        expected = processors(torch.tensor([token_ids]), logits.clone()).softmax(-1)[0]
        actual = distribution(logits.clone(), state(token_ids, num_prompt=4, **params), monkeypatch)
        assert (actual > 0).tolist() == (expected > 0).tolist()
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


def test_presence_and_frequency_penalties_count_the_answer_alone(monkeypatch):
    """OpenAI's formula: logit - frequency * count - presence * (count > 0), over the generated tokens."""
    logits = make_logits(1)
    sampling = state((5, 5, 6, 7, 7, 7, 8), num_prompt=3, presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits[0].clone()
    expected[7] -= 0.5 + 3 * 0.25
    expected[8] -= 0.5 + 0.25
    torch.testing.assert_close(distribution(logits, sampling, monkeypatch), expected.softmax(-1))


def test_penalties_take_in_each_new_token():
    """Five equal logits and a presence penalty: greedy takes each token once before any a second time."""
    logits = torch.full((1, 5), 1.0)
    sampling = state((0,), num_prompt=1, temperature=0.0, presence_penalty=1.0, frequency_penalty=1.0)
    assert sorted(chosen(logits, [sampling])[0] for _ in range(5)) == [0, 1, 2, 3, 4]


def test_each_row_gets_its_own_parameters():
    """A batch of all kinds at once gives each request what it gets alone."""
    logits = make_logits(len(FILTERS) + 2, seed=5)
    all_params = [*FILTERS, {"temperature": 0.0}, {"temperature": 0.0, "repetition_penalty": 1.9}]

    def states() -> list[SamplingState]:
        return [state((i, 7, 9), num_prompt=2, seed=i, **params) for i, params in enumerate(all_params)]

    together = chosen(logits.clone(), states())
    alone = [chosen(logits[i : i + 1].clone(), [s])[0] for i, s in enumerate(states())]
    assert together == alone


# -- greedy ------------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_maximum_and_ignores_the_filters():
    logits = make_logits(3)
    states = [state(temperature=0.0), state(temperature=0.0, top_k=3), state(temperature=0.0, seed=9, top_p=0.1)]
    assert chosen(logits, states) == logits.argmax(-1).tolist()


def test_the_callers_logits_are_left_alone():
    logits = make_logits(2)
    before = logits.clone()
    sample(
        logits, [state(repetition_penalty=2.0, min_tokens=1, stop=(4,)), state(temperature=0.0, presence_penalty=1.0)]
    )
    assert torch.equal(logits, before)


def test_no_request_no_token():
    assert sample(torch.empty(0, VOCABULARY), []) == ((), ())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_sampled_in_float32(dtype):
    logits = make_logits(4).to(dtype)
    states = [state(seed=i, temperature=t, top_p=p) for i, (t, p) in enumerate([(0, 1), (1, 1), (1, 0.5), (2, 1)])]
    again = [state(seed=i, temperature=t, top_p=p) for i, (t, p) in enumerate([(0, 1), (1, 1), (1, 0.5), (2, 1)])]
    assert chosen(logits, states) == chosen(logits.float(), again)


# -- randomness --------------------------------------------------------------------------------------------------------


def test_uniform_depends_on_seed_and_position_and_lies_in_the_unit_interval():
    numbers = {uniform(seed, position) for seed in range(-5, 45) for position in range(50)}
    assert len(numbers) == 2500
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert uniform(3, 14) == uniform(3, 14)
    assert abs(sum(numbers) / 2500 - 0.5) < 0.02


@pytest.mark.parametrize("params", [{}, {"top_k": 8}, {"top_p": 0.9}, {"min_p": 0.02, "temperature": 1.5}], ids=str)
def test_a_draw_does_not_depend_on_its_neighbours(params):
    logits = make_logits(6)
    alone = chosen(logits[2:3].clone(), [state(seed=11, **params)])[0]
    for neighbour in [{}, {"top_k": 2}, {"temperature": 0.0}, {"repetition_penalty": 1.5, "logprobs": 2}]:
        states = [state(seed=i, **neighbour) for i in range(6)]
        states[2] = state(seed=11, **params)
        assert chosen(logits.clone(), states)[2] == alone


def test_filters_sort_no_more_than_they_keep_and_widen_where_they_must(monkeypatch):
    """A vocabulary larger than the candidates that are sorted at first: the same probabilities as transformers'."""
    sizes = []
    inner = sampler._sorted_candidates
    monkeypatch.setattr(sampler, "_sorted_candidates", lambda scaled, n: (sizes.append(n), inner(scaled, n))[1])
    logits = make_logits(3, vocabulary=20000)
    few, some, all_ = ({"top_k": 3, "top_p": 0.9}, {"top_p": 0.5}, {"temperature": 5.0, "top_p": 0.9999})
    for row, (params, most) in enumerate([(few, 64), (some, 4096), (all_, 20000)]):
        sizes.clear()
        options = SamplingParams(**{"temperature": 1.0, **params})
        scaled = (logits[row : row + 1] - logits[row].max()) / options.temperature
        probs, ids = sampler._filter(scaled, [options])
        assert max(sizes) <= most
        processors = LogitsProcessorList()
        if "top_k" in params:
            processors.append(TopKLogitsWarper(params["top_k"]))
        processors.append(TopPLogitsWarper(params["top_p"]))
        expected = processors(torch.tensor([[1]]), scaled.clone()).softmax(-1)
        actual = torch.zeros(1, 20000).scatter(1, ids, probs / probs.sum())
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)
    # One wide row widens the batch; what the others keep stays the same.
    options = [SamplingParams(**{"temperature": 1.0, **params}) for params in (few, some, all_)]
    scaled = logits - logits.max(-1, keepdim=True).values
    probs, ids = sampler._filter(scaled, options)
    for row in range(3):
        alone_probs, alone_ids = sampler._filter(scaled[row : row + 1], options[row : row + 1])
        num_kept = int((alone_probs > 0).sum())
        assert torch.equal(ids[row, :num_kept], alone_ids[0, :num_kept])
        torch.testing.assert_close(probs[row, :num_kept], alone_probs[0, :num_kept])
        assert not probs[row, num_kept:].any()


def test_equal_logits_are_kept_by_id_whatever_else_is_in_the_batch():
    """Half-precision logits are often equal; which of them a filter keeps must not depend on the neighbours."""
    logits = torch.zeros(2, 5000)
    logits[0, 100:400] = 3.0
    scaled = logits - logits.max(-1, keepdim=True).values
    for params in ({"top_k": 7}, {"top_p": 0.001}):
        narrow = SamplingParams(temperature=1.0, **params)
        wide = SamplingParams(temperature=1.0, top_p=0.9)
        alone = sampler._filter(scaled[:1], [narrow])
        together = sampler._filter(scaled, [narrow, wide])
        kept = [ids[0, : int((probs[0] > 0).sum())].tolist() for probs, ids in (alone, together)]
        assert kept[0] == kept[1] == list(range(100, 100 + len(kept[0])))
        assert len(kept[0]) >= 1


def test_a_resumed_request_draws_what_it_would_have_drawn():
    """The state is made anew from the context, as after a suspension."""
    rows = [make_logits(1, seed) for seed in range(12)]
    params = {"seed": 4, "temperature": 1.3, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    whole = state((1, 2, 3), **params)
    expected = [chosen(row, [whole])[0] for row in rows]
    resumed = state((1, 2, 3, *expected[:5]), num_prompt=3, **params)
    assert [chosen(row, [resumed])[0] for row in rows[5:]] == expected[5:]


def test_seeds_and_positions_draw_differently():
    logits = torch.zeros(64, 1000)
    by_seed = chosen(logits, [state(seed=seed) for seed in range(64)])
    by_position = chosen(logits, [state(tuple(range(1, n + 2)), seed=0) for n in range(64)])
    assert len(set(by_seed)) > 50
    assert len(set(by_position)) > 50


@pytest.mark.parametrize("params", [{}, {"top_p": 0.95}, {"top_k": 6}, {"temperature": 1.4, "min_p": 0.05}], ids=str)
def test_draws_follow_the_distribution(params, monkeypatch):
    """Pearson's statistic over 4,000 fixed seeds against the probabilities."""
    num_draws = 4000
    logits = make_logits(1, seed=3, vocabulary=10) * 0.5
    expected = distribution(logits, state(**params), monkeypatch) * num_draws
    counts = Counter(chosen(logits.expand(num_draws, -1), [state(seed=seed, **params) for seed in range(num_draws)]))
    assert all(expected[token_id] > 0 for token_id in counts), "a token that was filtered out was drawn"
    cells = [i for i in range(10) if expected[i] > 0]
    assert min(expected[cells]) > 5
    statistic = sum((counts[i] - expected[i].item()) ** 2 / expected[i].item() for i in cells)
    degrees = len(cells) - 1
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)


def test_the_ends_of_the_cumulative_distribution_never_draw_the_impossible(monkeypatch):
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 2.0, -math.inf]])
    for number, token_id in [(0.0, 1), (math.nextafter(1.0, 0.0), 3)]:
        monkeypatch.setattr(sampler, "uniform", lambda seed, position, number=number: number)
        for params in [{}, {"top_k": 4}, {"top_p": 0.99}, {"min_p": 0.01}]:
            drawn = chosen(logits, [state(**params)])[0]
            assert drawn in (1, 3)
            if not params:
                assert drawn == token_id


# -- edges -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-38, 1e-45, 1e-60, 5e-324])
@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_tiny_temperature_is_greedy(temperature, params):
    logits = make_logits(8)
    states = [state(seed=seed, temperature=temperature, **params) for seed in range(8)]
    assert chosen(logits, states) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("top_p", [1e-38, 1e-45, 1e-60, 5e-324])
def test_a_tiny_top_p_is_greedy(top_p):
    logits = make_logits(8)
    assert chosen(logits, [state(seed=seed, top_p=top_p) for seed in range(8)]) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("penalty", [1e-38, 1e-45, 5e-324])
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 5e-324}, {"temperature": 0.0}, {"top_p": 5e-324}, {"top_k": 3}], ids=str
)
def test_a_tiny_repetition_penalty_repeats(penalty, params):
    """Two of the three seen tokens become as probable as a number can say; a barred one stays barred."""
    logits = torch.tensor([[9.0, 2.0, -math.inf, 1.0, -5.0]]).expand(20, -1)
    states = [state(seed=seed, repetition_penalty=penalty, **params) for seed in range(20)]
    assert set(chosen(logits, states)) <= {1, 3}


def test_the_highest_temperature_draws_nearly_evenly():
    logits = make_logits(1).expand(400, -1)
    drawn = chosen(logits, [state(seed=seed, temperature=100.0) for seed in range(400)])
    assert len(set(drawn)) == VOCABULARY


def test_huge_logits_do_not_overflow():
    logits = torch.tensor([[3e38, -3e38, 1.0, 3e38]])
    for params in [{}, {"temperature": 0.01}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.5}]:
        assert set(chosen(logits.expand(20, -1), [state(seed=seed, **params) for seed in range(20)])) <= {0, 3}


def test_min_tokens_bars_the_stop_ids_until_then():
    logits = torch.zeros(1, 5)
    logits[0, 2], logits[0, 4] = 9.0, 8.0
    sampling = state((1,), stop=(2, 4), temperature=0.0, min_tokens=2)
    assert [chosen(logits, [sampling])[0] for _ in range(4)] == [0, 0, 2, 2]
    drawn = [chosen(logits, [state(seed=seed, stop=(2, 4), min_tokens=1)])[0] for seed in range(50)]
    assert set(drawn) <= {0, 1, 3}


def test_barred_ids_stay_barred_under_penalties():
    logits = torch.zeros(1, 4)
    logits[0, 2] = 9.0
    for penalty in (0.5, 2.0):
        sampling = state(
            (2,), stop=(2,), temperature=0.0, min_tokens=1, repetition_penalty=penalty, presence_penalty=-2.0
        )
        assert chosen(logits, [sampling]) != [2]


# -- log-probabilities -------------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own():
    """Before penalties, temperature and filters; the chosen token's also where it is not among the best."""
    logits = make_logits(4)
    expected = logits.log_softmax(-1)
    states = [
        state(seed=0, temperature=5.0, logprobs=2),
        state(seed=1),
        state(seed=2, temperature=0.0, logprobs=0, repetition_penalty=1.9),
        state(seed=3, temperature=0.0, logprobs=20, top_k=1),
    ]
    token_ids, logprobs = sample(logits, states)
    assert [None if each is None else len(each.top) for each in logprobs] == [2, None, 0, 20]
    for row in (0, 2, 3):
        assert logprobs[row].chosen == pytest.approx(expected[row, token_ids[row]].item(), abs=1e-5)
        best = expected[row].topk(len(logprobs[row].top))
        assert [i for i, _ in logprobs[row].top] == best.indices.tolist()
        assert [value for _, value in logprobs[row].top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_without_a_request_for_logprobs_there_are_none():
    assert sample(make_logits(2), [state(), state(temperature=0.0)])[1] == ()


def test_more_logprobs_than_tokens_give_all_of_them():
    _, (logprobs,) = sample(torch.tensor([[1.0, 3.0, 2.0]]), [state(temperature=0.0, logprobs=20)])
    assert [i for i, _ in logprobs.top] == [1, 2, 0]


# -- without waiting for a device --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_candidates", [1, 8, 1024])
def test_looking_later_whether_a_filter_kept_more_gives_the_same(num_candidates, monkeypatch):
    """What was guessed to be enough may not be: then it is drawn again, wherever else a row wants log-probabilities."""
    monkeypatch.setattr(sampler, "MIN_CANDIDATES_UNSEEN", num_candidates)
    others = [{"logprobs": 3}, {"temperature": 0.0, "logprobs": 0}, {"presence_penalty": 1.0, "min_tokens": 9}]
    all_params = [*FILTERS, *others, {"top_p": 0.9, "logprobs": 1}]

    def states() -> list[SamplingState]:
        return [state((i, 7, 9, 9), 2, (3, 50), seed=i, **params) for i, params in enumerate(all_params)]

    for seed in range(5):
        logits = make_logits(len(all_params), seed=seed, vocabulary=200)
        at_once = sample(logits, states())
        later_states = states()
        batch = sampler.SamplingBatch(later_states, 200)
        tensors = tensors_of(batch)
        draw = batch.draw(logits, tensors, looks_later=True)
        assert draw.finish() == at_once
        assert tuple(draw.token_ids.tolist()) == at_once[0]
        counts = [each.output_counts for each in later_states if each.params.has_penalties]
        assert counts
        assert all(count.total() == 3 for count in counts)  # two before, and the new one


def test_only_what_the_requests_need_travels():
    assert sampler.SamplingBatch([state(temperature=0.0), state(temperature=0.0)], 40).arrays == {}
    arrays = sampler.SamplingBatch([state(temperature=0.0), state(top_p=0.5), state()], 40).arrays
    assert set(arrays) == {"temperature", "uniform", "plain_rows", "filtered_rows", "top_k", "top_p", "min_p"}
    assert arrays["plain_rows"].tolist() == [2]
    assert arrays["filtered_rows"].tolist() == [1]


def test_a_stop_id_outside_the_vocabulary_bars_nothing():
    logits = torch.zeros(2, 5)
    logits[:, 1] = 1.0
    states = [state(stop=(6,), temperature=0.0, min_tokens=5, num_prompt=3), state(temperature=0.0)]
    assert chosen(logits, states) == [1, 1]


def test_the_largest_of_half_precision_logits_is_that_of_their_floats():
    """Ties included, of which bfloat16 has many."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40, 5000, generator=generator).bfloat16()
    batch = sampler.SamplingBatch([state(temperature=0.0) for _ in range(40)], 5000)
    assert batch.arrays == {}
    draws = [batch.draw(values, {}, looks_later=True) for values in (logits, logits.float())]
    assert torch.equal(draws[0].token_ids, draws[1].token_ids)


# -- grammars ----------------------------------------------------------------------------------------------------------


class AllowList:
    """A matcher that allows the same tokens at every place."""

    error = None

    def __init__(self, allowed) -> None:
        self.allowed = sorted(allowed)
        self.accepted: list[int] = []

    def fill(self, mask: np.ndarray) -> None:
        assert mask.nbytes % 4 == 0
        bits = np.zeros(8 * len(mask), np.uint8)
        bits[self.allowed] = 1
        mask[:] = np.packbits(bits, bitorder="little")

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def held(allowed, token_ids=(1, 2, 3), **params) -> SamplingState:
    params = {"temperature": 1.0, "seed": 0, **params}
    grammar = GrammarSpec("regex", "x")
    sampling = SamplingParams(grammar=grammar, **params)
    return SamplingState(sampling, len(token_ids), len(token_ids), (), token_ids, AllowList(allowed))


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_a_grammar_leaves_the_probabilities_of_what_it_allows(params, monkeypatch):
    """As if the model had never heard of the other tokens: top_k counts, and top_p adds up, what is allowed."""
    for seed in range(10):
        logits = make_logits(1, seed)
        allowed = list(range(seed % 3, VOCABULARY, 1 + seed))
        small = torch.full_like(logits, float("-inf"))
        small[0, allowed] = logits[0, allowed]
        expected = distribution(small, state((1, 2, 3), **params), monkeypatch)
        assert set(expected.nonzero().flatten().tolist()) <= set(allowed)
        assert torch.equal(distribution(logits.clone(), held(allowed, **params), monkeypatch), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("looks_later", [False, True])
def test_rows_with_and_without_a_grammar_do_not_touch_each_other(dtype, looks_later):
    vocabulary, rows = 1003, 40
    logits = make_logits(rows, vocabulary=vocabulary).to(dtype)
    rng = random.Random(0)
    lists = {row: rng.sample(range(vocabulary), rng.choice([1, 2, 40, 900])) for row in range(0, rows, 2)}
    ways = [{"temperature": 0.0}, {}, {"top_k": 7}, {"top_p": 0.8}, {"repetition_penalty": 1.5}, {"logprobs": 3}]

    def states():
        chosen = [{**ways[row % len(ways)], "seed": row} for row in range(rows)]
        return [held(lists[r], **p) if r in lists else state(**p) for r, p in enumerate(chosen)]

    whole = states()
    batch = SamplingBatch(whole, vocabulary)
    arrays = tensors_of(batch)
    tokens, logprobs = batch.draw(logits.clone(), arrays, looks_later=looks_later).finish()
    alone = [sample(logits[row : row + 1].clone(), [each]) for row, each in enumerate(states())]
    assert list(tokens) == [result[0][0] for result in alone]
    assert all(tokens[row] in allowed for row, allowed in lists.items())
    assert all(whole[row].matcher.accepted == [tokens[row]] for row in lists)
    for row in range(rows):
        if whole[row].params.logprobs is not None:  # the model's own, of tokens that are not allowed too
            own = logits[row].float().log_softmax(-1)
            assert logprobs[row].chosen == pytest.approx(own[tokens[row]].item(), abs=1e-5)
            assert [i for i, _ in logprobs[row].top] == own.topk(3).indices.tolist()


def test_a_filter_that_finds_few_tokens_allowed_sorts_no_more(monkeypatch):
    """On a GPU, looking again would compute the steps behind once more."""
    vocabulary = 4000
    states = [held([5, 9, 77], top_k=50), held([5], top_p=0.9), held([5, 9], top_k=3, min_p=0.01)]
    batch = SamplingBatch(states, vocabulary)
    arrays = tensors_of(batch)
    draw = batch.draw(make_logits(3, vocabulary=vocabulary), arrays, looks_later=True)
    tokens, _ = draw.finish()
    assert not draw.was_corrected
    assert tokens[0] in (5, 9, 77)
    assert tokens[1] == 5


def test_without_a_grammar_nothing_is_masked():
    without = SamplingBatch([state(), state(temperature=0.0)], VOCABULARY)
    assert not without.has_masks
    assert not without.make_masks()
    assert not SamplingBatch([state(temperature=0.0)], VOCABULARY).arrays


@pytest.mark.parametrize("looks_later", [False, True])
def test_a_bias_is_added_before_penalties_and_temperature(looks_later):
    """In its own row only; log-probabilities stay the model's own."""
    logits = make_logits(3)
    ways = [{"temperature": 0.7, "top_k": 5}, {"temperature": 0.0, "repetition_penalty": 1.7}, {"temperature": 1.0}]
    bias = ((3, 12.0), (1, -2.0))
    added = logits.clone()
    for token_id, amount in bias:
        added[:2, token_id] += amount

    def draw(rows, **more):
        states = [state((1, 2, 3), logprobs=2, **way, **(more if row < 2 else {})) for row, way in enumerate(ways)]
        batch = SamplingBatch(states, VOCABULARY)
        arrays = tensors_of(batch)
        return batch.draw(rows.clone(), arrays, looks_later=looks_later).finish()

    tokens, logprobs = draw(logits, logit_bias=bias)
    assert tokens == draw(added)[0]
    assert tokens != draw(logits)[0]
    assert [each.top for each in logprobs] == [each.top for each in draw(logits)[1]]


def test_a_large_bias_decides_and_one_outside_the_vocabulary_does_nothing():
    logits = make_logits(1)
    best = int(logits.argmax())
    assert chosen(logits, [state(temperature=0.0, logit_bias=((best, -100.0),))]) != [best]
    assert chosen(logits, [state(temperature=1.0, logit_bias=((5, 100.0),))]) == [5]
    assert chosen(logits, [state(temperature=0.0, logit_bias=((VOCABULARY + 5, 100.0),))]) == [best]
