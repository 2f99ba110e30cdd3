"""Whether host memory can hold weights and tiers, and what is said if it cannot."""

from __future__ import annotations

import pytest

from engine import host_memory as memory
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor.local import LocalExecutor
from engine.executor.model_loader import load_model
from engine.host_memory import GIB


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"gpu_memory_gib": 100_000.0}, "gpu_memory_gib"),
        ({"num_gpu_blocks": 1 << 40}, "num_gpu_blocks"),
        ({"num_gpu_blocks": 4, "kv_offloading_size": 100_000.0}, "kv_offloading_size"),
        ({"num_gpu_blocks": 4, "num_cpu_blocks": 1 << 60}, "num_cpu_blocks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tiers_that_host_memory_cannot_hold_name_the_option_and_what_there_is(options, option):
    total = memory.host_memory()
    assert total is not None
    with pytest.raises(ConfigError, match=f"lower {option}") as error:
        LocalExecutor(EngineConfig(num_threads=1, **options))
    assert error.value.param == option
    assert f"but this process can use {total.total / GIB:.1f} GiB" in error.value.message


def test_memory_that_is_there_but_taken_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(memory, "host_memory", lambda: memory.HostMemory(total=8 * GIB, available=GIB))
    config = EngineConfig(gpu_memory_gib=2.0)
    memory.check_tiers(config, GIB // 2, GIB // 2)
    assert not caplog.records
    memory.check_tiers(config, 2 * GIB, GIB)
    assert "2.0 GiB for gpu_memory_gib, 1.0 GiB for kv_offloading_size" in caplog.text
    with pytest.raises(ConfigError, match="lower gpu_memory_gib"):
        memory.check_tiers(config, 7 * GIB, 2 * GIB)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 4 MiB, of which half is free, whose control groups are files in a folder."""
    meminfo, groups, folder = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "memory"
    meminfo.write_text("MemTotal:       4096 kB\nMemFree:        1 kB\nMemAvailable:   2048 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "CONTROL_GROUPS", groups)
    monkeypatch.setattr(memory, "GROUP_LIMITS", {"": tmp_path / "none" / "memory.max", "memory": folder / "limit"})
    (folder / "a" / "b").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(("limit", "total"), [("max", 4096), ("1048576", 1024), ("9223372036854771712", 4096)])
@pytest.mark.parametrize("place", ["memory/limit", "memory/a/limit", "memory/a/b/limit", "memory/c/limit"])
def test_a_control_groups_limit_counts(limit, total, place, machine):
    (machine / "cgroup").write_text("5:devices:/\n4:cpu,memory:/a/b\n0::/elsewhere\n")
    (machine / place).parent.mkdir(exist_ok=True)
    (machine / place).write_text(f"{limit}\n")
    total = 4096 if "/c/" in place else total  # another group's
    assert memory.host_memory() == memory.HostMemory(total * 1024, min(total, 2048) * 1024)


def test_a_limit_of_the_address_space_counts(machine, monkeypatch):
    monkeypatch.setattr(memory.resource, "getrlimit", lambda what: (1 << 20, memory.resource.RLIM_INFINITY))
    assert memory.host_memory() == memory.HostMemory(1 << 20, 1 << 20)


def test_a_system_that_does_not_say(machine):
    (machine / "meminfo").unlink()
    assert memory.host_memory() is None


def test_weights_larger_than_memory_are_refused_before_they_are_read(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: memory.HostMemory(total=1 << 20, available=1 << 19))
    with pytest.raises(ConfigError, match=r"'embedded' take .* GiB .* use a smaller model"):
        load_model(EngineConfig(num_threads=1, dtype="float32"))
