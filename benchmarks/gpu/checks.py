"""What has to hold on a GPU before anything is worth measuring there.

Each check returns a line of what it saw, or raises.

Checks of one model share its executor. Under `for_smoke` the same code runs on a CPU, with stand-ins for streams and graphs.
"""

from __future__ import annotations

import asyncio
import gc
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from eager import (
    GREEDY,
    compare_prompts_with_eager,
    compare_steps,
    compare_with_eager,
    logits_kept,
    without_graphs,
)
from features import check_adapters, check_cold_tiers, check_disk_tier, check_sampling, check_speculation
from setting import CHUNK_SIZE, LLAMA_8B, Setting
from steps import swappers, swapping_by
from subject import FOR_SMOKE, SHAPES, Subject, answer_contexts, is_tie, make_core

from engine.async_engine import AsyncEngine
from engine.core.engine_core import RequestOutput
from engine.core.plan import BlockCopy, QuerySegment, RequestStart, StepPlan
from engine.core.request import SamplingParams
from engine.core.tier_table import CPU, GPU
from engine.executor import compiled_layers, model_runner
from engine.executor.local import LocalExecutor
from engine.executor.memory import COSTLY_SAMPLING, largest_step
from engine.executor.step_graphs import bucket_sizes
from engine.executor.tiers.swapper import StreamSwapper
from engine.executor.warm_up import end_of
from engine.generation import Generation
from engine.text.prompt import TokenPrompt

Check = Callable[[], str]
SHUTDOWN = "shutdown"


# Of a GPU, before copies begin that a step waits for.
LATE_CYCLES = 20_000_000


def all_checks(setting: Setting, folder: Path) -> Iterator[tuple[str, Check]]:
    """(name, check) in order.

    The next one is made when it is asked for, so that what a check leaves may be freed first. What shuts a subject down
    bears the subject's name, see `selected`.
    """
    if setting.is_smoke:
        # The kernel itself, interpreted, in the step that is recorded; what is wrong in bfloat16 is the interpreter.
        interpreted = Subject(
            setting,
            folder,
            "interpreted Llama",
            SHAPES["tiny Llama"],
            torch.float32,
            replace(FOR_SMOKE, max_num_seqs=2),
            attention_backend="triton",
            max_num_batched_tokens=16,
        )
        yield f"{interpreted.name}: graphs", partial(check_graphs, interpreted)
        yield f"{interpreted.name}: prompts by graphs", partial(check_prompt_graphs, interpreted)
        yield f"{interpreted.name}: {SHUTDOWN}", interpreted.close
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("tiny Llama", "tiny OPT"):
            subject = Subject(setting, folder, name, SHAPES[name], dtype)
            yield f"{subject.name}: graphs", partial(check_graphs, subject)
            yield f"{subject.name}: prompts by graphs", partial(check_prompt_graphs, subject)
            yield f"{subject.name}: swaps", partial(check_swaps, subject)
            yield f"{subject.name}: late swap-ins", partial(check_late_swap_ins, subject)
            yield f"{subject.name}: conversations", partial(check_conversations, subject)
            if name == "tiny Llama":
                yield f"{subject.name}: cold tiers", partial(check_cold_tiers, subject)
                if dtype == torch.float32:
                    yield f"{subject.name}: speculation", partial(check_speculation, subject)
                    yield f"{subject.name}: sampling", partial(check_sampling, subject)
            yield f"{subject.name}: {SHUTDOWN}", subject.close
    yield from _checks_of_families(setting, folder)
    yield (
        "engine started three times",
        partial(check_restarts, Subject(setting, folder, "engine", SHAPES["tiny Llama"], torch.float32)),
    )
    disk = Subject(setting, folder, "disk", SHAPES["tiny Llama"], torch.float32)
    yield "disk tier", partial(check_disk_tier, disk, folder / "kv")
    large = (
        SHAPES["tiny Llama"]
        if setting.is_smoke
        else replace(LLAMA_8B, values={**LLAMA_8B.values, "num_hidden_layers": 2})
    )
    dtype = torch.float32 if setting.is_smoke else torch.bfloat16
    subject = Subject(setting, folder, "two layers of Llama-8B", large, dtype, compile_layers=True)
    yield f"{subject.name}: compiled layers", partial(check_compiled, subject)
    yield f"{subject.name}: graphs", partial(check_graphs, subject)
    yield f"{subject.name}: prompts by graphs", partial(check_prompt_graphs, subject)
    yield f"{subject.name}: swaps", partial(check_swaps, subject)
    yield f"{subject.name}: late swap-ins", partial(check_late_swap_ins, subject)
    yield f"{subject.name}: conversations", partial(check_conversations, subject)
    if not setting.is_smoke:  # where it is the same tiny model
        yield f"{subject.name}: cold tiers", partial(check_cold_tiers, subject)
    yield f"{subject.name}: {SHUTDOWN}", subject.close
    sized = Subject(setting, folder, "sized Llama-8B", large, dtype)
    yield "tier sized from memory", partial(check_sized_from_memory, sized)
    # In float32 torch waits for the device in the grouped multiplication of experts, so these steps run without graphs. The
    # last one, because a recording that fails may leave something in the process.
    sparse = Subject(setting, folder, "tiny Mixtral", SHAPES["tiny Mixtral"], torch.float32)
    yield f"{sparse.name}: conversations", partial(check_conversations, sparse)
    yield f"{sparse.name}: {SHUTDOWN}", sparse.close


