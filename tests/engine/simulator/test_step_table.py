"""Step times that were measured: what lies between them, what goes beside what, and that a model can be measured."""

import json
from dataclasses import replace

import pytest

from engine import cli
from engine.errors import ConfigError
from engine.simulator.step_cost import StepWork
from engine.simulator.step_table import StepTable

TABLE = StepTable(
    measured_on="here",
    chunk_size=16,
    bytes_per_block=1000,
    num_tokens_s={1: 1.0, 4: 1.3, 16: 2.5},
    pair_s=0.001,
    context_token_s=0.01,
    load_s=0.25,
    store_s=0.5,
    overlaps_copies=False,
)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (StepWork(1, 100), 1.0 + 1.0),
        (StepWork(4, 0), 1.3),
        (StepWork(0, 0, 10, 500), 1.3 + 1.2 * 6 / 12 + 0.5),
        (StepWork(16, 0, 4), 2.5 + 4 * 0.1),  # as from 4 to 16
        (StepWork(num_swap_ins=4), 1.0),
        (StepWork(4, 0, num_swap_ins=4, num_swap_outs=1, num_evictions=2), 1.0 + 1.3 + 1.0 + 0.5),
    ],
)
def test_a_step_takes_what_lies_between_the_measured_ones(work, seconds):
    assert TABLE.step_time(work) == pytest.approx(seconds)


def test_copies_go_beside_the_computation_where_the_device_can():
    work = StepWork(4, 0, num_swap_ins=4, num_swap_outs=1, num_evictions=2)
    assert replace(TABLE, overlaps_copies=True).step_time(work) == pytest.approx(1.0 + 1.3)


def test_a_chunk_costs_what_it_adds_to_a_large_step():
    model = TABLE.cost_model(32)
    assert (model.constant, model.per_context_token) == (pytest.approx(3.2), pytest.approx(0.032))
    assert (model.load_costs, model.is_in_seconds) == ({"cpu": 0.5}, True)


def test_a_saved_table_is_the_same_and_anything_else_is_refused(tmp_path):
    path = tmp_path / "steps.json"
    TABLE.save(path)
    assert StepTable.load(path) == TABLE
    data = json.loads(path.read_text())
    for wrong in ({**data, "num_tokens_s": {"1": 1.0}}, {"chunk_size": 16}, [1], {**data, "more": 1}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match="pensieve profile --steps"):
            StepTable.load(path)
    with pytest.raises(ConfigError, match="no table of steps"):
        StepTable.load(tmp_path / "absent.json")


def test_a_model_is_measured(tmp_path, capsys):
    path = tmp_path / "steps.json"
    options = ["--model", "embedded", "--num-threads", "1", "--max-model-len", "256", "--chunk-size", "16"]
    assert cli.main(["profile", *options, "--steps", str(path)]) == 0
    table = StepTable.load(path)
    assert "embedded" in table.measured_on
    assert list(table.num_tokens_s) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert min(table.num_tokens_s.values()) > 0
    assert min(table.pair_s, table.context_token_s) >= 0
    assert min(table.load_s, table.store_s) > 0
    assert not table.overlaps_copies
    assert str(path) in capsys.readouterr().out
