"""Offline profiling: what is measured is kept, found again, and decides between loading and computing."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace

import pytest

from engine import cli
from engine import profile as profile_module
from engine.config import EngineConfig
from engine.core.cache.prices import LOAD_OVERHEAD, LoadPrices
from engine.errors import ConfigError
from engine.executor.local import LocalExecutor
from engine.executor.tiers import disk_device
from engine.executor.tiers.disk_device import device_of
from engine.profile import (
    Profile,
    choose_max_swap_outs,
    describe_disk_gain,
    describe_profile,
    load_cost_model,
    measure_profile,
    profile_path,
)

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
    assert min(with_disk.disk_read_s, with_disk.disk_write_s) > 0
    assert with_disk.disk == device_of(tmp_path)
    assert with_disk.cost_model(32, with_disk.disk).load_costs["disk"] == pytest.approx(
        2 * (with_disk.disk_read_s + with_disk.swap_in_s)
    )
    assert "disk" not in with_disk.cost_model(32, "xfs /dev/another").load_costs
    described = describe_profile(with_disk)
    assert all("GB/s" in described[name] for name in ("disk reads", "disk writes"))
    assert not list(path.iterdir()), "nothing is left behind"
    path.rmdir()
    path.write_text("a file")
    with pytest.raises(ConfigError, match="cannot be measured"):
        measure_profile(config, repeats=1)


def test_when_a_disk_pays_is_said_in_words(profile):
    """A chunk of 16 tokens takes 1 ms and 1 microsecond more for each token of context; to the GPU tier, 0.1 ms."""
    made = replace(
        profile,
        bytes_per_block=1_000_000,
        chunk_s={512: 0.0},
        constant_s=1e-3,
        per_context_token_s=1e-6,
        swap_in_s=1e-4,
    )

    def said(read_s: float) -> str:
        return describe_disk_gain(replace(made, disk_read_s=read_s))

    assert said(0.5e-3) == "everywhere in a context: 1.092 GB/s would be enough, and it is read at 2.000 GB/s"
    assert said(1.1e-3) == "behind the first 200 tokens of a context; 1.092 GB/s would be enough for all of it"
    assert said(2e-3) == "nowhere within 512 tokens: 0.708 GB/s would be enough for the last ones, 1.092 GB/s for all"
    slow_link = replace(made, swap_in_s=1.0, disk_read_s=1e-3)
    assert "no speed would be enough" in describe_disk_gain(slow_link)


def test_the_profile_of_the_disk_is_the_first_price_if_it_cannot_be_read_at_the_start(profile, executor, tmp_path):
    path = tmp_path / "kv"
    config = EngineConfig.from_options({**OPTIONS, "kv_disk_path": str(path)})
    costs = {"constant_s": 0.1, "per_context_token_s": 0.0, "swap_in_s": 0.01}
    saved = replace(profile, **costs, disk_read_s=0.5, disk_write_s=0.25, disk=device_of(path))
    saved.save(profile_path(config, profile.model, profile.dtype, profile.device))
    prices = LoadPrices(load_cost_model(config, executor.facts))
    assert prices.load_cost("disk") == pytest.approx(0.51 * LOAD_OVERHEAD)
    assert not prices.is_loaded("disk", 0, 16)
    prices.note_load("disk", 1e-9, now=0.0)
    assert prices.is_loaded("disk", 0, 16), "what is observed counts"


def test_the_device_under_a_folder(tmp_path, monkeypatch):
    assert device_of(tmp_path / "not" / "there") == device_of(tmp_path)
    number = os.stat(tmp_path).st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"21 1 99999:1 / / rw - ext4 /dev/a rw\n22 1 {name} / /x rw shared:1 - xfs /dev/b rw\n")
    monkeypatch.setattr(disk_device, "MOUNTS", mounts)
    assert device_of(tmp_path) == "xfs /dev/b"
    mounts.unlink()
    assert device_of(tmp_path) == f"device {name}"


def test_the_engine_finds_the_profile_that_the_command_wrote(executor, capsys):
    analytic = load_cost_model(EngineConfig.from_options(OPTIONS), executor.facts)
    assert analytic.load_costs == {}
    options = ["--model", "embedded", "--num-threads", "1", "--chunk-size", "16", "--max-model-len", "256"]
    assert cli.main(["profile", *options]) == 0
    assert "GB/s" in capsys.readouterr().out
    measured = load_cost_model(EngineConfig.from_options(OPTIONS), executor.facts)
    assert measured.load_costs["cpu"] > 0


def test_a_step_copies_as_many_blocks_ahead_of_time_as_the_shortest_one_has_time_for(profile, executor, monkeypatch):
    profile = replace(profile, chunk_size=16, chunk_s={16: 0.011, 32: 0.010}, swap_out_s=0.0007)
    assert [profile.max_swap_outs(chunk_size) for chunk_size in (16, 32, 1024, 1)] == [14, 7, 1, 64]
    config, on_gpu = EngineConfig.from_options(OPTIONS), replace(executor.facts, device="cuda:0")
    found = [None, profile, profile]
    monkeypatch.setattr(profile_module, "_find_profile", lambda *_, **__: found.pop(0))
    assert [choose_max_swap_outs(config, on_gpu) for _ in range(2)] == [None, 14]
    assert choose_max_swap_outs(config, executor.facts) is None  # copies take the time of the cores that compute
    assert choose_max_swap_outs(EngineConfig.from_options({**OPTIONS, "max_swap_outs": 3}), on_gpu) == 3


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
