"""Step times by decoding requests, new tokens and context, beside what the simulator takes for them.

A table for the simulator, measured as `pensieve profile --steps` does it, and single steps, decodes beside prompts among
them. Both are compared with the simulator's roofline for such a device, and the steps with the table: how far may either be
trusted?
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from eager import GREEDY
from setting import CHUNK_SIZE, Setting, Shape
from steps import make_config
from tqdm import tqdm

from engine.attention.device_health import check_device
from engine.core.plan import QuerySegment, RequestStart, StepPlan
from engine.executor.local import LocalExecutor
from engine.simulator.devices import DEVICES, MODELS, ModelShape
from engine.simulator.step_cost import Roofline, StepWork
from engine.simulator.step_table import StepTable
from engine.step_measurement import measure_steps_of, with_tiers_for_steps

# Steps of a size that count, behind two that do not.
NUM_TIMED, NUM_WARM = 4, 2


def measure_step_times(setting: Setting, name: str, folder: str, table_path: Path) -> Iterator[dict[str, Any]]:
    """All figures so far, after each size of a step, and behind the table, which is saved as a file of its own.

    name: of the model. folder: of its config. If a step fails, that is noted under `failures` and the table is measured all
    the same, with the model loaded anew; then raises RuntimeError.
    """
    config = make_config(setting, folder, max_model_len=setting.steps_window)
    config = with_tiers_for_steps(config, setting.steps_window, is_on_cpu=setting.is_smoke)
    start = time.perf_counter()
    executor = LocalExecutor(config)
    device = _simulated_device(setting)
    figures: dict[str, Any] = {
        "load_and_capture_s": time.perf_counter() - start,
        "num_gpu_blocks": executor.num_gpu_blocks,
        "roofline_of": device,
        "steps": (rows := []),
        "failures": (failures := {}),
    }
    roofline = Roofline(
        MODELS.get(name.lower()) or _model_shape(setting.models[name], executor.loaded.num_parameters),
        DEVICES[device],
        executor.bytes_per_block,
    )
    works: list[StepWork] = []
    try:
        executor.gpu_store.storage.zero_()
        executor.cpu_store.storage.zero_()
        for groups in tqdm(setting.step_sizes, desc="steps", unit="size"):
            num_blocks = sum(num * -(-context // CHUNK_SIZE) for num, _, context in groups)
            if num_blocks > executor.num_gpu_blocks:
                rows.append({"groups": groups, "skipped": "its KV does not fit"})
                continue
            plan, seconds = _time_step(executor, groups)
            works.append(StepWork.of(plan))
            rows.append({"groups": groups, "kind": _kind(works[-1]), "ms": seconds * 1e3})
            _compare(figures, works, "roofline", roofline.step_time)
            figures["num_eager_forwards"] = executor.runner.num_eager_forwards
            yield figures
    except Exception:
        failures["steps"] = traceback.format_exc()
        yield figures
        executor.shutdown()
        check_device(setting.device)
        executor = LocalExecutor(config)  # a step may be in flight in the other
    begin = time.perf_counter()
    table = measure_steps_of(config, executor, repeats=setting.steps_repeats)
    table = replace(table, measured_on=table.measured_on.replace(folder, name))
    table.save(table_path)
    StepTable.load(table_path)  # as an experiment does
    figures["table_s"] = time.perf_counter() - begin
    _compare(figures, works, "table", table.step_time)
    figures["table_over_roofline"] = _table_over(table, roofline)
    yield figures
    if failures:
        raise RuntimeError(f"failed: {', '.join(failures)}\n" + "\n".join(failures.values()))


def _simulated_device(setting: Setting) -> str:
    """The device of the simulator that is most like this one."""
    is_h200 = not setting.is_smoke and "H200" in torch.cuda.get_device_name(setting.device)
    return "h200-141gb" if is_h200 else "h100-80gb"


def _model_shape(shape: Shape, num_parameters: int) -> ModelShape:
    return ModelShape(
        num_parameters=num_parameters,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
    )


def _time_step(executor: LocalExecutor, groups: tuple[tuple[int, int, int], ...]) -> tuple[StepPlan, float]:
    """A step of these (requests, new tokens of each, tokens attended to), and seconds from one such step to the next.

    As the engine does it, so many are launched ahead as the executor allows. Groups of one new token are decodes.
    """
    starts: list[RequestStart] = []
    first: list[QuerySegment] = []
    segments: list[QuerySegment] = []
    num_blocks = 0
    for num, num_new, context in groups:
        for _ in range(num):
            request_id, end = str(len(starts)), num_blocks + -(-context // CHUNK_SIZE)
            table = tuple(range(num_blocks, end))
            starts.append(RequestStart(request_id, context, context, GREEDY, (), table))
            num_blocks = end
            if num_new == 1:
                first.append(QuerySegment(request_id, context - 1, (7,), True))
            token_ids = None if num_new == 1 else (7,) * num_new
            segments.append(QuerySegment(request_id, context - num_new, token_ids, True))
    executor.execute(StepPlan(0, tuple(first), tuple(starts)))  # gives decodes a token to go on from
    plan = StepPlan(0, tuple(segments))
    ends = []
    pending = deque(executor.submit(plan) for _ in range(executor.max_steps_in_flight))
    for number in range(NUM_WARM + NUM_TIMED):
        pending.popleft().result()
        ends.append(time.perf_counter())
        if number < NUM_WARM + NUM_TIMED - executor.max_steps_in_flight:
            pending.append(executor.submit(plan))
    executor.execute(StepPlan(0, (), ended=tuple(start.request_id for start in starts)))
    return plan, (ends[-1] - ends[NUM_WARM - 1]) / NUM_TIMED


def _kind(work: StepWork) -> str:
    if work.num_decodes and work.num_prompt_tokens:
        return "mixed"
    return "decodes" if work.num_decodes else "prompts"


def _compare(figures: dict[str, Any], works: list[StepWork], name: str, step_time: Callable[[StepWork], float]) -> None:
    """Write how often what `step_time` says goes into what was measured: for each step, and medians."""
    rows = [row for row in figures["steps"] if "ms" in row]
    ratios: dict[str, list[float]] = {}
    for row, work in zip(rows, works, strict=True):
        row[f"{name}_ms"] = step_time(work) * 1e3
        row[f"over_{name}"] = row["ms"] / row[f"{name}_ms"]
        for kind in ("all", row["kind"]):
            ratios.setdefault(kind, []).append(row[f"over_{name}"])
    figures[f"median_over_{name}"] = {kind: statistics.median(values) for kind, values in ratios.items()}


def _table_over(table: StepTable, roofline: Roofline) -> dict[str, Any]:
    """Each entry of the table over what the roofline has for it."""
    tokens, decodes = (
        {num: seconds / roofline.step_time(work(num)) for num, seconds in entries.items()}
        for entries, work in (
            (table.num_tokens_s, lambda num: StepWork(num_prompt_tokens=num)),
            (table.decodes_s, lambda num: StepWork(num_decodes=num)),
        )
    )
    return {
        "num_tokens": tokens,
        "decodes": decodes,
        "pair": table.pair_s / roofline.pair_s,
        "context_token": table.context_token_s / roofline.context_token_s,
        "load": table.load_s / roofline.load_s,
        "store": table.store_s / roofline.store_s,
    }
