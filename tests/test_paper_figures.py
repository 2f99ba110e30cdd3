"""benchmarks/paper: the constants follow from their sources, the search finds, runs are kept, and every figure is made."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.paper import constants, figures, tables
from benchmarks.paper.published import PANELS, SYSTEMS, rate_at, read_digitised
from benchmarks.paper.runs import CLOSE, Runs, search
from benchmarks.paper.systems import INTERCONNECT, KV_SHARE, TURNS, Run
from benchmarks.paper.systems import SYSTEMS as SIMULATED
from engine.simulator.devices import MODELS, find_device
from engine.simulator.outcome import Summary

SHORT = Run(panel=PANELS["10a"], system="pensieve", rate=1.0, chunk_size=64, duration_s=40.0, warm_up_s=10.0)


@pytest.fixture(scope="module")
def summary() -> Summary:
    return SHORT.simulate()


def test_constants_follow_from_their_sources():
    # 3 to 7 rounds, or 2 to 4, evenly; as many of each as give a mean of 3.86.
    share = (3.86 - 3) / (5 - 3)
    variance = share * 2 + (1 - share) * 2 / 3 + share * (1 - share) * (5 - 3) ** 2
    assert math.sqrt(math.log(1 + variance / 3.86**2)) == pytest.approx(constants.ULTRACHAT_TURN_SIGMA, abs=0.005)
    for model, part in constants.KV_SHARE.items():
        assert part == MODELS[model].num_kv_heads / MODELS[model].num_heads
    device, shape = find_device(constants.DEVICE), MODELS["opt-13b"]
    weights_s = shape.weight_bytes / (device.hbm_bytes_per_s * device.hbm_efficiency)
    assert weights_s + constants.NATIVE_OVERHEAD_S == pytest.approx(0.0209, rel=0.01)
    assert device.host_to_device == constants.INTERCONNECT_BYTES_PER_S
    assert all(len(changed) <= 1 for changed in constants.ONE_CONSTANT.values())


def test_what_changes_a_run_and_what_does_not():
    unchanged = replace(SHORT, panel=PANELS["11b"])
    assert unchanged.device.kv_efficiency == find_device(constants.DEVICE).kv_efficiency
    assert replace(unchanged, changed=(KV_SHARE,)).device.kv_efficiency == unchanged.device.kv_efficiency / 8
    assert replace(unchanged, changed=(INTERCONNECT,)).device.interconnect_bytes_per_s == 25e9
    native = replace(unchanged, system="tensorrt-llm-0.12", changed=(KV_SHARE,))
    assert native.device.kv_efficiency == unchanged.device.kv_efficiency
    assert replace(SHORT, changed=(TURNS,)).workload == SHORT.workload
    narrow = replace(SHORT, panel=PANELS["10c"], changed=(TURNS,))
    assert narrow.workload.turns != replace(narrow, changed=()).workload.turns
    assert len({SHORT.key, unchanged.key, native.key, narrow.key, replace(SHORT, seed=1).key}) == 5


def test_the_digitised_curves_pass_the_rates_of_the_table():
    for name in ("10a", "10b"):
        for system, points in read_digitised(name).items():
            found = rate_at(points, PANELS[name].level)
            assert found == pytest.approx(PANELS[name].rate(system), rel=0.01)


@pytest.mark.parametrize("guess", [1.0, 2.9, 3.1, 9.0])
def test_the_search_ends_with_the_level_between_two_close_rates(guess: float):
    tried: dict[float, float] = {}

    def latency(rate: float) -> float:
        tried[rate] = 0.03 + max(0.0, rate - 2.5) ** 2
        return tried[rate]

    search(latency, 0.12, guess)
    below = max(rate for rate, each in tried.items() if each <= 0.12)
    above = min(rate for rate, each in tried.items() if each > 0.12)
    assert below < 2.8 <= above < CLOSE * below


def test_a_run_is_simulated_once(tmp_path: Path, summary: Summary, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Run, "simulate", lambda self: summary)
    row = Runs(tmp_path / "runs.csv").row(SHORT)
    monkeypatch.setattr(Run, "simulate", lambda self: pytest.fail("it is in the file"))
    assert Runs(tmp_path / "runs.csv").row(SHORT) == row
    assert row["num_turns"] == summary.num_turns
    with pytest.raises(KeyError, match="no run of"):
        Runs(tmp_path / "runs.csv", is_complete=True).row(replace(SHORT, seed=1))


@pytest.mark.parametrize("system", SIMULATED)
def test_each_system_serves(system: str):
    got = replace(SHORT, system=system, panel=PANELS["11b"], changed=(KV_SHARE, INTERCONNECT)).simulate()
    assert got.num_turns > 0
    assert (got.hit_rate > 0) == SIMULATED[system].keep
    assert 0.02 < got.s_per_token_p50 < 0.1


def test_every_figure_is_made_of_what_was_simulated(
    tmp_path: Path, summary: Summary, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def simulate(run: Run) -> Summary:
        """A closed form: each system bends at the paper's rate, with constants changed or not."""
        bend = run.panel.rate(run.system) if run.system in SYSTEMS else run.panel.rate("pensieve") / 1.11
        latency = run.panel.level * min(9.0, max(0.2, (run.rate / bend) ** 6))
        return replace(
            summary, turns_per_s=run.rate, s_per_token_p90=latency, num_recomputed_tokens=100, recompute_s=1.0
        )

    monkeypatch.setattr(Run, "simulate", simulate)
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["figures.py"])
    assert figures.main() == 0
    capsys.readouterr()
    # The same from the files alone.
    monkeypatch.setattr(Run, "simulate", lambda self: pytest.fail("nothing is left to simulate"))
    monkeypatch.setattr("sys.argv", ["figures.py", "--compare-only"])
    assert figures.main() == 0
    printed = capsys.readouterr().out
    assert "| 10a at 0.12 | unchanged | 2.48 / 2.48 (+0%) |" in printed
    results = {name: json.loads((tmp_path / f"figure_{name}.json").read_text()) for name in figures.FIGURES}
    assert tables.count_ratios(results, figures.ONE_CONSTANT) == {
        "ratios": 12,
        "ratios within": 12,
        "panels": 6,
        "panels within": 6,
    }
    assert results["13"]["rate"]["pensieve"] > results["13"]["rate"]["pensieve-separate"]
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        f"figure_{name}.svg" for name in figures.FIGURES if name not in ("12", "14")
    }


def test_the_policies_are_compared_seed_by_seed():
    def row(**values: float) -> dict[str, float]:
        return {"recompute_s": 1.0, "turns_per_s": 1.0, "s_per_token_p90": 0.1, **values}

    mine = row(num_recomputed_tokens=90.0, hit_rate=0.9, loaded_share=0.5)
    other = row(num_recomputed_tokens=100.0, hit_rate=0.8, loaded_share=0.5)
    compared = tables.compare_policies([(mine, other)])
    assert compared["recomputed_tokens"] == pytest.approx(-0.1)
    # 0.45 of what is not on the GPU (0.55) against 0.4 of 0.6.
    assert compared["cpu_hit_points"] == pytest.approx(100 * (0.45 / 0.55 - 0.4 / 0.6))
