"""Offline profiling: what is measured is kept, found again, and decides between loading and computing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from engine import cli
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor.local import LocalExecutor
from engine.profile import Profile, load_cost_model, measure_profile

OPTIONS = {"num_threads": 1, "chunk_size": 16, "max_model_len": 512}


@pytest.fixture(scope="module")
def profile() -> Profile:
    return measure_profile(EngineConfig.from_options(OPTIONS), repeats=1)


@pytest.fixture
def executor():
    executor = LocalExecutor(EngineConfig.from_options({**OPTIONS, "num_gpu_blocks": 4, "num_cpu_blocks": 0}))
    yield executor
    executor.shutdown()


@pytest.fixture(autouse=True)
def empty_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_it_measures_chunks_at_powers_of_two_and_both_directions_of_the_link(profile):
    assert list(profile.chunk_s) == [64, 128, 256, 512]
    assert min(profile.chunk_s.values()) > 0
    assert profile.constant_s > 0
    assert profile.swap_in_s > 0
    assert profile.swap_out_s > 0
    assert profile.bytes_per_block == 16 * {"float32": 1536, "bfloat16": 768}[profile.dtype]  # as the CPU has it


def test_a_saved_profile_is_the_same_and_anything_else_is_refused(profile, tmp_path):
    path = tmp_path / "a" / "profile.json"
    profile.save(path)
    assert Profile.load(path) == profile
    path.write_text(json.dumps({"model": "embedded"}))
    with pytest.raises(ConfigError, match="not a profile"):
        Profile.load(path)


def test_the_cost_model_scales_with_the_chunk(profile):
    small, large = profile.cost_model(16), profile.cost_model(32)
    assert small.chunk_cost(0) == pytest.approx(profile.constant_s + 16 * profile.per_context_token_s)
    assert large.swap_in_cost == pytest.approx(2 * small.swap_in_cost)
    assert large.constant == pytest.approx(2 * small.constant)


def test_the_engine_finds_the_profile_that_the_command_wrote(executor, capsys):
    analytic = load_cost_model(EngineConfig.from_options(OPTIONS), executor)
    assert analytic.swap_in_cost == 0
    assert cli.main(["profile", "--num-threads", "1", "--chunk-size", "16", "--max-model-len", "256"]) == 0
    assert "GB/s" in capsys.readouterr().out
    measured = load_cost_model(EngineConfig.from_options(OPTIONS), executor)
    assert measured.swap_in_cost > 0


def test_a_profile_of_something_else_is_refused(profile, executor, tmp_path):
    path = tmp_path / "other.json"
    replace(profile, model="another").save(path)
    with pytest.raises(ConfigError, match="profile of another"):
        load_cost_model(EngineConfig.from_options({**OPTIONS, "profile": str(path)}), executor)
    replace(profile, tensor_parallel_size=2).save(path)
    with pytest.raises(ConfigError, match="2 ranks"):
        load_cost_model(EngineConfig.from_options({**OPTIONS, "profile": str(path)}), executor)
    with pytest.raises(ConfigError, match="missing"):
        load_cost_model(EngineConfig.from_options({**OPTIONS, "profile": str(tmp_path / "missing.json")}), executor)


def test_the_command_plots(tmp_path):
    plot, output = tmp_path / "fit.png", tmp_path / "fit.json"
    arguments = [
        "profile",
        "--num-threads",
        "1",
        "--max-model-len",
        "256",
        "--output",
        str(output),
        "--plot",
        str(plot),
    ]
    assert cli.main(arguments) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert Profile.load(output).model == "embedded"
