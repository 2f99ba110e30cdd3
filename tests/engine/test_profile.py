"""Offline profiling: what is measured is kept, found again, and decides between loading and computing."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace

import pytest

from engine import cli
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor.local import LocalExecutor
from engine.profile import Profile, describe_profile, load_cost_model, measure_profile, profile_path

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
    assert large.load_costs["cpu"] == pytest.approx(2 * small.load_costs["cpu"])
    assert large.constant == pytest.approx(2 * small.constant)


def test_the_disk_is_measured_if_there_is_one(profile, tmp_path):
    assert profile.disk_read_s is None
    assert "disk" not in profile.cost_model(16).load_costs
    assert "disk" not in describe_profile(profile)
    path = tmp_path / "kv"
    config = EngineConfig.from_options({**OPTIONS, "kv_disk_path": str(path), "max_model_len": 128})
    with_disk = measure_profile(config, repeats=1)
    assert with_disk.disk_read_s > 0
    assert with_disk.cost_model(32).load_costs["disk"] == pytest.approx(
        2 * (with_disk.disk_read_s + with_disk.swap_in_s)
    )
    assert "GB/s" in describe_profile(with_disk)["disk"]
    assert not list(path.iterdir()), "nothing is left behind"
    path.rmdir()
    path.write_text("a file")
    with pytest.raises(ConfigError, match="cannot be measured"):
        measure_profile(config, repeats=1)


def test_the_engine_finds_the_profile_that_the_command_wrote(executor, capsys):
    analytic = load_cost_model(EngineConfig.from_options(OPTIONS), executor.facts)
    assert analytic.load_costs == {}
    options = ["--model", "embedded", "--num-threads", "1", "--chunk-size", "16", "--max-model-len", "256"]
    assert cli.main(["profile", *options]) == 0
    assert "GB/s" in capsys.readouterr().out
    measured = load_cost_model(EngineConfig.from_options(OPTIONS), executor.facts)
    assert measured.load_costs["cpu"] > 0


OTHERS = {
    "model": "another",
    "dtype": "float64",
    "device": "cpu-x86_64-64-threads",
    "tensor_parallel_size": 2,
    "fingerprint": "0" * 64,
    "processor": "Z80",
    "attention": "reference",
    "pack_weights": False,
    "torch": "2.99.0",
}


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("what", [None, *OTHERS])
def test_a_profile_of_something_else_is_a_miss_and_said(what, is_named, profile, executor, tmp_path, caplog):
    config = EngineConfig.from_options({**OPTIONS, "profile": str(tmp_path / "named.json") if is_named else None})
    path = profile_path(config, profile.model, profile.dtype, profile.device)
    identity = profile.identity if what is None else replace(profile.identity, **{what: OTHERS[what]})
    replace(profile, identity=identity).save(path)
    cost_model = load_cost_model(config, executor.facts)
    if what is None:
        assert cost_model.load_costs["cpu"] > 0
        assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    else:
        assert cost_model.load_costs == {}
        assert f"it is a profile of {what} {OTHERS[what]!r} and not" in caplog.text


def test_a_named_file_that_is_no_profile_is_refused_and_one_in_the_cache_is_a_miss(profile, executor, tmp_path, caplog):
    for name, content in (("missing.json", None), ("old.json", '{"model": "embedded"}'), ("broken.json", "{")):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=name):
            load_cost_model(EngineConfig.from_options({**OPTIONS, "profile": str(tmp_path / name)}), executor.facts)
    config = EngineConfig.from_options(OPTIONS)
    path = profile_path(config, profile.model, profile.dtype, profile.device)
    profile.save(path)
    path.write_text('{"model": "embedded"}')
    assert load_cost_model(config, executor.facts).load_costs == {}
    assert "is not a profile" in caplog.text


def test_what_is_kept_in_the_cache_is_its_users_alone(profile, tmp_path):
    path = profile_path(EngineConfig.from_options(OPTIONS), profile.model, profile.dtype, profile.device)
    profile.save(path)
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path, path.parent)] == [0o600, 0o700]
    named, before = tmp_path / "open" / "profile.json", os.umask(0o022)
    try:
        profile.save(named)
    finally:
        os.umask(before)
    assert stat.S_IMODE(named.stat().st_mode) == 0o644


def test_the_command_plots(tmp_path):
    plot, output = tmp_path / "fit.png", tmp_path / "fit.json"
    arguments = [
        "profile",
        "--model=embedded",
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
