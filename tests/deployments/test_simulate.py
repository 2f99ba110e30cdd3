"""`pensieve simulate`: the files that it takes, the router that it hands in, and what it prints and writes."""

from dataclasses import replace
from pathlib import Path

import pytest

from deployments import simulate
from deployments.experiment import read_cases
from deployments.routing.rendezvous import rank_replicas
from deployments.simulated_cluster import make_cluster, make_sessions
from deployments.simulated_routing import Affinity, PriceOfMoving
from engine import cli
from engine.errors import ConfigError
from engine.simulator.devices import GIB, MODELS
from engine.simulator.routing import ReplicaState
from engine.simulator.step_cost import StepWork
from engine.simulator.step_table import StepTable

FOLDER = Path(__file__).parents[2]
EXPERIMENT = """
engine: {model: opt-13b, gpu_memory_gib: 10, kv_offloading_size: 20, chunk_size: 64, max_num_batched_tokens: 2048}
num_replicas: 2
simulation:
  device: a100-80gb
  duration_s: 60
  warm_up_s: 10
  arrivals: [poisson:0.2, poisson:0.4]
  engine.eviction_policy: [retention_value, lru]
  seeds: [1, 2]
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_for_serving_is_one_case():
    (case,), seeds = read_cases(FOLDER / "serve_config.yaml", {"model_shape": "smollm2"})
    assert (case.num_replicas, case.engine.gpu_memory_gib, case.routing, seeds) == (1, 0.375, "price_of_moving", [0])
    cluster = make_cluster(case, 0)
    cache = cluster.make_core().cache_config
    assert cache.num_gpu_blocks == int(0.375 * GIB / (MODELS["smollm2"].kv_bytes_per_token * 32))
    assert cache.num_cpu_blocks == int(0.5 * GIB / (MODELS["smollm2"].kv_bytes_per_token * 32))


@pytest.mark.parametrize("name", ["llama_3_1_8b.yaml", "llama_3_1_70b.yaml", "llama_3_1_70b_dp2_tp4.yaml"])
def test_the_examples_for_clusters_can_be_simulated(name):
    shape = "llama-3.1-8b" if "8b" in name else "llama-3.1-70b"
    (case,), _ = read_cases(FOLDER / "cluster_configs" / name, {"model_shape": shape, "device": "h100-80gb"})
    core = make_cluster(case, 0).make_core()
    assert core.cache_config.num_gpu_blocks > 1000
    assert case.device.num_devices == case.engine.tensor_parallel_size


def test_lists_make_cases(tmp_path):
    cases, seeds = read_cases(write(tmp_path, EXPERIMENT))
    assert [case.name for case in cases] == [
        "arrivals poisson:0.2, eviction_policy retention_value",
        "arrivals poisson:0.2, eviction_policy lru",
        "arrivals poisson:0.4, eviction_policy retention_value",
        "arrivals poisson:0.4, eviction_policy lru",
    ]
    assert [case.engine.eviction_policy for case in cases] == ["retention_value", "lru"] * 2
    assert {(case.num_replicas, case.duration_s) for case in cases} == {(2, 60)}
    assert seeds == [1, 2]


def test_an_experiment_may_name_the_file_that_serves(tmp_path):
    (tmp_path / "serve.yaml").write_text((FOLDER / "serve_config.yaml").read_text())
    (case,), _ = read_cases(
        write(tmp_path, "serve: serve.yaml\nengine: {chunk_size: 64}\nsimulation: {model_shape: smollm2}\n")
    )
    assert (case.engine.chunk_size, case.engine.kv_offloading_size) == (64, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("simulation: {divice: a100-80gb}", "unknown key divice"),
        ("engine: {model: opt-13b}\nsimulation: {device: a100}", "unknown device 'a100'; there are a100-80gb"),
        ("engine: {model: opt-13b}\nsimulation: {routing: best}", "routing must be one of price_of_moving"),
        ("engine: {model: opt-13b}\nsimulation: {arrivals: often}", "unknown arrivals 'often'"),
        ("engine: {model: opt-13b}\nsimulation: {arrivals: []}", "arrivals is an empty list"),
        ("engine: {model: opt-13b}\nsimulation: {warm_up_s: 700}", "raise duration_s"),
        ("engine: {model: opt-13b}\nsimulation: {seeds: 3}", "seeds must be a list"),
        ("engine: {model: opt-13b}\nsimulation: {num_replicas: 0}", "num_replicas must be a number above 0"),
        ("engine: {model: opt-13b}\nsimulation: {workload_options: {turn: 3}}", "unknown option of a workload: turn"),
        ("engine: {model: opt-13b}\nsimulation: {changes: [{what: explode}]}", "a change must have time_s"),
        ("engine: {model: unheard-of}", "unknown model_shape 'unheard-of'"),
        ("engine: {modell: opt-13b}", "did you mean"),
        ("engine: {model: opt-66b}", "the device has no room for a GPU tier beside the weights"),
        ("model: opt-13b", "unknown key model"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_may_be_meant(tmp_path, capsys, text, message):
    assert simulate.main([write(tmp_path, text)]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_time_too_short_for_any_turn_is_told(tmp_path, capsys):
    path = write(tmp_path, "engine: {model: opt-13b}\nsimulation: {duration_s: 0.02, warm_up_s: 0.01}")
    assert simulate.main([path]) == 1
    assert "simulate a longer time" in capsys.readouterr().err


def test_the_command_prints_a_table_and_writes_what_it_is_asked_for(tmp_path, capsys):
    path, out = write(tmp_path, EXPERIMENT), tmp_path / "new" / "out"
    assert simulate.main([path, "--out", str(out), "--arrivals", "poisson:0.3", "--seeds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("arrivals poisson:0.3, eviction_policy retention_value") or lines[1].startswith(
        "eviction_policy"
    )
    rows = (out / "cases.csv").read_text().splitlines()
    assert len(rows) == 5
    assert "<table>" in (out / "report.html").read_text()


def test_several_processes_give_what_one_gives(tmp_path):
    cases, seeds = read_cases(
        write(tmp_path, EXPERIMENT), {"duration_s": 20, "warm_up_s": 1, "arrivals": "poisson:0.4"}
    )
    alone, together = (simulate.run_cases(cases, seeds, num_jobs) for num_jobs in (1, 2))
    assert alone == together


def states(num_requests: dict[int, int], num_waiting: int = 0) -> dict[int, ReplicaState]:
    return {rank: ReplicaState(rank, num, num_waiting, 0, 8, (1e-4, 0.0), None) for rank, num in num_requests.items()}


def test_processes_that_share_a_simulation_give_what_one_gives(tmp_path):
    def simulated(processes: int) -> list[dict[str, float]]:
        text = EXPERIMENT.replace("chunk_size: 64", "chunk_size: 64, kv_handover: 'off'")
        cases, seeds = read_cases(
            write(tmp_path, text), {"processes": processes, "arrivals": "poisson:0.4", "seeds": [1]}
        )
        return [summary.as_dict() for result in simulate.run_cases(cases[:1], seeds) for summary in result.summaries]

    (summary,) = simulated(1)
    assert summary["num_turns"] > 20
    assert simulated(2) == [summary]


def test_processes_are_refused_with_hand_over_and_with_several_simulations_at_a_time(tmp_path):
    cases, seeds = read_cases(write(tmp_path, EXPERIMENT), {"processes": 2})
    with pytest.raises(ConfigError, match="kv_handover: off"):
        simulate.run_cases(cases, seeds)
    with pytest.raises(ConfigError, match="leave --jobs out"):
        simulate.run_cases(cases, seeds, num_jobs=2)
    with pytest.raises(ConfigError, match="processes must be a whole number above 0"):
        read_cases(write(tmp_path, EXPERIMENT), {"processes": 1.5})


def test_the_router_is_the_one_that_serves():
    ranks, news = (0, 1, 3), states({0: 1, 1: 5, 3: 2})
    for number in range(50):
        name = f"s{number}"
        home = Affinity(1, of_two=False).place(name, True, ranks)
        assert home == [ranks[index] for index in rank_replicas(name, ranks)[:2]]
    two = Affinity(0, of_two=True)
    homes = []
    for number in range(300):
        two.hear(news, 0.0)
        homes.append(two.place(f"s{number}", True, ranks)[0])
    other = two.another()
    other.hear(states({0: 9, 1: 0, 3: 0}), 0.0)
    assert homes == [other.place(f"s{number}", False, ranks)[0] for number in range(300)]
    assert homes.count(0) > homes.count(3) > homes.count(1)


def test_what_serves_leaves_home_only_if_that_pays():
    router = PriceOfMoving(1, of_two=False)
    ranks = (0, 1)
    home, other = Affinity(1, of_two=False).place("a", True, ranks)
    router.note_end("a", 1000, home)
    queue = {
        home: ReplicaState(1, 8, 10, 0, 8, (1e-4, 0.0), None),
        other: ReplicaState(2, 2, 0, 0, 8, (1e-4, 0.0), None),
    }
    router.hear(queue, 0.0)
    assert router.place("a", False, ranks) == [home, other], "how fast the queue moves is not known"
    router.hear({rank: replace(state, num_ended=4) for rank, state in queue.items()}, 1.0)
    assert router.place("a", False, ranks) == [other, home, other], (
        "2.5 s in the queue, 0.1 s to compute its context again"
    )
    router.note_end("a", 20_000, home)
    assert router.place("a", False, ranks) == [home, other], "2 s to compute it again"


def test_measured_steps_take_the_place_of_a_device(tmp_path):
    table = StepTable(
        measured_on="here",
        chunk_size=32,
        bytes_per_block=1 << 20,
        num_tokens_s={1: 0.5, 2: 0.5},
        decodes_s={1: 0.5, 2: 0.5},
        pair_s=0.0,
        context_token_s=0.0,
        request_s=0.0,
        load_s=0.01,
        store_s=0.01,
        overlaps_copies=False,
    )
    table.save(tmp_path / "steps.json")
    cases, _ = read_cases(write(tmp_path, EXPERIMENT), {"steps": str(tmp_path / "steps.json")})
    cluster = make_cluster(cases[0], 0)
    assert cluster.cost.step_time(StepWork(2, 100)) == 0.5
    assert cluster.cost.step_time(StepWork(num_swap_ins=1)) == 0.02, "blocks of 64 tokens"
    core = cluster.make_core()
    assert core.cache_config.num_gpu_blocks == 10 * 2**30 // 2**21
    assert core.scheduling_config.prefill_batch_tokens == 128, "as the engine has it on a CPU"


def test_distserves_step_times_are_those_of_one_model_on_one_device(tmp_path):
    (case, *_), _ = read_cases(write(tmp_path, EXPERIMENT), {"steps": "distserve"})
    assert make_cluster(case, 0).cost.step_time(StepWork(1, 101)) == pytest.approx(0.020036, abs=1e-6)
    for other in ({"model_shape": "llama-3.1-8b"}, {"device": "h100-80gb"}):
        (case, *_), _ = read_cases(write(tmp_path, EXPERIMENT), {"steps": "distserve", **other})
        with pytest.raises(ConfigError, match="opt-13b on one a100-80gb"):
            make_cluster(case, 0)


def test_load_may_be_given_for_each_replica(tmp_path):
    text = EXPERIMENT.replace("duration_s: 60", "duration_s: 60\n  arrivals_per_replica: true")
    cases, _ = read_cases(write(tmp_path, text), {"num_replicas": [1, 4], "arrivals": "poisson:0.5"})
    counts = [sum(session.start_s < 60 for session in make_sessions(case, 0)[0]) for case in cases[::2]]
    assert 2.5 < counts[1] / counts[0] < 5.5
    closed, _ = read_cases(write(tmp_path, text), {"arrivals": "closed:8"})
    assert make_sessions(closed[0], 0)[1] == 16


def test_pensieve_runs_the_program_of_that_name(tmp_path, monkeypatch, capfd):
    program = tmp_path / "pensieve-simulate"
    program.write_text('#!/bin/sh\necho "simulates $1"\nexit 3\n')
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert cli.main(["simulate", "file.yaml"]) == 3
    assert capfd.readouterr().out == "simulates file.yaml\n"
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["simulate", "file.yaml"]) == 1
    assert "pip install" in capfd.readouterr().err


def test_what_scales_by_itself_is_not_simulated_as_if_it_did_not():
    with pytest.raises(ConfigError, match="do not scale by themselves"):
        read_cases(FOLDER / "experiments" / "autoscaling.yaml")


def test_errors_name_the_parameter():
    with pytest.raises(ConfigError) as raised:
        read_cases(FOLDER / "serve_config.yaml", {"model_shape": "smollm2", "device": "tpu"})
    assert raised.value.param == "device"
