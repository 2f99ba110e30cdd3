"""Turns -> figures, worked out by hand; the counters of replicas that come and go; and the keys of cells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.experiment import read_experiment
from deployments.experiments.cells import cells_of, pending
from deployments.experiments.figures import Played, PlayedTurn, figures_of, rows_by_time, work_by_replica
from deployments.experiments.measure import played_of, router_decisions
from deployments.experiments.simulation import simulate_cell
from deployments.experiments.watch import Watch
from engine.bench.turns import TurnRecord
from engine.workloads.session import Session, Span, Turn

FILE = Path(__file__).parents[3] / "experiments" / "small_machine.yaml"


def turn(session: str, number: int, replica: str, sent_s: float, *, cached: int, known: int = 0) -> PlayedTurn:
    """A prompt of 100 tokens, an answer of 10; half a second to the first token, and a second in all."""
    return PlayedTurn(session, number, replica, sent_s, sent_s + 0.5, sent_s + 1.0, 100, known, cached, 10)


TURNS = [
    turn("a", 0, "0", 0.0, cached=0),  # in the warm-up
    turn("a", 1, "0", 5.0, cached=80, known=80),
    turn("a", 2, "1", 9.0, cached=0, known=90),
    turn("b", 0, "1", 6.0, cached=50, known=0),  # a prefix that others have: nothing of its own
    turn("b", 1, "1", 9.5, cached=40, known=50),  # ends after the run
]
PLAYED = Played(TURNS, 4.0, 10.0, [("0", 0.0, 10.0), ("1", 0.0, 7.0), ("1", 8.0, 10.0)])


def test_figures_count_what_was_sent_after_the_warm_up_and_ended_in_time() -> None:
    figures = figures_of(PLAYED)
    assert figures["turns"] == 3
    assert figures["turns_per_s"] == pytest.approx(3 / 6)
    assert figures["output_tokens_per_s"] == pytest.approx(30 / 6)
    assert figures["s_per_token_p50"] == pytest.approx(0.1)
    assert figures["first_token_s_p90"] == pytest.approx(0.5)
    assert figures["hit_rate"] == pytest.approx(80 / 170)
    assert figures["moved"] == pytest.approx(1 / 3)  # of a's two and b's one
    assert PLAYED.replica_seconds == pytest.approx(6 + 3 + 2)
    assert figures["replica_s_per_turn"] == pytest.approx(11 / 3)


def test_balance_is_of_tokens_computed_and_counts_replicas_that_did_nothing() -> None:
    assert work_by_replica(PLAYED.counted, ["0", "1", "2"]) == {"0": 30, "1": 110 + 60, "2": 0}
    idle = replace(PLAYED, lives=[*PLAYED.lives, ("2", 0.0, 10.0)])
    assert figures_of(PLAYED)["balance"] == pytest.approx(170 / 100)
    assert figures_of(idle)["balance"] == pytest.approx(170 / (200 / 3))


def test_without_turns_there_are_no_times() -> None:
    assert figures_of(replace(PLAYED, turns=(), num_errors=2)) == {"turns": 0, "errors": 2}


def test_time_is_cut_into_windows() -> None:
    rows = rows_by_time(PLAYED, 10.0)
    assert [row["time_s"] for row in rows if "turns_per_s" in row] == pytest.approx(
        [1 / 6, 31 / 6, 37 / 6, 55 / 6, 57 / 6]
    )
    assert {row["time_s"]: row["replicas"] for row in rows}[rows[22]["time_s"]] == 1  # 7.5 s: one is being replaced


def statistics(replica_id: str, rank: int, prompt: int, cached: int) -> dict[str, Any]:
    counters = {"num_prompt_tokens": prompt, "num_gpu_cached_tokens": cached, "num_dropped_tokens": 3}
    return {"replica_id": replica_id, "replica_rank": rank, "tiers": ["gpu"], **counters}


def test_counters_are_those_of_the_load_also_of_replicas_that_were_lost_or_came_later() -> None:
    watch = Watch()
    watch.look(0.0, ["x", "y"], [statistics("x", 0, 100, 10), statistics("y", 1, 50, 5)])
    watch.look(1.0, ["x", "y"], [statistics("x", 0, 160, 40), statistics("y", 1, 70, 5)])
    watch.look(2.0, ["x", "z"], [statistics("x", 0, 170, 45)])  # y was lost, z starts
    watch.look(3.0, ["x", "z"], [statistics("x", 0, 180, 50), statistics("z", 1, 30, 0)])
    counters = watch.counters()
    assert (counters["num_prompt_tokens"], counters["num_gpu_cached_tokens"]) == (80 + 20 + 30, 40 + 0 + 0)
    assert watch.lives == [("0", 0.0, 3.0), ("1", 0.0, 1.0), ("1", 2.0, 3.0)]


def record(session: str, number: int, sent_s: float, **options: Any) -> TurnRecord:
    known = {"num_prompt_tokens": 10, "num_output_tokens": 4, "num_cached_tokens": 3, "replica": "0"}
    return TurnRecord(session, number, "user", sent_s, sent_s, sent_s + 1, sent_s + 2, **{**known, **options})


def test_what_a_session_had_before_is_its_last_prompt_and_answer() -> None:
    sessions = [Session(name, (Turn((Span(0, 8),), 4),) * 2) for name in "ab"]
    records = [record("a", 0, 0.0), record("a", 1, 3.0, num_prompt_tokens=30), record("b", 0, 0.0, error="503: full")]
    played = played_of(records, sessions, 0.0, 60.0, Watch())
    assert [each.num_known_tokens for each in played.turns] == [0, 14]
    assert (played.num_errors, played.ended_s) == (1, 60.0)
    complete = [*records[:2], record("b", 0, 0.0), record("b", 1, 4.0)]
    assert played_of(complete, sessions, 0.0, 60.0, Watch()).ended_s == 6.0


def test_decisions_of_all_routers_are_added_up() -> None:
    metrics = "\n".join(
        f'ray_pensieve_router_decisions_total{{application="a",kind="{kind}",replica="{replica}"}} {count}'
        for kind, replica, count in (("sticky", "i", "7.0"), ("sticky", "j", "2.0"), ("spill", "i", "1.0"))
    )
    assert router_decisions(f"# HELP x\n{metrics}\nray_other_total 5\n") == {"spill": 1.0, "sticky": 9.0}


def test_a_cell_is_another_one_if_what_its_figures_depend_on_is() -> None:
    experiment = read_experiment(FILE)
    measured, simulated = (cells_of(experiment, kind) for kind in ("measured", "simulated"))
    assert len({cell.key for cell in (*measured, *simulated)}) == 2 * len(experiment.cases)
    with_device = [replace(case, device=replace(case.device, memory_bytes=1e9)) for case in experiment.cases]
    other = replace(experiment, cases=with_device, title="another", notes=())
    assert [cell.key for cell in cells_of(other, "measured")] == [cell.key for cell in measured]
    assert {cell.key for cell in cells_of(other, "simulated")}.isdisjoint(cell.key for cell in simulated)
    elsewhere = replace(experiment, cluster=replace(experiment.cluster, args={"num_cpus": 2}))
    assert {cell.key for cell in cells_of(elsewhere, "measured")}.isdisjoint(cell.key for cell in measured)
    assert [cell.key for cell in cells_of(elsewhere, "simulated")] == [cell.key for cell in simulated]


def test_cells_that_failed_come_after_those_that_were_never_run() -> None:
    cells = cells_of(read_experiment(FILE), "measured")
    left = pending(cells, done={cells[1].key}, failed={cells[0].key})
    assert left == [*cells[2:], cells[0]]


def test_what_is_said_as_it_is_anyway_makes_no_other_cell(tmp_path: Path) -> None:
    """So that results stay valid when a later version has more options."""
    keys = []
    for more in ("", "  num_fallback_replicas: 1\n  engine.mode: pensieve\n", "  num_fallback_replicas: 2\n"):
        path = tmp_path / "experiment.yaml"
        path.write_text(f"engine: {{model: opt-13b}}\nsimulation:\n  arrivals: closed:2\n{more}")
        keys.append([cell.key for cell in cells_of(read_experiment(path), "measured")])
    assert keys[0] == keys[1] != keys[2]


def test_under_a_ramp_no_session_has_two_cold_turns_in_a_row() -> None:
    """Sessions move when replicas come and go and when a queue is long, and are back before all have heard of that."""
    experiment = read_experiment(FILE.with_name("ramp.yaml"))
    cell = cells_of(experiment, "simulated")[1]
    figures = simulate_cell(cell)["figures"]
    assert figures["moved"] > 0.1
    assert figures["cold_in_a_row"] <= 1


def test_cold_turns_and_how_many_of_a_session_follow_each_other() -> None:
    found = {"a": [0, 100, 10, 20, 200], "b": [0, 0, 100, 10]}
    turns = [
        PlayedTurn(name, number, "0", 1.0, 2.0, 3.0, 200, 100 if number else 0, cached, 4)
        for name, shares in found.items()
        for number, cached in enumerate(shares)
    ]
    figures = figures_of(Played(turns, 0.0, 9.0, [("0", 0.0, 9.0)]))
    assert figures["cold"] == 4 / 9
    assert figures["cold_in_a_row"] == 2  # of session a; those of b have a warm one between them