def _checks_of_families(setting: Setting, folder: Path) -> Iterator[tuple[str, Check]]:
    options: dict[str, Any] = {
        "load_format": "auto",
        "adapter_folder": str(folder),
        "max_adapters": 2,
        "max_lora_rank": 8,
        "compile_layers": not setting.is_smoke,  # that takes seconds, and is looked at elsewhere
    }
    adapted = Subject(setting, folder, "adapted Llama", SHAPES["tiny Llama"], torch.float32, **options)
    yield f"{adapted.name}: adapters", partial(check_adapters, adapted, folder / "adapters")
    yield f"{adapted.name}: {SHUTDOWN}", adapted.close
    gemma = Subject(setting, folder, "tiny Gemma2", SHAPES["tiny Gemma2"], torch.float32)
    yield f"{gemma.name}: graphs", partial(check_graphs, gemma)
    yield f"{gemma.name}: prompts by graphs", partial(check_prompt_graphs, gemma)
    yield f"{gemma.name}: conversations", partial(check_conversations, gemma)
    yield f"{gemma.name}: {SHUTDOWN}", gemma.close
    # In bfloat16 the grouped multiplication can be recorded. Each token takes all experts: rounding cannot choose others.
    dense = Subject(setting, folder, "dense Mixtral", SHAPES["dense Mixtral"], torch.bfloat16)
    yield f"{dense.name}: graphs", partial(check_graphs, dense)
    yield f"{dense.name}: prompts by graphs", partial(check_prompt_graphs, dense)
    yield f"{dense.name}: {SHUTDOWN}", dense.close


def selected(checks: Iterable[tuple[str, Check]], pattern: str) -> Iterator[tuple[str, Check]]:
    """The checks whose names a regular expression is found in, and the shutdown of each subject that these have begun."""
    begun: set[str] = set()
    for name, check in checks:
        subject, _, kind = name.rpartition(": ")
        if kind == SHUTDOWN:
            if subject in begun:
                yield name, check
        elif re.search(pattern, name):
            begun.add(subject)
            yield name, check


