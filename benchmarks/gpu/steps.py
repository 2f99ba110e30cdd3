"""Whole steps of the real executor.

Decodes against memory bandwidth, prefill against the matrix rate, swaps against pinned copies, what of a swap-in is
hidden, what a step takes outside the model, and the accuracy of bf16.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any

import stand_ins
import torch
from answers import Answers
from eager import GREEDY, compare_prompts_with_eager, compare_with_eager, logits_kept, without_graphs
from setting import CHUNK_SIZE, Setting, Shape
from timing import seconds_of, timed, wall
from tqdm import tqdm

from engine.attention.device_health import check_device
from engine.config import EngineConfig
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.plan import BlockCopy, QuerySegment, RequestStart, StepPlan
from engine.core.request import Request, SamplingParams
from engine.core.tier_table import CPU, GPU
from engine.executor.local import LocalExecutor
from engine.executor.packed_linear import unpack_linears
from engine.executor.tiers.block_copy import DmaCopier
from engine.executor.tiers.cuda_copies import load_cuda_copies
from engine.executor.tiers.streams import cuda_streams
from engine.executor.tiers.swapper import StreamSwapper
from engine.step_loop import LookAhead, StepLoop

# Kernels of a profile that are written down, those that take longest.
PROFILED_KERNELS = 25


def make_config(setting: Setting, folder: str, **options: Any) -> EngineConfig:
    return EngineConfig.from_options(
        {
            "model": folder,
            "load_format": "dummy",
            "device": setting.device.type,
            "dtype": setting.dtype_name,
            "chunk_size": CHUNK_SIZE,
            # The other sections, and the gate, show that Triton's interpreter runs the kernel.
            "attention_backend": "reference" if setting.is_smoke else "auto",
            "max_num_seqs": max(*setting.decode_batches, setting.overhead_batch),
            "max_num_batched_tokens": setting.max_num_batched_tokens,
            "num_threads": 1 if setting.is_smoke else None,
            **options,
        }
    )


def measure_model(setting: Setting, name: str, folder: str, roofs: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Everything that one loaded model is measured for: all figures so far, whenever there are more.

    A part that fails leaves its traceback under `failures` and the others go on; then raises
    RuntimeError at the end, and DeviceFailedError at once.
    """
    shape = setting.models[name]
    after_context = max(setting.decode_steps + 2, max(setting.prompt_lens))
    longest = max(setting.prefill_len, setting.decode_context + after_context)
    blocks_each = -(-longest // CHUNK_SIZE)
    num_blocks = max(setting.decode_batches) * (setting.decode_context // CHUNK_SIZE + 2) + 4
    num_blocks = max(num_blocks, blocks_each, setting.num_swapped_blocks * 2)
    num_blocks = _that_fit(setting, shape, num_blocks)
    longest_transfer = max(context for context, _ in setting.transfers) // CHUNK_SIZE
    num_cpu_blocks = max(2 * setting.num_swapped_blocks, longest_transfer)
    config = make_config(setting, folder, num_gpu_blocks=num_blocks, num_cpu_blocks=num_cpu_blocks)
    start = time.perf_counter()
    executor = LocalExecutor(config)
    load_s = time.perf_counter() - start
    if setting.is_smoke:
        stand_ins.give_graphs(executor, config.max_num_seqs, config.max_num_batched_tokens)
    with torch.inference_mode():
        executor.gpu_store.storage.normal_()  # zeros take less power, and so less time
        executor.cpu_store.storage.zero_()
    parts: dict[str, Iterator[Any]] = {
        "decode": _measure_decodes(setting, executor, roofs),
        "prefill": _measure_prefill(setting, executor, shape, roofs),
        "graphs_against_eager": _compare_graphs(setting, executor),
        "prompts_by_graphs": _measure_prompts_by_graphs(setting, executor),
        "hidden": _measure_hidden(setting, executor),
        "swaps": _measure_swaps(setting, executor, roofs),
        "overhead": _measure_overhead(setting, executor),
        "profiles": _profile(setting, executor),  # last: the profiler may stay in the way
    }
    failures: dict[str, str] = {}
    figures: dict[str, Any] = {
        "load_and_capture_s": load_s,
        "attention_backend": executor.facts.attention_backend,
        "copies_in_batches": load_cuda_copies() is not None,
        "has_compiled_layers": executor.loaded.has_compiled_layers,
        "num_recorded_sizes": len(executor.runner.graphs.sizes),
        "num_parameters": executor.loaded.num_parameters,
        "bytes_per_block": executor.bytes_per_block,
        "failures": failures,
    }
    try:
        for part, results in parts.items():
            begin = time.perf_counter()
            try:
                for figures[part] in results:
                    yield figures
            except Exception:
                failures[part] = traceback.format_exc()
                yield figures
                check_device(setting.device)
            figures[f"{part}_s"] = time.perf_counter() - begin
            figures["num_eager_forwards"] = executor.runner.num_eager_forwards
        yield figures
    finally:
        executor.shutdown()
    if failures:
        raise RuntimeError(f"failed: {', '.join(failures)}\n" + "\n".join(failures.values()))


def _that_fit(setting: Setting, shape: Shape, num_blocks: int) -> int:
    """Blocks for the largest batch, or as many as half of the device holds."""
    if setting.is_smoke:
        return num_blocks
    block = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * CHUNK_SIZE * setting.dtype.itemsize
    _, total = torch.cuda.mem_get_info()
    return min(num_blocks, int(total * 0.55) // block)


def _starts(num_requests: int, num_tokens: int, blocks_each: int) -> tuple[RequestStart, ...]:
    return tuple(
        RequestStart(str(i), num_tokens, num_tokens, GREEDY, (), tuple(range(i * blocks_each, (i + 1) * blocks_each)))
        for i in range(num_requests)
    )


def _tokens(number: int) -> tuple[int, ...]:
    """Different ones: a product of equal rows takes less power than one of a real prompt, and so less time."""
    return tuple((37 * i + 7) % 1999 + 8 for i in range(number))


def _ended(num_requests: int) -> StepPlan:
    return StepPlan(0, (), ended=tuple(map(str, range(num_requests))))


def _measure_decodes(
    setting: Setting, executor: LocalExecutor, roofs: dict[str, float]
) -> Iterator[list[dict[str, Any]]]:
    """Measure steps by batch size, sequentially and on the device alone.

    Also how often the least time for weights and KV fits into it: that of reading them (`over_floor`), and that at the
    rate of a copy on the device (`over_copy_floor`), which is slower than kernels that only read.
    """
    context = setting.decode_context
    blocks_each = -(-(context + setting.decode_steps + 1) // CHUNK_SIZE)
    weights = sum(p.nbytes for p in executor.loaded.model.parameters())
    # Of the input embedding only a few rows are read, unless it is the output's weight too.
    embeddings = executor.loaded.model.get_input_embeddings().weight
    if executor.loaded.model.get_output_embeddings().weight is not embeddings:
        weights -= embeddings.nbytes
    rows: list[dict[str, Any]] = []
    for batch in tqdm(setting.decode_batches, desc="decode", unit="batch"):
        if batch * blocks_each > executor.num_gpu_blocks:
            rows.append({"batch": batch, "skipped": "its KV does not fit"})
            continue
        first = tuple(QuerySegment(str(i), context - 1, (7,), True) for i in range(batch))
        executor.execute(StepPlan(0, first, _starts(batch, context, blocks_each)))
        seconds = []
        for step in range(setting.decode_steps):
            plan = StepPlan(0, tuple(QuerySegment(str(i), context + step, None, True) for i in range(batch)))
            begin = time.perf_counter()
            executor.execute(plan)
            seconds.append(time.perf_counter() - begin)
        device_s = _replay_seconds(setting, executor, batch)  # of the last step, again
        executor.execute(_ended(batch))
        num_bytes = weights + batch * context * executor.bytes_per_block // CHUNK_SIZE
        step_s = statistics.median(seconds[2:])
        floors = {"floor": num_bytes / roofs["read_bytes_per_s"], "copy_floor": num_bytes / roofs["copy_bytes_per_s"]}
        rows.append(
            {
                "batch": batch,
                "context_len": context,
                "step_ms": step_s * 1e3,
                **{f"{name}_ms": floor_s * 1e3 for name, floor_s in floors.items()},
                **{f"over_{name}": step_s / floor_s for name, floor_s in floors.items()},
                "tokens_per_s": batch / step_s,
                "device_ms": None if device_s is None else device_s * 1e3,
                **{
                    f"device_over_{name}": None if device_s is None else device_s / floor_s
                    for name, floor_s in floors.items()
                },
            }
        )
        yield rows


def _replay_seconds(setting: Setting, executor: LocalExecutor, batch: int) -> float | None:
    """Return seconds of the device for the recorded step of so many requests; None if there is none."""
    graphs = executor.runner.graphs
    size = graphs.size_for(batch)
    if size is None:
        return None
    return statistics.median(timed(lambda: graphs.replay(size), setting.device) for _ in range(setting.repeats + 1))


def _compare_graphs(setting: Setting, executor: LocalExecutor) -> Iterator[list[dict[str, Any]]]:
    """The smallest and the largest batch, tokens and logits."""
    rows: list[dict[str, Any]] = []
    for batch in sorted({min(setting.decode_batches), max(setting.decode_batches)}):
        longest = min(setting.decode_context, (executor.num_gpu_blocks // batch - 1) * CHUNK_SIZE)
        context_lens = [max(1, longest * (i + 1) // batch) for i in range(batch)]
        rows.append({"batch": batch, **asdict(compare_with_eager(executor, context_lens, setting.compared_steps))})
        yield rows
    # Part of a prompt, and a first prompt, in one step.
    longest = max(setting.prompt_lens)
    lengths = [(longest // 2, setting.decode_context), (longest // 4, 0)]
    rows.append({"new_and_context": lengths, **asdict(compare_prompts_with_eager(executor, lengths))})
    yield rows


def _profile(setting: Setting, executor: LocalExecutor) -> Iterator[dict[str, Any]]:
    """List the kernels that take the time of recorded steps (smallest and largest batch) and of one prompt."""
    profiles: dict[str, Any] = {}
    context = setting.decode_context
    blocks_each = -(-(context + 1) // CHUNK_SIZE)
    for batch in sorted({min(setting.decode_batches), max(setting.decode_batches)}):
        if batch * blocks_each > executor.num_gpu_blocks:
            continue
        segments = tuple(QuerySegment(str(i), context - 1, (7,), True) for i in range(batch))
        executor.execute(StepPlan(0, segments, _starts(batch, context, blocks_each)))
        graphs = executor.runner.graphs
        size = graphs.size_for(batch)
        if size is not None:
            profiles[f"decode of {batch}"] = _kernels_of(setting, partial(graphs.replay, size))
        executor.execute(_ended(batch))
        yield profiles
    blocks = min(-(-setting.prefill_len // CHUNK_SIZE), executor.num_gpu_blocks)
    plan = StepPlan(0, (QuerySegment("0", 0, _tokens(blocks * CHUNK_SIZE), True),))
    executor.execute(StepPlan(0, (), _starts(1, blocks * CHUNK_SIZE, blocks)))
    profiles[f"prompt of {blocks * CHUNK_SIZE}"] = _kernels_of(setting, lambda: executor.execute(plan))
    executor.execute(_ended(1))
    yield profiles


def _kernels_of(setting: Setting, call: Callable[[], object]) -> dict[str, Any]:
    """Microseconds of the device by kernel, in all and of those that took longest, in one call."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU if setting.is_smoke else activity.CUDA]) as profile:
        call()
        if not setting.is_smoke:
            torch.cuda.synchronize()
    name = "self_cpu_time_total" if setting.is_smoke else "self_device_time_total"
    kernels = [(event.key, event.count, getattr(event, name)) for event in profile.key_averages()]
    kernels.sort(key=lambda kernel: -kernel[2])
    return {
        "num_kernels": len(kernels),
        "num_launches": sum(count for _, count, _ in kernels),
        "us": sum(us for _, _, us in kernels),
        "longest": [
            {"kernel": key[:120], "launches": count, "us": round(us, 1)}
            for key, count, us in kernels[:PROFILED_KERNELS]
        ],
    }


def _measure_prefill(
    setting: Setting, executor: LocalExecutor, shape: Shape, roofs: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """One prompt in one step, against the matrix rate."""
    length = setting.prefill_len
    blocks = min(-(-length // CHUNK_SIZE), executor.num_gpu_blocks)
    length = blocks * CHUNK_SIZE
    embedding = executor.loaded.model.get_input_embeddings().weight.numel()
    plan = StepPlan(0, (QuerySegment("0", 0, _tokens(length), True),))
    executor.execute(StepPlan(0, (), _starts(1, length, blocks)))
    seconds = wall(lambda: executor.execute(plan), min(3, setting.repeats))
    executor.execute(_ended(1))
    num_in_layers = executor.loaded.num_parameters - embedding
    if executor.loaded.model.get_output_embeddings().weight is not executor.loaded.model.get_input_embeddings().weight:
        num_in_layers -= embedding  # of the output's, one row is computed
    attention = 2 * shape.num_layers * shape.num_heads * shape.head_dim * length**2
    flop = 2 * num_in_layers * length + attention
    yield {
        "num_tokens": length,
        "ms": seconds * 1e3,
        "tokens_per_s": length / seconds,
        "flop_per_s": flop / seconds,
        "share_of_matrix_rate": flop / seconds / roofs["matmul_flop_per_s"],
    }


def swappers(setting: Setting, executor: LocalExecutor) -> Iterator[tuple[str, StreamSwapper]]:
    """By copy engines."""
    copier = DmaCopier(None if setting.is_smoke else load_cuda_copies())
    streams = stand_ins.streams() if setting.is_smoke else cuda_streams(setting.device)
    yield "dma", StreamSwapper(executor.gpu_store, executor.cpu_store, streams, (copier, copier), verify=False)


@contextmanager
def swapping_by(executor: LocalExecutor, swapper: StreamSwapper) -> Iterator[None]:
    runner = executor.runner
    original, runner.swapper = runner.swapper, swapper
    try:
        yield
    finally:
        runner.swapper = original


def _measure_swaps(
    setting: Setting, executor: LocalExecutor, roofs: dict[str, float]
) -> Iterator[list[dict[str, Any]]]:
    """Steps that only copy, of whole blocks in random order: each way alone, and both at once."""
    n = setting.num_swapped_blocks
    generator = torch.Generator().manual_seed(0)
    gpu, cpu = (torch.randperm(2 * n, generator=generator).tolist() for _ in range(2))
    swap_ins = tuple(BlockCopy(CPU, source, GPU, target) for source, target in zip(cpu[:n], gpu[:n], strict=True))
    swap_outs = tuple(BlockCopy(GPU, source, CPU, target) for source, target in zip(gpu[n:], cpu[n:], strict=True))
    plans = {
        "in": StepPlan(0, (), swap_ins=swap_ins),
        "out": StepPlan(0, (), swap_outs=swap_outs),
        "both": StepPlan(0, (), swap_ins=swap_ins, swap_outs=swap_outs),
    }
    reference = {
        "in": roofs["host_to_device_bytes_per_s"],
        "out": roofs["device_to_host_bytes_per_s"],
        "both": roofs["both_ways_bytes_per_s"],
    }
    rows: list[dict[str, Any]] = []
    for kind, swapper in swappers(setting, executor):
        with swapping_by(executor, swapper):
            for way, plan in plans.items():
                seconds = wall(lambda plan=plan: executor.execute(plan), setting.repeats)  # type: ignore[misc]
                num_bytes = (len(plan.swap_ins) + len(plan.swap_outs)) * executor.bytes_per_block
                rows.append(
                    {
                        "by": kind,
                        "way": way,
                        "mib": num_bytes / (1 << 20),
                        "bytes_per_s": num_bytes / seconds,
                        "share_of_pinned_copy": num_bytes / seconds / reference[way],
                    }
                )
                yield rows


def _measure_prompts_by_graphs(setting: Setting, executor: LocalExecutor) -> Iterator[list[dict[str, Any]]]:
    """Steps of so many new tokens of one request over a context, by graphs and without: what recording them saves."""
    context = setting.decode_context
    rows: list[dict[str, Any]] = []
    for num_new in tqdm(setting.prompt_lens, desc="prompts by graphs", unit="size"):
        total = context + num_new
        executor.execute(StepPlan(0, (), _starts(1, total, -(-total // CHUNK_SIZE))))
        plan = StepPlan(0, (QuerySegment("0", context, _tokens(num_new), True),))
        by_graphs_s = wall(lambda plan=plan: executor.execute(plan), setting.repeats)  # type: ignore[misc]
        with without_graphs(executor):
            without_s = wall(lambda plan=plan: executor.execute(plan), setting.repeats)  # type: ignore[misc]
        executor.execute(_ended(1))
        rows.append(
            {
                "context_len": context,
                "num_new_tokens": num_new,
                "by_graphs_ms": by_graphs_s * 1e3,
                "without_graphs_ms": without_s * 1e3,
            }
        )
        yield rows


def _measure_hidden(setting: Setting, executor: LocalExecutor) -> Iterator[list[dict[str, Any]]]:
    """A context that is swapped in under the computation of new tokens: each alone, and together.

    As the engine serves it, and by copy engines without graphs: steps with swap-ins are recorded for the executor's own
    swapper alone.
    """
    rows: list[dict[str, Any]] = []
    for row in _hidden(setting, executor, "as served"):
        rows.append(row)
        yield rows
    swapper = dict(swappers(setting, executor))["dma"]
    with swapping_by(executor, swapper), without_graphs(executor):
        for row in _hidden(setting, executor, "dma, without graphs"):
            rows.append(row)
            yield rows


def _hidden(setting: Setting, executor: LocalExecutor, by: str) -> Iterator[dict[str, Any]]:
    for context, num_new in tqdm(setting.transfers, desc=f"swap-ins hidden ({by})", unit="size"):
        num_blocks = context // CHUNK_SIZE
        blocks_each = -(-(context + num_new) // CHUNK_SIZE)
        if blocks_each > executor.num_gpu_blocks:
            continue
        executor.execute(StepPlan(0, (), _starts(1, context + num_new, blocks_each)))
        segment = QuerySegment("0", context, _tokens(num_new), True)
        sources = random.Random(0).sample(range(num_blocks), num_blocks)  # in order they would be one copy
        copies = tuple(BlockCopy(CPU, source, GPU, i) for i, source in enumerate(sources))
        plans = [
            StepPlan(0, (segment,)),
            StepPlan(0, (), swap_ins=copies),
            StepPlan(0, (segment,), swap_ins=copies),
        ]
        compute_s, transfer_s, both_s = (
            wall(lambda plan=plan: executor.execute(plan), setting.repeats)  # type: ignore[misc]
            for plan in plans
        )
        executor.execute(_ended(1))
        yield {
            "by": by,
            "context_len": context,
            "num_new_tokens": num_new,
            "mib": num_blocks * executor.bytes_per_block / (1 << 20),
            "compute_ms": compute_s * 1e3,
            "transfer_ms": transfer_s * 1e3,
            "together_ms": both_s * 1e3,
            "share_hidden": min(1.0, (compute_s + transfer_s - both_s) / min(compute_s, transfer_s)),
        }


def _measure_overhead(setting: Setting, executor: LocalExecutor) -> Iterator[dict[str, Any]]:
    """Measure what of a decode step is not the model.

    Driven by the core, as the engine does it: each step queued after the one before, and sequentially.
    """
    batch = setting.overhead_batch
    ahead_s, _ = _drive_decodes(setting, executor, is_ahead=True)
    in_turn_s, parts = _drive_decodes(setting, executor, is_ahead=False)
    model_s = _replay_seconds(setting, executor, batch)

    def outside(step_s: float) -> float | None:
        return None if model_s is None else (step_s - model_s) * 1e3

    yield {
        "batch": batch,
        "step_ms": ahead_s * 1e3,
        "step_in_turn_ms": in_turn_s * 1e3,
        **{f"{name}_ms": seconds * 1e3 for name, seconds in parts.items()},
        "model_ms": None if model_s is None else model_s * 1e3,
        "outside_the_model_ms": outside(ahead_s),
        "outside_the_model_in_turn_ms": outside(in_turn_s),
    }


def _drive_decodes(setting: Setting, executor: LocalExecutor, *, is_ahead: bool) -> tuple[float, dict[str, float]]:
    """Return median seconds between results, and medians of the host's parts, of steps of decodes."""
    batch = setting.overhead_batch
    core = EngineCore(
        CacheConfig(num_gpu_blocks=executor.num_gpu_blocks, chunk_size=CHUNK_SIZE),
        SchedulingConfig(
            max_model_len=min(executor.loaded.max_model_len, executor.num_gpu_blocks * CHUNK_SIZE),
            max_num_seqs=batch,
            max_num_batched_tokens=setting.max_num_batched_tokens,
        ),
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=2 * setting.overhead_steps, ignore_eos=True)
    for i in range(batch):
        tokens = [(i + j) % 1000 + 8 for j in range(CHUNK_SIZE)]
        core.add_request(Request(f"o{i}", tokens, sampling), 0.0)
    loop = StepLoop(core, executor, Answers(), lambda: 0.0, LookAhead.LAUNCH if is_ahead else LookAhead.NOTHING)
    ends: list[tuple[float, bool]] = []  # of steps, and whether all decoded
    with seconds_of(core, "schedule", "update") as of_core, seconds_of(executor, "execute") as of_executor:
        for _ in range(setting.overhead_steps):
            plan = loop.step()
            assert plan is not None
            ends.append((time.perf_counter(), plan.num_tokens == batch))
    for i in range(batch):
        core.abort(f"o{i}", 0.0)
    while loop.in_flight:
        loop.step()
    # The core tells it with its next step, and there is none.
    executor.execute(StepPlan(0, (), ended=tuple(f"o{i}" for i in range(batch))))
    step_s = statistics.median(end - begin for begin, end in pairwise(end for end, is_decode in ends if is_decode))
    if is_ahead:
        return step_s, {}
    return step_s, {
        name: statistics.median(s for s, (_, is_decode) in zip(seconds, ends, strict=True) if is_decode)
        for name, seconds in {**of_core, **of_executor}.items()
    }


def measure_accuracy(setting: Setting, folder: str) -> Iterator[dict[str, Any]]:
    """Compare a prompt's logits in low precision with float32 and the same weights.

    By this engine, and by transformers' own attention.
    """
    low = setting.dtype if not setting.is_smoke else torch.float16
    executor = LocalExecutor(
        make_config(
            setting,
            folder,
            dtype=str(low).removeprefix("torch."),
            num_gpu_blocks=-(-setting.accuracy_len // CHUNK_SIZE) + 1,
            num_cpu_blocks=0,
            enforce_eager=True,
        )
    )
    model = executor.loaded.model
    tokens = torch.arange(setting.accuracy_len, device=setting.device) * 37 % 1999 + 8
    # The engine gives logits of sampling rows: so each of the last tokens is a segment of its own.
    num_rows = min(8, setting.accuracy_len - 1)
    start = setting.accuracy_len - num_rows
    table = tuple(range(-(-setting.accuracy_len // CHUNK_SIZE)))
    ids = tokens.tolist()
    try:
        begin = RequestStart("0", setting.accuracy_len, setting.accuracy_len, GREEDY, (), table)
        segments = [QuerySegment("0", 0, tuple(ids[:start]))]
        segments += [QuerySegment("0", position, (ids[position],), True) for position in range(start, len(ids))]
        with logits_kept(executor) as kept:
            executor.execute(StepPlan(0, tuple(segments), (begin,)))
        ours = kept[0].float()
        with torch.inference_mode():
            model.set_attn_implementation("sdpa")
            theirs = model(input_ids=tokens[None], use_cache=False).logits[0, start:].float()
            exact_model = copy.deepcopy(model)
            unpack_linears(exact_model)
            exact_model.float()
            exact = exact_model(input_ids=tokens[None], use_cache=False).logits[0, start:]
    finally:
        executor.shutdown()
    errors = {name: (logits - exact).abs() for name, logits in (("ours", ours), ("transformers", theirs))}
    yield {
        "dtype": str(low),
        "num_rows": num_rows,
        "largest_logit": float(exact.abs().max()),
        **{f"mean_error_{name}": float(error.mean()) for name, error in errors.items()},
        **{f"largest_error_{name}": float(error.max()) for name, error in errors.items()},
        "ours_over_transformers": float(errors["ours"].mean() / errors["transformers"].mean()),
    }
