"""Turns of conversations that have a history, and whose working set is three times the GPU tier.

This engine without a cache, with one tier, with two; and transformers' continuous batching with prefix sharing and
offloading. The workload is the one of benchmarks/peers: conversations come back in random order, so one tier has some of
them still.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import traceback
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import torch
import transformers
from run_transformers import batching
from setting import CHUNK_SIZE, Setting
from steps import make_config
from tqdm import tqdm
from workload import Generate, Turn, Workload, run_workload

from engine.async_engine import AsyncEngine
from engine.attention.device_health import check_device
from engine.core.request import SamplingParams
from engine.generation import Generation
from engine.text.prompt import TokenPrompt

VOCABULARY = 2000


def tier_sizes(setting: Setting) -> dict[str, int]:
    """Blocks: a third of the working set in the GPU tier, all of it in the CPU tier."""
    longest = setting.max_context_len
    return {
        "num_gpu_blocks": max(setting.working_set // 3, longest + 2 * CHUNK_SIZE) // CHUNK_SIZE + 1,
        "num_cpu_blocks": setting.working_set // CHUNK_SIZE + 1,
        "max_model_len": longest + 1,
    }


def configurations(setting: Setting) -> dict[str, dict[str, Any]]:
    sizes = tier_sizes(setting)
    return {
        "two tiers": sizes,
        "stateless": {**sizes, "mode": "stateless"},
        "GPU only": {**sizes, "num_cpu_blocks": 0},
    }


def measure_conversations(setting: Setting, folder: str) -> Iterator[dict[str, Any]]:
    """All figures so far, after each run of each configuration.

    A configuration that fails leaves its traceback under `failures` and the others go on; then raises RuntimeError.
    """
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for name in configurations(setting):
        try:
            for row in _measure_engine(setting, folder, name):
                rows.append(row)
                yield {"rows": rows, **compare(rows), "failures": failures}
        except Exception:
            failures[name] = traceback.format_exc()
            yield {"rows": rows, **compare(rows), "failures": failures}
            check_device(setting.device)
        _give_memory_back()
    if failures:
        raise RuntimeError(f"failed: {', '.join(failures)}\n" + "\n".join(failures.values()))


def _measure_engine(setting: Setting, folder: str, name: str) -> Iterator[dict[str, Any]]:
    """One configuration at each number of turns at once."""
    engine = AsyncEngine(make_config(setting, folder, **configurations(setting)[name]))
    with asyncio.Runner() as runner:
        try:
            for active in setting.active if name == "two tiers" else setting.active_others:
                yield runner.run(_measure_workload(setting, engine, name, active))
            runner.run(engine.check_integrity())
        finally:
            runner.run(engine.shutdown())


async def _measure_workload(setting: Setting, engine: AsyncEngine, name: str, active: int) -> dict[str, Any]:
    async def generate(turn: Turn) -> AsyncIterator[Sequence[int]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=turn.output_len, ignore_eos=True)
        names = f"{active}.{turn.request_id}", f"{active}.{turn.session_id}"
        async for delta in engine.generate(Generation(*names, TokenPrompt(turn.prompt), sampling)):
            yield delta.token_ids

    before = engine.get_statistics()
    row = await _run(setting, name, active, generate)
    after = engine.get_statistics()
    for part in ("gpu_cached", "cpu_cached", "not_loaded", "dropped", "new"):
        key = f"num_{part}_tokens"
        row[key] = after[key] - before[key]
    return row


async def _run(setting: Setting, name: str, active: int, generate: Generate) -> dict[str, Any]:
    workload = Workload(
        name,
        setting.num_sessions,
        min(active, setting.num_sessions),
        setting.num_turns,
        setting.prompt_len,
        setting.output_len,
        VOCABULARY,
        seed=active,  # another one each time, or the cache would know it
        history_len=setting.history_len,
        is_shuffled=True,
    )
    with tqdm(total=setting.num_sessions * setting.num_turns, desc=f"{name}, {active} at once", unit="turn") as bar:
        result = await run_workload(workload, generate, bar.update)
    ttfts = sorted(turn["ttft_s"] for turn in result["turns"])
    return {
        "configuration": name,
        "active": active,
        "seconds": result["seconds"],
        "turns_per_s": len(ttfts) / result["seconds"],
        "output_tokens_per_s": result["output_tokens_per_s"],
        "ttft_p50_s": statistics.median(ttfts),
        "ttft_p90_s": ttfts[int(0.9 * (len(ttfts) - 1))],
        "s_per_token_p50": statistics.median(turn["s_per_token"] for turn in result["turns"]),
    }


def measure_peer(setting: Setting, folder: str, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Measure transformers' continuous batching with as many blocks of the same size, after each run.

    Offloading needs a GPU.

    rows: of the engine's configurations, to compare with.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.random.fork_rng(), setting.device:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=setting.dtype, attn_implementation="sdpa")
    model.eval()
    sizes = tier_sizes(setting)
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    token_bytes = 2 * layers * heads * (config.hidden_size // config.num_attention_heads) * setting.dtype.itemsize
    cpu_gib = sizes["num_cpu_blocks"] * CHUNK_SIZE * token_bytes / (1 << 30)
    peers: list[dict[str, Any]] = []
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            generate, _ = runner.run(
                stack.enter_async_context(
                    batching(
                        model,
                        page_size=CHUNK_SIZE,
                        num_blocks=sizes["num_gpu_blocks"],
                        max_batch_tokens=setting.max_num_batched_tokens,
                        cpu_offload_space=0.0 if setting.is_smoke else cpu_gib,
                        timeout_s=120.0,
                    )
                )
            )
            for active in setting.active_peer:
                peers.append(runner.run(_run(setting, "transformers", active, generate)))
                yield {"rows": peers, **compare([*rows, *peers])}
        finally:
            runner.run(stack.aclose())
            del model
            _give_memory_back()


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the throughput of two tiers with each of the others, at the same p90 time to first token.

    at_equal_p90: for each run of the two tiers, its turns/s over those of the others. two_tiers_over: the same for the
    fastest run.
    """
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["configuration"], []).append(row)
    ours = by_name.pop("two tiers", [])
    compared = [
        {
            "active": own["active"],
            "ttft_p90_s": own["ttft_p90_s"],
            "over": {
                name: own["turns_per_s"] / turns_per_s_at(own["ttft_p90_s"], others) for name, others in by_name.items()
            },
        }
        for own in sorted(ours, key=lambda row: float(row["turns_per_s"]))
    ]
    return {"two_tiers_over": compared[-1]["over"] if compared else {}, "at_equal_p90": compared}


def turns_per_s_at(p90_s: float, rows: list[dict[str, Any]]) -> float:
    """What a configuration does if its p90 is to be so long: in a line between the runs on both sides of it.

    Never less than a run that is as soon. If none is, it is what the one with the shortest p90 does, which is too much.
    """
    runs = sorted((float(row["ttft_p90_s"]), float(row["turns_per_s"])) for row in rows)
    as_soon = [run for run in runs if run[0] <= p90_s]
    if not as_soon:
        return runs[0][1]
    most = max(turns_per_s for _, turns_per_s in as_soon)
    if len(as_soon) == len(runs):
        return most
    (left_s, left), (right_s, right) = as_soon[-1], runs[len(as_soon)]
    return max(most, left + (right - left) * (p90_s - left_s) / (right_s - left_s))


def _give_memory_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