def check_graphs(subject: Subject) -> str:
    """Compare recorded decode steps of all sizes, full and with a padding row, with eager ones.

    Freed memory is overwritten before: a graph that reads memory that nothing keeps alive would read that.
    """
    executor = subject.executor
    assert len(executor.runner.graphs.sizes) == len(bucket_sizes(subject.sizes.max_num_seqs)), "sizes are missing"
    overwritten = overwrite_freed_memory(subject.setting.device)
    differences = []
    for size in bucket_sizes(subject.sizes.max_num_seqs):
        for num_rows in {size, max(1, size - 1)}:
            longest = CHUNK_SIZE * (executor.num_gpu_blocks // num_rows) - 4
            rng = random.Random(num_rows)
            context_lens = [rng.randint(1, min(longest, 400)) for _ in range(num_rows)]
            differences.append(compare_with_eager(executor, context_lens, subject.setting.compared_steps))
    del overwritten
    return (
        f"{len(differences)} batches, {sum(d.num_rows for d in differences)} rows; largest difference of logits "
        f"{max(d.largest for d in differences):.1e}, median {max(d.median for d in differences):.1e}, other tokens "
        f"{sum(d.num_other_tokens for d in differences)}"
    )


def check_prompt_graphs(subject: Subject) -> str:
    """Compare recorded steps with prompts, of all sizes, with eager ones: a prompt alone, parts of several, decodes beside.

    Freed memory is overwritten before, as in `check_graphs`.
    """
    executor, sizes = subject.executor, subject.executor.runner.prompt_graphs.sizes
    assert sizes, "no steps with prompts were recorded"
    overwritten = overwrite_freed_memory(subject.setting.device)
    room = CHUNK_SIZE * (executor.num_gpu_blocks - 2 * subject.sizes.max_num_seqs)
    longest = min(room, executor.loaded.max_model_len - 1)
    differences, rng = [], random.Random(0)
    for size in sizes:
        rows = min(size, longest // 2)
        several = [1] * (min(subject.sizes.max_num_seqs, rows) - 1)
        several.append(rows - len(several))
        for lengths in ([rows], several, [rows // 2 + 1, max(1, rows // 4)]):
            each = min(room // len(lengths) - CHUNK_SIZE, longest)
            with_contexts = [(length, rng.randint(0, max(0, each - length))) for length in lengths]
            differences.append(compare_prompts_with_eager(executor, with_contexts))
    del overwritten
    return (
        f"{len(differences)} steps of up to {sizes[-1]} rows; largest difference of logits "
        f"{max(d.largest for d in differences):.1e}, median {max(d.median for d in differences):.1e}, other tokens "
        f"{sum(d.num_other_tokens for d in differences)}"
    )


def overwrite_freed_memory(device: torch.device) -> list[torch.Tensor]:
    """Fill what the allocator has cached, by pieces of all sizes up to a mebibyte.

    It stays so while the result is kept.
    """
    return [
        torch.full((1 << power,), -1, dtype=torch.int32, device=device) for power in range(5, 19) for _ in range(32)
    ]


def check_swaps(subject: Subject) -> str:
    """Compare every kind of copy of a step byte for byte, of whole blocks and groups of layers."""
    executor, n = subject.executor, subject.sizes.num_swapped
    num_steps = 0
    # The executor's own first: only those that swap in by it are replayed.
    for by, swapper in chain([("itself", executor.runner.swapper)], swappers(subject.setting, executor)):
        with swapping_by(executor, swapper):
            for has_segments in (False, True):
                _check_copies(subject, random.Random(num_steps), n, by, has_segments=has_segments)
                num_steps += 1
    num_bytes = n * executor.bytes_per_block
    return f"{num_steps} steps with four kinds of copies of {num_bytes >> 10} KiB, by copy engines"


def check_late_swap_ins(subject: Subject) -> str:
    """Compare steps whose context is swapped in, late, with the same steps over what is there: by graphs, and without.

    The former read random KV where they do not wait for each layer's copies.
    """
    executor, swapper = subject.executor, subject.executor.runner.swapper
    num_blocks = min(subject.sizes.num_swapped, executor.loaded.max_model_len // CHUNK_SIZE - 2)
    differences, rng = [], random.Random(0)
    for num_new, is_recorded in product((1, CHUNK_SIZE), (True, False)):
        with torch.inference_mode():
            executor.gpu_store.storage.normal_()
            executor.cpu_store.storage.normal_()
        targets = rng.sample(range(executor.num_gpu_blocks), num_blocks + 1)
        sources = rng.sample(range(executor.num_cpu_blocks), num_blocks)
        start = RequestStart("s", 1, 1, GREEDY, (), tuple(targets))
        segment = QuerySegment(
            "s", num_blocks * CHUNK_SIZE, tuple(rng.randrange(8, 2000) for _ in range(num_new)), True
        )
        plan = StepPlan(0, (segment,), (start,), swap_ins=_copies(CPU, sources, GPU, targets[:-1]))
        if isinstance(swapper, StreamSwapper) and subject.setting.device.type == "cuda":
            swapper._streams.swap_in.run(partial(torch.cuda._sleep, LATE_CYCLES))
        try:
            num_forwards = executor.runner.num_forwards  # replays are not counted
            with nullcontext() if is_recorded else without_graphs(executor), logits_kept(executor) as late:
                executor.execute(plan)
            if isinstance(swapper, StreamSwapper):
                was_replayed = executor.runner.num_forwards == num_forwards
                assert was_replayed == is_recorded, "a step that swaps in was not replayed, or one without graphs was"
            with without_graphs(executor), logits_kept(executor) as there:
                executor.execute(StepPlan(0, (segment,)))
        finally:
            executor.execute(StepPlan(0, (), ended=("s",)))
        differences.append(compare_steps(executor, late, there))
    return f"{len(differences)} steps over {num_blocks} blocks; largest difference {max(d.largest for d in differences):.1e}"


def _copies(
    source_tier: str, sources: Sequence[int], target_tier: str, targets: Sequence[int]
) -> tuple[BlockCopy, ...]:
    pairs = zip(sources, targets, strict=True)
    return tuple(BlockCopy(source_tier, source, target_tier, target) for source, target in pairs)


def _check_copies(subject: Subject, rng: random.Random, n: int, by: str, *, has_segments: bool) -> None:
    """One step over tiers of random bytes. has_segments: it computes something beside the copies."""
    executor = subject.executor
    gpu, cpu = (store.storage for store in (executor.gpu_store, executor.cpu_store))
    for storage in (gpu, cpu):
        storage.view(torch.uint8).copy_(torch.randint(256, storage.view(torch.uint8).shape, dtype=torch.uint8))
    gpu_blocks, cpu_blocks = (rng.sample(range(len(storage)), len(storage)) for storage in (gpu, cpu))
    own, gpu_blocks = gpu_blocks[:2], gpu_blocks[2:]
    evicted, kept, copied = gpu_blocks[:n], gpu_blocks[n : 2 * n], gpu_blocks[2 * n : 2 * n + 2]
    plan = StepPlan(
        0,
        (QuerySegment("s", 0, tuple(range(8, 48)), True),) if has_segments else (),
        (RequestStart("s", 40, 40, GREEDY, (), tuple(own)),),
        evictions=_copies(GPU, evicted, CPU, cpu_blocks[:n]),
        local_copies=_copies(GPU, (kept[0], copied[0]), GPU, copied),
        swap_ins=_copies(CPU, cpu_blocks[n : 2 * n], GPU, evicted),
        swap_outs=_copies(GPU, kept, CPU, cpu_blocks[2 * n : 3 * n]),
    )
    before = gpu.cpu().view(torch.uint8)
    expected_gpu, expected_cpu = before.clone(), cpu.clone().view(torch.uint8)
    for copy in plan.evictions:
        expected_cpu[copy.target] = before[copy.source]
    for copy in plan.local_copies:
        expected_gpu[copy.target] = before[copy.source]
    for copy in plan.swap_ins:
        expected_gpu[copy.target] = expected_cpu[copy.source]
    for copy in plan.swap_outs:
        expected_cpu[copy.target] = expected_gpu[copy.source]
    try:
        executor.execute(plan)
    finally:
        executor.execute(StepPlan(0, (), ended=("s",)))
    others = [block for block in range(len(gpu)) if block not in own]
    what = f"by {by}, {'in groups of layers' if has_segments else 'whole blocks'}"
    assert torch.equal(gpu.cpu().view(torch.uint8)[others], expected_gpu[others]), (
        f"wrong bytes in the GPU tier ({what})"
    )
    assert torch.equal(cpu.view(torch.uint8), expected_cpu), f"wrong bytes in the CPU tier ({what})"


def check_conversations(subject: Subject) -> str:
    """Compare conversations over two tiers that are too small for them with each turn computed alone.

    The former by graphs and steps running ahead; the latter from nothing, without graphs.
    """
    sizes, executor = subject.sizes, subject.executor
    with torch.inference_mode():
        executor.gpu_store.storage.fill_(float("nan"))  # nothing is to be read before it is written
    kept = make_core(subject, num_gpu_blocks=sizes.gpu_blocks, num_cpu_blocks=sizes.cpu_blocks)
    fresh = make_core(subject, num_gpu_blocks=executor.num_gpu_blocks, num_cpu_blocks=0, keep=False)
    rng = random.Random(0)
    contexts: dict[str, list[int]] = {f"c{i}": [] for i in range(sizes.num_conversations)}
    turns: list[tuple[str, list[int], list[RequestOutput]]] = []
    for turn in range(sizes.num_turns):
        for context in contexts.values():
            context += [rng.randrange(8, 2000) for _ in range(rng.randint(sizes.prompt_len // 2, sizes.prompt_len))]
        answers = answer_contexts(kept, executor, contexts, f"kept.{turn}", sizes.output_len, is_ahead=True)
        kept.check_integrity()
        for name, context in contexts.items():
            turns.append((f"{name}, turn {turn}", list(context), answers[name]))
            context += [output.token_id for output in answers[name]]
    # Afterwards: it computes in the same GPU tier.
    num_ties = 0
    for where, context, answer in turns:
        with without_graphs(executor):
            expected = answer_contexts(fresh, executor, {where: context}, "fresh", sizes.output_len, is_ahead=False)
        num_ties += is_tie(answer, expected[where], subject.dtype, where)
    statistics = kept.get_statistics()
    for name in ("num_swap_ins", "num_gpu_cached_tokens", "num_steps_ahead"):
        assert statistics[name] > 0, f"{name} is 0: the tiers were not small enough, or steps did not run ahead"
    num_eager = executor.runner.num_eager_forwards
    assert num_eager == 0, f"{num_eager} forwards ran without the compiled code of the layers"
    return (
        f"{len(turns)} answers, {num_ties} of them with a tie; {statistics['num_swap_ins']} blocks swapped in, "
        f"{statistics['num_steps_ahead']} steps ahead"
    )


def check_restarts(subject: Subject) -> str:
    """Start, use and shut down the engine three times in one process, and drop an executor in between.

    Each gives its pinned host memory back.
    """
    options = {"num_gpu_blocks": 32, "num_cpu_blocks": 32}
    answers = []
    for _ in range(3):
        engine = AsyncEngine(subject.config(**options))
        answers.append(asyncio.run(_use(engine, subject.sizes.kept_tokens)))
        del engine
        LocalExecutor(subject.config(**options, enforce_eager=True))  # dropped as it is
        gc.collect()
    assert answers[0] == answers[1] == answers[2], f"the starts gave different tokens: {answers}"
    return f"three starts gave the same {len(answers[0])} tokens"


async def _use(engine: AsyncEngine, num_tokens: int) -> list[int]:
    """Two turns of a conversation, then shut down."""
    context, answer = list(range(8, 8 + num_tokens)), []
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    try:
        for turn in range(2):
            tokens: list[int] = []
            prompt = TokenPrompt(tuple(context))
            async for delta in engine.generate(Generation(f"r{turn}", "s", prompt, sampling)):
                tokens += delta.token_ids
            context += [*tokens, 9, 10]
            answer += tokens
        assert engine.get_statistics()["num_gpu_cached_tokens"] > 0, "nothing was kept between the turns"
    finally:
        await engine.shutdown()
    return answer


def check_compiled(subject: Subject) -> str:
    """Run compiled layers in steps of every kind.

    Here a guard that fails raises, and does not fall back to the layer as it was written.
    """
    compiler = (
        "aot_eager" if subject.setting.is_smoke else compiled_layers.COMPILER
    )  # half a minute, and a C++ compiler
    with patch.object(compiled_layers, "COMPILER", compiler):
        executor = subject.executor
    assert executor.loaded.has_compiled_layers, "the layers were not compiled; the log says why"
    rows = bucket_sizes(subject.sizes.max_num_seqs)
    strict = partial(torch.compiler.set_stance, "fail_on_recompile")
    with patch.object(model_runner, "never_compiling", strict), without_graphs(executor):
        names = [str(i) for i in range(rows[-1])]
        starts = tuple(RequestStart(name, 64, 64, GREEDY, (), (2 * i, 2 * i + 1)) for i, name in enumerate(names))
        executor.submit(StepPlan(0, (QuerySegment("0", 0, tuple(range(8, 58)), True),), starts)).result()
        for number in rows:
            decodes = tuple(QuerySegment(name, 0, (9,), True) for name in names[:number])
            executor.submit(StepPlan(0, decodes)).result()
        mixed = (
            QuerySegment("0", 0, tuple(range(8, 45)), True),
            *(QuerySegment(name, 0, (9,), True) for name in names[1:]),
        )
        executor.submit(StepPlan(0, mixed)).result()
        executor.execute(StepPlan(0, (), ended=tuple(names)))
    return f"compiled code ran in {len(rows) + 2} steps of 1 to 50 rows"


def check_sized_from_memory(subject: Subject) -> str:
    """Size the tier from memory, without `num_gpu_blocks`; the largest step must still fit then."""
    config = subject.config(num_cpu_blocks=0, max_num_batched_tokens=subject.setting.max_num_batched_tokens)
    executor = LocalExecutor(config)
    try:
        executor.gpu_store.storage[0].zero_()
        for sampling in COSTLY_SAMPLING:
            step = largest_step(config, executor.loaded, sampling)
            executor.execute(step)
            executor.execute(end_of(step))
        gib = executor.num_gpu_blocks * executor.bytes_per_block / 2**30
        text = f"{executor.num_gpu_blocks} blocks, {gib:.1f} GiB"
        if subject.setting.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            text += f"; {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free after the largest step"
    finally:
        executor.shutdown()
        del executor
        gc.collect()
    return text
