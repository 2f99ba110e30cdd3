"""Step times that were measured: what lies between them, what goes beside what, and that a model can be measured."""

import asyncio
import json
from dataclasses import replace

import pytest
import torch

from engine import cli, step_measurement
from engine.config import EngineConfig
from engine.core.executor_protocol import ExecutorFacts
from engine.core.plan import BlockCopy, QuerySegment, RequestStart, StepPlan
from engine.core.request import SamplingParams
from engine.errors import ConfigError
from engine.simulator.step_cost import StepWork
from engine.simulator.step_table import StepTable
from engine.step_measurement import Sizes, with_tiers_for_steps

TABLE = StepTable(
    measured_on="here",
    chunk_size=16,
    bytes_per_block=1000,
    num_tokens_s={1: 1.0, 4: 1.3, 16: 2.5},
    decodes_s={1: 1.1, 2: 1.3, 8: 1.6},
    pair_s=0.001,
    context_token_s=0.01,
    request_s=0.05,
    load_s=0.25,
    store_s=0.5,
    overlaps_copies=False,
)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (StepWork(1, 100), 1.1 + 1.0),
        (StepWork(4, 0), 1.4),
        (StepWork(14, 0), 1.9),  # as from 2 to 8
        (StepWork(0, 0, 10, 500), 1.3 + 1.2 * 6 / 12 + 0.5 + 0.1),  # what goes with a step of one decode, too
        (StepWork(4, 10, 16), 2.5 + 4 * 0.1 + 0.1 + (1.4 - 1.3)),  # as from 4 to 16, and what four decodes add
        # KV in front of prompts is read once for all of their tokens
        (
            StepWork(0, 0, 10, 500, prompt_context_len=100, num_starts=2),
            1.9 + 0.5 + 0.1 + 100 * (0.01 - 0.001) + 2 * 0.05,
        ),
        (StepWork(num_swap_ins=4), 1.0),
        (StepWork(4, 0, num_swap_ins=4, num_swap_outs=1, num_evictions=2), 1.0 + 1.4 + 1.0 + 0.5),
    ],
)
def test_a_step_takes_what_lies_between_the_measured_ones(work, seconds):
    assert TABLE.step_time(work) == pytest.approx(seconds)


def test_copies_go_beside_the_computation_where_the_device_can():
    work = StepWork(4, 0, num_swap_ins=4, num_swap_outs=1, num_evictions=2)
    assert replace(TABLE, overlaps_copies=True).step_time(work) == pytest.approx(1.0 + 1.4)


def test_a_chunk_costs_what_it_adds_to_a_large_step():
    model = TABLE.cost_model(32)
    assert (model.constant, model.per_context_token) == (pytest.approx(3.2), pytest.approx(0.032))
    assert (model.load_costs, model.is_in_seconds) == ({"cpu": 0.5}, True)


def test_a_saved_table_is_the_same_and_anything_else_is_refused(tmp_path):
    path = tmp_path / "steps.json"
    TABLE.save(path)
    assert StepTable.load(path) == TABLE
    data = json.loads(path.read_text())
    of_before = {name: value for name, value in data.items() if name != "decodes_s"}
    for wrong in ({**data, "num_tokens_s": {"1": 1.0}}, of_before, {"chunk_size": 16}, [1], {**data, "more": 1}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match="pensieve profile --steps"):
            StepTable.load(path)
    with pytest.raises(ConfigError, match="no table of steps"):
        StepTable.load(tmp_path / "absent.json")


def test_a_model_is_measured(tmp_path, capsys):
    path = tmp_path / "steps.json"
    options = ["--model", "embedded", "--num-threads", "1", "--max-model-len", "128", "--chunk-size", "16"]
    options += ["--max-num-seqs", "6"]
    assert cli.main(["profile", *options, "--steps", str(path)]) == 0
    table = StepTable.load(path)
    assert "embedded" in table.measured_on
    assert list(table.num_tokens_s) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert list(table.decodes_s) == [1, 2, 3, 4, 6]
    assert min(*table.num_tokens_s.values(), *table.decodes_s.values()) > 0
    assert min(table.pair_s, table.context_token_s) >= 0
    assert min(table.load_s, table.store_s, table.request_s) > 0
    assert not table.overlaps_copies
    assert str(path) in capsys.readouterr().out


