"""Engines whose cold tiers hold KV in fewer bits: lossy within bounds, through all tiers, and never mixed with exact KV."""

from __future__ import annotations

import logging

import pytest
import torch

from engine.cold_error import TEXT, measure_cold_error
from engine.config import COLD_DTYPES, EngineConfig
from engine.core.request import SamplingParams
from engine.errors import ConfigError
from engine.executor.local import LocalExecutor
from engine.executor.tiers.kv_content import kv_identity
from engine.server import create_server
from tests.engine import test_disk_tier, test_handover
from tests.engine.test_disk_tier import any_load_is_cheap, say, served  # noqa: F401 (a fixture)

COLD_KINDS = COLD_DTYPES[1:]
FACTS = ("my cat is called Mia", "the code of my locker is 4711", "my brother is named Tom")
SIZES = {"num_threads": 1, "chunk_size": 8, "max_model_len": 320}


@pytest.mark.parametrize("kind", COLD_KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_said_is_recalled_from_quantised_kv(kind, dtype):
    """Through two tiny tiers: the first session is pushed out, and comes back from the CPU tier."""
    options = {**SIZES, "dtype": dtype, "num_gpu_blocks": 40, "num_cpu_blocks": 200, "kv_cold_dtype": kind}
    with create_server(**options) as server:
        for fact in FACTS:
            server.process_request("ada", fact)
        for i in range(12):
            server.process_request(f"other-{i}", f"the code of my house is {1000 + i} " * 4)
        answer = server.chat("ada", "what is the code of my locker?", SamplingParams(temperature=0.0, max_tokens=20))
        assert "4711" in answer.text
        stats = server.get_statistics()
        assert stats["num_cpu_cached_tokens"] > 0
        executor = server.engine._executor
        assert executor.cpu_store.storage[0].nbytes < executor.gpu_store.storage[0].nbytes
        moved = stats["num_swap_out_bytes"] / stats["num_swap_outs"]
        assert moved == executor.cpu_store.storage[0].nbytes


def test_a_damaged_record_is_seen_and_computed_again():
    options = {**SIZES, "num_gpu_blocks": 40, "num_cpu_blocks": 200, "kv_cold_dtype": "int8", "verify_swaps": True}
    with create_server(**options) as server:
        for fact in FACTS:
            server.process_request("ada", fact)
        for i in range(12):
            server.process_request(f"other-{i}", f"the code of my house is {1000 + i} " * 4)
        bits = server.engine._executor.cpu_store.storage
        bits ^= 0x3F
        answer = server.chat("ada", "what is the code of my locker?", SamplingParams(temperature=0.0, max_tokens=20))
        assert "4711" in answer.text
        assert server.get_statistics()["num_corrupted_swaps"] > 0


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_conversations_come_back_with_quantised_kv_after_a_restart(kind, tmp_path):
    messages: dict[str, list[tuple[str, str]]] = {}
    with served(tmp_path, messages, kv_cold_dtype=kind) as server:
        say(server, "My name is {}.")
        before = say(server, "What is my name?")
    assert any(path.stat().st_size for path in tmp_path.rglob("*.kv"))
    with served(tmp_path, {name: list(turns) for name, turns in messages.items()}, kv_cold_dtype=kind) as server:
        after = say(server, "What is my name?")
    assert [answer.num_cached_tokens for answer in after] == [
        answer.num_prompt_tokens + len(answer.token_ids) - 1 for answer in before
    ]
    for name, answer in zip(test_disk_tier.NAMES, after, strict=True):
        assert name in answer.text
    with served(tmp_path, messages) as server:  # exact: nothing of it
        assert [answer.num_cached_tokens for answer in say(server, "What is my name?")] == [0] * len(after)


async def test_a_conversation_goes_on_elsewhere_with_quantised_kv(monkeypatch):
    monkeypatch.setattr(test_handover, "OPTIONS", {**test_handover.OPTIONS, "kv_cold_dtype": "int8"})
    async with test_handover.engines("a", "b") as (first, second):
        talk = test_handover.Talk("mine")
        await talk.say(first, "My name is Mia, and my cat is called Tom.")
        num_known = talk.num_known
        await test_handover.know(second, talk)
        answer = await talk.say(second, "And what is my cat called?")
        assert answer.num_cached_tokens >= 0.95 * num_known
        assert second.get_statistics()["slow_transfers"]["peer_loaded"] > 0


def test_kv_of_another_format_is_another_identity():
    identities = set()
    for kind in ("same", *COLD_KINDS):
        config = EngineConfig(num_threads=1, num_gpu_blocks=2, num_cpu_blocks=2, kv_cold_dtype=kind)
        executor = LocalExecutor(config)
        identities.add(kv_identity(config, executor, 1))
        executor.shutdown()
    assert len(identities) == 1 + len(COLD_KINDS)


def test_the_same_memory_holds_more_blocks():
    config = EngineConfig(num_threads=1, dtype="float32", num_gpu_blocks=2, kv_offloading_size=0.01)
    numbers = {}
    for kind in ("same", *COLD_KINDS):
        executor = LocalExecutor(EngineConfig(**{**vars_of(config), "kv_cold_dtype": kind}))
        numbers[kind] = executor.num_cpu_blocks
        assert executor.cpu_store.num_bytes <= 0.01 * 2**30
        executor.shutdown()
    assert numbers["fp8"] > 3.7 * numbers["same"]
    assert numbers["int8"] > 2.5 * numbers["same"]
    assert numbers["int4"] > 3.9 * numbers["same"]


def vars_of(config: EngineConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in ("num_threads", "dtype", "num_gpu_blocks", "kv_offloading_size")}


def test_ranks_of_a_group_have_records_of_their_own(tiny_model, make_driver):
    """What the group recalls from its CPU tiers differs little from what one process computes."""
    options = {
        "chunk_size": 8,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 2,
        "max_model_len": 96,
        "num_gpu_blocks": 12,
    }
    prompt = list(range(10, 50))
    expected = make_driver(tiny_model("llama"), mode="stateless", **options).generate("a", prompt)
    group = make_driver(tiny_model("llama"), tensor_parallel_size=2, num_cpu_blocks=40, kv_cold_dtype="int8", **options)
    assert group.generate("a", prompt, conversation_id="mine") == expected
    group.generate("b", list(range(100, 180)), conversation_id="other")
    group.add("c", [*prompt, *expected, 7], "mine")
    group.run()
    assert group.core.get_statistics()["num_swap_ins"] > 0
    assert len(group.tokens("c")) == 8


def test_the_error_is_measured_at_the_start_and_said(caplog):
    caplog.set_level(logging.INFO)
    with create_server(num_threads=1, num_gpu_blocks=64, num_cpu_blocks=64, max_model_len=512, kv_cold_dtype="int4"):
        pass
    assert "kv_cold_dtype int4 is lossy" in caplog.text
    assert "perplexity" in caplog.text
    caplog.clear()
    with create_server(num_threads=1, num_gpu_blocks=64, num_cpu_blocks=64, max_model_len=512):
        pass
    assert "lossy" not in caplog.text


@pytest.mark.parametrize(("kind", "allowed"), [("same", 0.0), ("int8", 0.05), ("fp8", 0.5), ("int4", 2.0)])
def test_the_error_of_each_format_is_bounded(kind, allowed):
    config = EngineConfig(num_threads=1, dtype="float32", num_gpu_blocks=64, num_cpu_blocks=64, kv_cold_dtype=kind)
    executor = LocalExecutor(config)
    ids = [1 + ord(character) % 90 for character in TEXT]
    error = measure_cold_error(executor, ids, config.chunk_size, 64)
    assert error is not None
    assert error.num_cold == 8 * config.chunk_size
    assert (error.mean_difference == 0.0) == (kind == "same")
    assert error.mean_difference <= allowed
    executor.shutdown()


def test_a_dtype_that_cannot_be_converted_is_refused(monkeypatch):
    monkeypatch.setattr("engine.executor.local.CONVERTED_DTYPES", (torch.float16,))
    with pytest.raises(ConfigError, match="cannot hold KV in"):
        LocalExecutor(EngineConfig(num_threads=1, num_gpu_blocks=2, num_cpu_blocks=2, kv_cold_dtype="int8"))
