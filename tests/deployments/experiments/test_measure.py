"""A measured cell on a real cluster: its figures, its replicas while one is lost and one comes, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import serve

from deployments.experiment import read_experiment
from deployments.experiments.cells import cells_of
from deployments.experiments.deployment import APP, check_free, handle_loop
from deployments.experiments.measure import measure_cell
from deployments.experiments.results import Results
from tests.deployments.local_ray import AS_PENSIEVE_SERVE, LocalServe

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHARED_SERVE = AS_PENSIEVE_SERVE
EXPERIMENT = """
engine: {{model: embedded, num_threads: 1, num_gpu_blocks: 128, num_cpu_blocks: 128}}
simulation:
  model_shape: {{num_parameters: 5.8e+5, num_layers: 3, num_heads: 4, num_kv_heads: 2, head_dim: 32}}
  workload: synthetic
  workload_options: {{turns: 3, new_tokens: 20, output_tokens: 6, think_s: 0.2}}
  arrivals: closed:4
  num_replicas: 2
  duration_s: 8
  warm_up_s: 1
  changes: [{{time_s: 2, what: lose, rank: 0}}, {{time_s: 3, what: add}}]
cluster:
  args: {{num_cpus: 0.3, ingress_num_cpus: 0.2, graceful_shutdown_timeout_s: 2, store_url: "sqlite:///{store}"}}
  port: {port}
  max_lag_s: 60
  metrics_wait_s: 0
"""


@pytest.fixture(scope="module")
def port(local_serve: LocalServe) -> Iterator[int]:
    yield int(local_serve.start(SHARED_SERVE).rpartition(":")[2])
    serve.delete(APP)


def test_a_cell_is_measured_while_its_replicas_change(port: int, tmp_path: Path) -> None:
    path = tmp_path / "trial.yaml"
    path.write_text(EXPERIMENT.format(store=tmp_path / "store.db", port=port))
    experiment, results = read_experiment(path), Results(tmp_path / "out")
    (cell,) = cells_of(experiment, "measured")
    check_free()
    with handle_loop() as loop:
        record = measure_cell(experiment, cell, results, loop)
    assert record["refusal"] == ""
    assert record["errors"] == {}
    figures = record["figures"]
    assert figures["turns"] > 5
    assert 0.5 < figures["hit_rate"] <= 1
    assert 0 < figures["cached_gpu"] < 1
    assert [event.partition(" s: ")[2].partition(":")[0] for event in record["events"]] == [
        "replica 0 is lost",
        "a replica is added",
    ]
    by_rank = {row["rank"] for row in record["replicas"] if "num_prompt_tokens" in row}
    assert {"0", "1"} <= by_rank
    assert len(record["replicas"]) >= 3  # the lost one, the other, and who came
    turns = results.path(cell, ".turns.csv").read_text().splitlines()
    assert len(turns) > figures["turns"]
    assert "# HELP" in results.path(cell, ".metrics.txt").read_text()
    assert APP not in serve.status().applications