def test_a_model_is_measured_as_on_a_gpu(tmp_path, monkeypatch):
    """What is asked of CUDA is answered here, and the rest computed on the CPU: longer prompts."""
    monkeypatch.setattr(ExecutorFacts, "is_on_cpu", property(lambda facts: False))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    path = tmp_path / "steps.json"
    options = ["--model", "embedded", "--num-threads", "1", "--max-model-len", "256", "--chunk-size", "16"]
    options += ["--max-num-seqs", "3", "--max-num-batched-tokens", "96"]
    assert cli.main(["profile", *options, "--steps", str(path)]) == 0
    table = StepTable.load(path)
    assert "a GPU" in table.measured_on
    assert list(table.num_tokens_s)[-1] == 96
    assert table.overlaps_copies


@pytest.mark.parametrize(("window", "num_tokens"), [(2048, 40_000), (16_384, 40_000), (131_072, 132_000)])
def test_the_tier_of_a_gpu_is_not_much_larger_than_what_is_timed(window, num_tokens):
    """Each of 16 requests has its context; one of 131072 tokens of Llama-8B takes 17 GB."""
    config = with_tiers_for_steps(EngineConfig(), window, is_on_cpu=False)
    assert config.num_gpu_blocks is not None
    assert window <= config.num_gpu_blocks * config.chunk_size < num_tokens
    decoding = Sizes.of(config, window, is_on_cpu=False)
    assert decoding.num_decodes * decoding.long_context < 0.9 * config.num_gpu_blocks * config.chunk_size


@pytest.mark.parametrize("num_busy", [1, 100])
def test_requests_that_did_not_decode_together_are_asked_again(monkeypatch, num_busy):
    """As on a busy machine: the first request has ended before the last one is heard of."""
    asked = []

    async def stamp_decodes(engine, num, context_len, vocab_size, max_tokens):
        asked.append(max_tokens)
        alone = [[0.0, 1.0, 2.0], [5.0, 6.0, 7.0]]
        return alone if len(asked) <= num_busy else [[0.0, 1.0, 3.0, 5.0], [1.0, 3.0, 5.0, 7.0]]

    monkeypatch.setattr(step_measurement, "_stamp_decodes", stamp_decodes)
    measuring = step_measurement._time_decodes(None, 2, 8, 100)
    if num_busy > 1:
        with pytest.raises(ConfigError, match="when it is idle"):
            asyncio.run(measuring)
        return
    assert asyncio.run(measuring) == (2.0, 2 * (8 + 0.5 + 1))
    assert asked == [14, 96]


def test_the_work_of_a_step_is_counted():
    """Two prompts, one of which goes on behind 40 tokens, and a decode; two requests begin with it."""
    starts = tuple(RequestStart(name, 50, 50, SamplingParams(), (), (0,)) for name in "ab")
    segments = (
        QuerySegment("a", 40, tuple(range(10)), samples=True),
        QuerySegment("b", 0, (1, 2, 3)),
        QuerySegment("c", 99, None, samples=True),
    )
    plan = StepPlan(0, segments, starts, swap_ins=(BlockCopy("cpu", 1, "gpu", 2),))
    assert StepWork.of(plan) == StepWork(
        num_decodes=1,
        decode_context_len=100,
        num_prompt_tokens=13,
        num_prompt_pairs=10 * 40 + 55 + 6,
        num_swap_ins=1,
        prompt_context_len=40,
        num_starts=2,
    )


def test_a_window_that_is_too_small_is_refused(tmp_path, capsys):
    options = ["--model", "embedded", "--num-threads", "1", "--max-model-len", "100"]
    assert cli.main(["profile", *options, "--steps", str(tmp_path / "steps.json")]) == 1
    assert "a window of 100 tokens is too small" in capsys.readouterr().err
