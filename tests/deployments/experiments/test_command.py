"""`pensieve experiment run --simulate`: what it writes, how it goes on after a break, and what of a cell that fails."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from deployments.experiment import read_experiment
from deployments.experiments import command, simulation
from deployments.experiments.cells import cells_of
from deployments.experiments.drivers import LoadDriver, num_drivers_per_node
from deployments.experiments.results import Results
from deployments.experiments.shortened import shortened
from engine.bench.apis import Content
from engine.bench.client import Endpoint
from engine.bench.driver import Load
from engine.errors import WorkloadError
from engine.workloads.session import Session, Span, Turn
from tests.deployments.serving import serving
from tests.engine.bench.fake_server import FakeServer

EXPERIMENT = """
title: Small <trial>
notes: ["What it shows."]
engine: {model: opt-13b, gpu_memory_gib: 2, kv_offloading_size: 4, chunk_size: 64, max_num_batched_tokens: 2048}
simulation:
  device: a100-80gb
  arrivals: [closed:4, closed:8]
  num_replicas: [1, 2]
  workload_options: {think_s: "exponential:mean=2"}
  duration_s: 60
  warm_up_s: 10
  changes: [{time_s: 30, what: lose, rank: 0, restart_s: 10}]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "trial.yaml"
    path.write_text(EXPERIMENT)
    return path


def run(path: Path, *arguments: str) -> int:
    return command.main(["run", str(path), "--out", str(path.parent / "out"), *arguments])


def test_a_share_of_the_time_is_another_experiment_and_says_so(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (case, *_) = shortened(read_experiment(path), 0.5).cases
    assert (case.duration_s, case.warm_up_s, [change.time_s for change in case.changes]) == (30, 5, [15])
    assert run(path, "--simulate", "--time-share", "0.5", "--max-cells", "1") == 3
    assert "Run for 0.5 of the times" in (path.parent / "out" / "report.html").read_text()
    keys = {cell.key for cell in cells_of(read_experiment(path), "simulated")}
    assert not Results(path.parent / "out").load("simulated").keys() & keys  # the full ones are still to be run
    for wrong in ("0", "1.5"):
        assert run(path, "--simulate", "--time-share", wrong) == 1
        assert "--time-share must be above 0 and at most 1" in capsys.readouterr().err


def test_the_report_has_all_cells_measured_beside_simulated(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(path, "--simulate") == 0
    experiment, results = read_experiment(path), Results(path.parent / "out")
    simulated = results.load("simulated")
    assert len(simulated) == 4
    for cell, like in zip(cells_of(experiment, "measured"), cells_of(experiment, "simulated"), strict=True):
        figures = {name: value * 2 for name, value in simulated[like.key]["figures"].items()}
        about = {"nodes": [2.0], "versions": {"ray": "2"}, "model": "m", "num_drivers": 1, "load_average": [0.5, 2.0]}
        lag = {"schedule_p99_s": 0.001, "loop_p99_s": 0.002}
        results.save(
            cell,
            {
                **simulated[like.key],
                "figures": figures,
                "about": about,
                "lag": lag,
                "kind": "measured",
                "key": cell.key,
            },
        )
    assert run(path, "--simulate") == 0
    out = capsys.readouterr().out
    assert out.count("measured") == out.count("simulated") // 2 == 4
    rows = list(csv.DictReader((path.parent / "out" / "cells.csv").open()))
    assert {(row["kind"], row["num_replicas"], row["arrivals"]) for row in rows} == {
        (kind, replicas, arrivals)
        for kind in ("measured", "simulated")
        for replicas in "12"
        for arrivals in ("closed:4", "closed:8")
    }
    page = (path.parent / "out" / "report.html").read_text()
    assert "Small &lt;trial&gt;" in page
    assert "What it shows." in page
    assert "replica 0 is lost" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")  # it needs no other file
    plots = {plot.name for plot in (path.parent / "out").glob("*.svg")}
    assert {"replicas_turns_per_s.svg", "load_s_per_token_p90.svg", "time_replicas.svg"} <= plots
    drawn = ElementTree.parse(path.parent / "out" / "replicas_balance.svg").getroot()
    lines = [each for each in drawn if each.tag.endswith("polyline")]
    assert len(lines) == 4
    assert sum("stroke-dasharray" in each.attrib for each in lines) == 2


def test_the_same_command_goes_on_after_a_break(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    simulate = simulation.simulate_cell

    def noting(cell: Any, *arguments: Any) -> dict[str, Any]:
        done.append(cell.name)
        return simulate(cell, *arguments)

    monkeypatch.setattr(simulation, "simulate_cell", noting)
    assert run(path, "--simulate", "--max-cells", "1") == 3
    assert run(path, "--simulate", "--max-cells", "2") == 3
    (first,) = (path.parent / "out" / "simulated").glob("num-replicas-1-arrivals-closed-4*.json")
    first.write_text("{")  # the machine went down
    assert run(path, "--simulate") == 0
    assert run(path, "--simulate") == 0
    assert done == [
        "num_replicas 1, arrivals closed:4, seed 0",
        "num_replicas 1, arrivals closed:8, seed 0",
        "num_replicas 2, arrivals closed:4, seed 0",
        "num_replicas 1, arrivals closed:4, seed 0",
        "num_replicas 2, arrivals closed:8, seed 0",
    ]


def test_a_cell_that_fails_is_told_and_the_others_follow(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate = simulation.simulate_cell

    def failing(cell: Any, *arguments: Any) -> dict[str, Any]:
        if cell.case.num_replicas == 1:
            raise WorkloadError("the file is gone")
        return simulate(cell, *arguments)

    monkeypatch.setattr(simulation, "simulate_cell", failing)
    assert run(path, "--simulate") == 1
    summary = json.loads((path.parent / "out" / "report.json").read_text())
    assert summary["counts"]["simulated"] == {"all": 4, "done": 2, "failed": 2}
    assert "failed: the file is gone" in (path.parent / "out" / "report.html").read_text()
    assert "the file is gone" in capsys.readouterr().err
    monkeypatch.setattr(simulation, "simulate_cell", simulate)
    assert run(path, "--simulate") == 0


def test_mistakes_are_told(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(EXPERIMENT.replace("duration_s", "duration"))
    assert run(path, "--simulate") == 1
    assert "unknown key duration" in capsys.readouterr().err


def test_a_driver_sends_its_sessions_and_notes_who_answered() -> None:
    server = FakeServer()
    sessions = [Session(f"s{number}", (Turn((Span(number, 8),), 4),) * 2) for number in range(5)]
    with serving(server.app) as url:
        driver = LoadDriver()
        endpoint = driver.probe(Endpoint("fake", f"{url}/v1", "chat"), Content())
        driven = driver.drive(endpoint, Load("run", Content(), num_active=2), sessions, time.time())
    assert not isinstance(driven, str)
    records, _ = driven
    assert {(record.session_id, record.turn, record.error) for record in records} == {
        (f"s{number}", turn, "") for number in range(5) for turn in range(2)
    }
    assert server.max_running <= 2
    assert not LoadDriver().reaches("http://127.0.0.1:9")


def test_so_many_processes_as_drive_the_sessions_with_ease() -> None:
    assert [num_drivers_per_node(sessions, 3) for sessions in (1, 192, 193, 1000)] == [1, 1, 2, 6]
