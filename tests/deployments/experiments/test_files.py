"""Every file of experiments/ can be read, makes its cases, can be simulated, and can be deployed if it says how."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deployments.experiment import read_experiment
from deployments.experiments.deployment import check_measurable, serve_config_of
from deployments.schema import AppArgs
from deployments.simulated_cluster import make_cluster
from engine.errors import ConfigError
from engine.simulator.step_cost import StepWork

FOLDER = Path(__file__).parents[3] / "experiments"
FILES = sorted(FOLDER.rglob("*.yaml"))
MEASURED = [path for path in FILES if "cluster" in yaml.safe_load(path.read_text())]
SMALL = FOLDER / "small_machine.yaml"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_it_makes_cases_that_can_be_simulated(path: Path) -> None:
    experiment = read_experiment(path)
    assert len({case.name for case in experiment.cases}) == len(experiment.cases)
    for case in experiment.cases[:1]:  # a core of many blocks takes a while to make
        if any(change.what == "roll" for change in case.changes):
            with pytest.raises(ConfigError, match="a rolling update is done by Serve"):
                make_cluster(case, 0)
            continue
        assert make_cluster(case, 0).make_core().cache_config.num_gpu_blocks > 0


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_it_can_be_deployed(path: Path) -> None:
    check_measurable(read_experiment(path))


def test_batches_are_separate_if_a_case_says_so() -> None:
    unified, separate = (
        make_cluster(case, 0).cost
        for case in read_experiment(FOLDER / "paper" / "figure_13.yaml").cases
        if case.arrivals == "poisson:1"
    )
    work = StepWork(num_decodes=8, decode_context_len=4096, num_prompt_tokens=64)
    assert separate.step_time(work) > 1.5 * unified.step_time(work)


def test_a_case_becomes_an_application() -> None:
    experiment = read_experiment(SMALL)
    config = serve_config_of(experiment, experiment.cases[-1])
    (application,) = config["applications"]
    assert application["deployments"] == [{"name": "LLMServer", "num_replicas": 4}]
    args = AppArgs.model_validate(application["args"])
    assert (args.num_cpus, args.routing, args.engine["num_cpu_blocks"]) == (0.5, "affinity", 64)
    assert Path(args.engine["model"]) == FOLDER / "models" / "random-10m"


def test_what_serves_already_is_the_base(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text((FOLDER.parent / "serve_config.yaml").read_text())
    path = tmp_path / "experiment.yaml"
    path.write_text(
        "serve: serve.yaml\nengine: {chunk_size: 64}\ncluster: {args: {num_cpus: 0.1}, port: 8123}\n"
        "simulation: {model_shape: smollm2, engine.mode: [pensieve, stateless], num_replicas: 3, routing: power_of_two}\n"
    )
    experiment = read_experiment(path)
    (application,) = serve_config_of(experiment, experiment.cases[1])["applications"]
    assert application["deployments"] == [
        {"name": "LLMServer", "num_replicas": 3},
        {"name": "Ingress", "num_replicas": 1},
    ]
    args = application["args"]
    assert (args["num_cpus"], args["ingress_num_cpus"], args["routing"]) == (0.1, 0.25, "power_of_two")
    assert (args["engine"]["mode"], args["engine"]["chunk_size"]) == ("stateless", 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("simulation: {routing: least_loaded}", "routing least_loaded is a baseline of the simulator"),
        ("simulation: {routing: price_of_moving_of_two}", "goes with `api: responses-stored`"),
        ("cluster: {api: responses-stored}", "goes with `api: responses-stored`"),
        ("simulation: {device: [a100-80gb, h100-80gb]}", "run this file with --simulate"),
        ("simulation: {batching: [unified, separate]}", "batching separate exists in the simulator only"),
        ("simulation: {batching: apart}", "batching must be one of unified, separate"),
        ("cluster: {args: {num_cpu: 1}}", "num_cpu"),
        ("cluster: {args: {num_replicas: 2}}", "args of cluster must have no num_replicas, which the cases say"),
        ("cluster: {autoscaling_config: {min_replica: 1}}", "unknown key min_replica;"),
        ("cluster: {autoscaling_config: {min_replicas: many}}", "min_replicas"),
        ("cluster: {autoscaling_config: 3}", "autoscaling_config of cluster must have Serve's options"),
        ("simulation: {changes: 5}", "changes must be a list"),
        ("simulation: {changes: [{what: roll}]}", "a change must have time_s"),
        ("simulation: {changes: [{what: roll, time_s: soon}]}", "a change must have time_s"),
        (
            "simulation: {changes: [{time_s: 1, what: add}]}\ncluster: {autoscaling_config: {}}",
            "Serve says how many replicas there are",
        ),
        ("cluster: {prot: 8000}", "cluster: unknown key prot"),
        ("cluster: {port: high}", "port of cluster must be a number"),
        ("cluster: {api: soap}", "api of cluster must be one of"),
        ("cluster: {token_ids: [9, 3]}", "token_ids must be a list of the first id and the end"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_starts(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(f"engine: {{model: smollm2}}\n{text}\n")
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        check_measurable(read_experiment(path))


def test_configurations_are_options_that_go_together(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(
        "engine: {model: opt-13b}\nsimulation:\n  num_replicas: [1, 2]\n  configurations:\n    as it is: {}\n"
        "    small: {engine.mode: stateless, num_replicas: 3}\n    two: {arrivals: [closed:1, closed:2], num_replicas: 1}\n"
    )
    cases = read_experiment(path).cases
    assert [(case.name, case.num_replicas, case.engine.mode, case.arrivals) for case in cases] == [
        ("configuration as it is, num_replicas 1", 1, "pensieve", "poisson:0.5"),
        ("configuration as it is, num_replicas 2", 2, "pensieve", "poisson:0.5"),
        ("configuration small", 3, "stateless", "poisson:0.5"),
        ("configuration two, arrivals closed:1", 1, "pensieve", "closed:1"),
        ("configuration two, arrivals closed:2", 1, "pensieve", "closed:2"),
    ]
    path.write_text("engine: {model: opt-13b}\nsimulation: {configurations: [small]}\n")
    with pytest.raises(ConfigError, match="configurations must be names with the options that each changes"):
        read_experiment(path)
