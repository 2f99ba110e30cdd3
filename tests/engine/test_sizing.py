"""The calculator of sizes: its arithmetic on small numbers, and what it prints."""

from __future__ import annotations

import pytest
import yaml
from transformers import AutoConfig

from engine.cli import main
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.sizing import GIB, ModelSize, device_gib, measure_config, measure_model, size_tiers

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize(
    ("num_ranks", "rank_kv_kib", "kv_kib"),
    [
        (1, 128, 128),
        (4, 32, 128),
        (8, 16, 128),
        (16, 16, 256),
    ],  # each of 16 ranks has one of 8 heads: twice as much in all
)
def test_a_token_of_a_model_with_grouped_heads(num_ranks: int, rank_kv_kib: int, kv_kib: int) -> None:
    size = measure_config(AutoConfig.for_model("llama", **LLAMA_8B), num_ranks)
    assert size.rank_kv_bytes == rank_kv_kib * 1024
    assert size.kv_bytes == kv_kib * 1024
    assert size.weight_bytes / GIB == pytest.approx(14.96, abs=0.01)
    assert size.weight_bytes / num_ranks <= size.rank_weight_bytes <= size.weight_bytes


def test_the_tiers_of_ten_users() -> None:
    size = ModelSize(
        num_ranks=2,
        weight_bytes=4 * GIB,
        rank_weight_bytes=2 * GIB,
        kv_bytes=GIB >> 10,
        rank_kv_bytes=GIB >> 11,
        window=None,
    )
    tiers = size_tiers(size, gib=10.0, utilization=0.9, num_users=10, num_tokens=1024)
    assert tiers.gpu_gib == 10 * 0.9 - 2 - 3
    assert tiers.gpu_tokens == 4 * 2048
    assert tiers.cpu_gib == 10 - 8  # eight of ten are in the GPU tier
    assert tiers.disk_gib == 10


def test_tiers_behind_the_gpu_may_have_fewer_bits(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for kind in ("same", "int8", "int4"):
        arguments = ["size", "--model", "embedded", "--gpu", "8", "--users", "100", "--kv-cold-dtype", kind]
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert (f"kv_cold_dtype: {kind}" in said) == (kind != "same")
        size, _ = measure_model("embedded", dtype="bfloat16", kv_cold_dtype=kind)
        sizes[kind] = size_tiers(size, gib=8.0, utilization=0.9, num_users=100, num_tokens=2048).disk_gib
    assert sizes["same"] / sizes["int8"] == pytest.approx(16 / 9)  # heads of 32: bounds are a ninth
    assert sizes["same"] / sizes["int4"] == pytest.approx(3.2)


def test_devices_have_names_or_sizes() -> None:
    assert device_gib("H100") == device_gib("h100") > 79
    assert device_gib("23.5") == 23.5
    for wrong in ("h1000", "-1", "nan", ""):
        with pytest.raises(ConfigError, match="in GiB"):
            device_gib(wrong)


def test_what_it_prints_is_a_config_of_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", "--model", "embedded", "--gpu", "4", "--users", "1000000", "--context", "4000"]) == 0
    printed = capsys.readouterr().out
    config = EngineConfig.from_options(yaml.safe_load(printed[printed.index("engine:") :])["engine"])
    kib = 1.5  # of a token
    assert config.kv_offloading_size == pytest.approx(1_000_000 * 4000 * kib / 2**20, rel=0.01)
    assert config.max_model_len == 4096


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--gpu", "3"], 1, "does not fit: take more or larger GPUs"),
        (["--context", "5000"], 1, "more than the model's window of 4096"),
        (["--users", "0"], 1, "--users must be at least 1"),
        (["--gpus", "3"], 1, "tensor_parallel_size"),
        (["--dtype", "int3"], 1, "one of float32, bfloat16, float16"),
        (["--gpu-memory-utilization", "1.5"], 1, "above 0 and at most 1"),
    ],
)
def test_a_demand_that_cannot_be_met_says_why(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["size", "--model", "embedded", *arguments]) == status
    captured = capsys.readouterr()
    assert message in captured.out + captured.err
