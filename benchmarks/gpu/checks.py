"""What has to hold on a GPU before anything is worth measuring there.

Each check returns a line of what it saw, or raises.

Checks of one model share its executor. Under `for_smoke` the same code runs on a CPU, with stand-ins for streams and graphs.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import stand_ins
import torch
from answers import Answers
from eager import GREEDY, compare_with_eager, without_graphs
from setting import CHUNK_SIZE, LLAMA_8B, TINY_LLAMA, TINY_OPT, Setting, Shape
from steps import make_config, swappers, swapping_by

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore, RequestOutput
from engine.core.plan import BlockCopy, QuerySegment, RequestStart, StepPlan
from engine.core.request import Request, SamplingParams
from engine.core.tier_table import CPU, GPU
from engine.executor import compiled_layers, model_runner
from engine.executor.decode_graphs import bucket_sizes
from engine.executor.local import LocalExecutor
from engine.executor.memory import COSTLY_SAMPLING, largest_steps
from engine.executor.warm_up import end_of
from engine.generation import Generation
from engine.step_loop import LookAhead, StepLoop
from engine.text.prompt import TokenPrompt

Check = Callable[[], str]
# Large enough for attention to matter: with the families' own, a wrong cache hardly changes the logits.
INIT = {"llama": "initializer_range", "opt": "init_std"}
INIT_STD = 0.15
# How far behind the best token the other side's may be, in log-probability, if the two sides choose different ones. What a
# wrong cache gives is nowhere near the best: it is not even among the ALTERNATIVES.
TIE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
ALTERNATIVES = 10


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the checks.

    max_num_seqs: of the recorded sizes, too.
    num_conversations, num_turns, output_len: of the conversations.
    prompt_len: the longest.
    gpu_blocks, cpu_blocks: of their tiers.
    num_swapped: blocks in each copy of the round trip.
    kept_tokens: of an engine's prompt.
    """

    max_num_seqs: int
    num_conversations: int
    num_turns: int
    prompt_len: int
    output_len: int
    gpu_blocks: int
    cpu_blocks: int
    num_swapped: int
    kept_tokens: int


FOR_GPU = Sizes(48, 10, 4, 90, 12, 36, 60, 24, 200)
FOR_SMOKE = Sizes(4, 4, 3, 40, 3, 9, 8, 2, 40)


class Subject:
    """A model, and its executor with two tiers from the first check that uses it until `close`."""

    def __init__(
        self,
        setting: Setting,
        folder: Path,
        name: str,
        shape: Shape,
        dtype: torch.dtype,
        sizes: Sizes | None = None,
        **options: Any,
    ) -> None:
        """sizes: None = those of the setting. options: of the engine."""
        self.setting = setting
        self.name = f"{name} {str(dtype).removeprefix('torch.')}"
        self.sizes = sizes or (FOR_SMOKE if setting.is_smoke else FOR_GPU)
        self.dtype = dtype
        self._shape = shape
        self._folder = folder
        self._options = options

    def config(self, **options: Any) -> EngineConfig:
        path = self._folder / self.name.replace(" ", "-")
        if not path.exists():
            self._shape.save(path)
        return make_config(
            self.setting,
            str(path),
            **{
                "dtype": str(self.dtype).removeprefix("torch."),
                "attention_backend": "reference" if self.setting.is_smoke else "triton",
                "max_num_seqs": self.sizes.max_num_seqs,
                "max_num_batched_tokens": 512,
                "compile_layers": False,
                "pack_weights": not self.setting.is_smoke,  # on a CPU it differs between processors
                **self._options,
                **options,
            },
        )

    @cached_property
    def executor(self) -> LocalExecutor:
        sizes = self.sizes
        blocks = max(sizes.gpu_blocks, 3 * sizes.num_swapped + 4, 6 * sizes.max_num_seqs)
        cpu_blocks = max(sizes.cpu_blocks, 3 * sizes.num_swapped)
        config = self.config(num_gpu_blocks=blocks, num_cpu_blocks=cpu_blocks, verify_swaps=True)
        executor = LocalExecutor(config)
        if self.setting.is_smoke:
            stand_ins.give_graphs(executor, config.max_num_seqs, config.max_num_batched_tokens)
        return executor

    def close(self) -> str:
        executor = self.__dict__.pop("executor", None)
        if executor is None:
            return "was never started"
        executor.shutdown()
        del executor
        gc.collect()
        if self.setting.device.type != "cuda":
            return "shut down"
        torch.cuda.empty_cache()
        return f"{torch.cuda.memory_allocated() >> 20} MiB are left allocated"


def all_checks(setting: Setting, folder: Path) -> Iterator[tuple[str, Check]]:
    """(name, check) in order.

    The next one is made when it is asked for, so that what a check leaves may be freed first.
    """
    shapes = {
        "tiny Llama": Shape("llama", {**TINY_LLAMA.values, INIT["llama"]: INIT_STD}),
        "tiny OPT": Shape("opt", {**TINY_OPT.values, INIT["opt"]: INIT_STD}),
    }
    if setting.is_smoke:
        # The kernel itself, interpreted, in the step that is recorded; what is wrong in bfloat16 is the interpreter.
        interpreted = Subject(
            setting,
            folder,
            "interpreted Llama",
            shapes["tiny Llama"],
            torch.float32,
            replace(FOR_SMOKE, max_num_seqs=2),
            attention_backend="triton",
        )
        yield f"{interpreted.name}: graphs", partial(check_graphs, interpreted)
        yield f"{interpreted.name}: shutdown", interpreted.close
    for dtype in (torch.float32, torch.bfloat16):
        for name, shape in shapes.items():
            subject = Subject(setting, folder, name, shape, dtype)
            yield f"{subject.name}: graphs", partial(check_graphs, subject)
            yield f"{subject.name}: swaps", partial(check_swaps, subject)
            yield f"{subject.name}: conversations", partial(check_conversations, subject)
            yield f"{subject.name}: shutdown", subject.close
    yield (
        "engine started three times",
        partial(check_restarts, Subject(setting, folder, "engine", shapes["tiny Llama"], torch.float32)),
    )
    large = (
        shapes["tiny Llama"]
        if setting.is_smoke
        else replace(LLAMA_8B, values={**LLAMA_8B.values, "num_hidden_layers": 2})
    )
    dtype = torch.float32 if setting.is_smoke else torch.bfloat16
    subject = Subject(setting, folder, "two layers of Llama-8B", large, dtype, compile_layers=True)
    yield f"{subject.name}: compiled layers", partial(check_compiled, subject)
    yield f"{subject.name}: graphs", partial(check_graphs, subject)
    yield f"{subject.name}: swaps", partial(check_swaps, subject)
    yield f"{subject.name}: conversations", partial(check_conversations, subject)
    yield f"{subject.name}: shutdown", subject.close
    sized = Subject(setting, folder, "sized Llama-8B", large, dtype)
    yield "tier sized from memory", partial(check_sized_from_memory, sized)


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


def overwrite_freed_memory(device: torch.device) -> list[torch.Tensor]:
    """Fill what the allocator has cached, by pieces of all sizes up to a mebibyte.

    It stays so while the result is kept.
    """
    return [
        torch.full((1 << power,), -1, dtype=torch.int32, device=device) for power in range(5, 19) for _ in range(32)
    ]


def check_swaps(subject: Subject) -> str:
    """Compare every kind of copy of a step byte for byte, by both copiers, whole blocks and groups of layers."""
    executor, n = subject.executor, subject.sizes.num_swapped
    num_steps = 0
    for by, swapper in swappers(subject.setting, executor):
        with swapping_by(executor, swapper):
            for has_segments in (False, True):
                _check_copies(subject, random.Random(num_steps), n, by, has_segments=has_segments)
                num_steps += 1
    num_bytes = n * executor.bytes_per_block
    return f"{num_steps} steps with four kinds of copies of {num_bytes >> 10} KiB, by copy engines and by the kernel"


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
    kept = _core(subject, num_gpu_blocks=sizes.gpu_blocks, num_cpu_blocks=sizes.cpu_blocks)
    fresh = _core(subject, num_gpu_blocks=executor.num_gpu_blocks, num_cpu_blocks=0, keep=False)
    rng = random.Random(0)
    contexts: dict[str, list[int]] = {f"c{i}": [] for i in range(sizes.num_conversations)}
    turns: list[tuple[str, list[int], list[RequestOutput]]] = []
    for turn in range(sizes.num_turns):
        for context in contexts.values():
            context += [rng.randrange(8, 2000) for _ in range(rng.randint(sizes.prompt_len // 2, sizes.prompt_len))]
        answers = _answer(kept, executor, contexts, f"kept.{turn}", sizes.output_len, is_ahead=True)
        kept.check_integrity()
        for name, context in contexts.items():
            turns.append((f"{name}, turn {turn}", list(context), answers[name]))
            context += [output.token_id for output in answers[name]]
    # Afterwards: it computes in the same GPU tier.
    num_ties = 0
    for where, context, answer in turns:
        with without_graphs(executor):
            expected = _answer(fresh, executor, {where: context}, "fresh", sizes.output_len, is_ahead=False)
        num_ties += _is_tie(answer, expected[where], subject.dtype, where)
    statistics = kept.get_statistics()
    for name in ("num_swap_ins", "num_gpu_cached_tokens", "num_steps_ahead"):
        assert statistics[name] > 0, f"{name} is 0: the tiers were not small enough, or steps did not run ahead"
    num_eager = executor.runner.num_eager_forwards
    assert num_eager == 0, f"{num_eager} forwards ran without the compiled code of the layers"
    return (
        f"{len(turns)} answers, {num_ties} of them with a tie; {statistics['num_swap_ins']} blocks swapped in, "
        f"{statistics['num_steps_ahead']} steps ahead"
    )


def _core(subject: Subject, **options: Any) -> EngineCore:
    return EngineCore(
        CacheConfig(chunk_size=CHUNK_SIZE, **options),
        SchedulingConfig(
            max_model_len=min(512, options["num_gpu_blocks"] * CHUNK_SIZE),
            max_num_seqs=subject.sizes.max_num_seqs,
            max_num_batched_tokens=128,
        ),
    )


def _answer(
    core: EngineCore,
    executor: LocalExecutor,
    contexts: dict[str, list[int]],
    prefix: str,
    output_len: int,
    *,
    is_ahead: bool,
) -> dict[str, list[RequestOutput]]:
    """The next turn of each conversation, all at once. is_ahead: as the engine does it on a GPU."""
    sampling = SamplingParams(temperature=0.0, max_tokens=output_len, logprobs=ALTERNATIVES, ignore_eos=True)
    for name, context in contexts.items():
        core.add_request(Request(f"{prefix}.{name}", list(context), sampling, conversation_id=name), 0.0)
    answers = Answers()
    loop = StepLoop(core, executor, answers, lambda: 0.0, LookAhead.LAUNCH if is_ahead else LookAhead.DRAFT)
    while core.has_requests or loop.in_flight:
        loop.step()
        assert not core.stats.num_corrupted_swaps, "a swap-in brought something else than was swapped out"
    # The core tells it with its next step.
    executor.execute(StepPlan(0, (), ended=tuple(answers.outputs)))
    return {name: answers.outputs[f"{prefix}.{name}"] for name in contexts}


def _is_tie(actual: Sequence[RequestOutput], expected: Sequence[RequestOutput], dtype: torch.dtype, where: str) -> bool:
    """Say whether two answers differ where rounding decides; raise AssertionError if they differ elsewhere."""
    assert len(actual) == len(expected), f"{where}: {len(actual)} tokens instead of {len(expected)}"
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if one.token_id == other.token_id:
            continue
        assert other.logprobs is not None
        best = dict(other.logprobs.top)
        gap = max(best.values()) - best.get(one.token_id, float("-inf"))
        assert gap <= TIE[dtype], (
            f"{where}: token {number} is {one.token_id} and not {other.token_id}, {gap:.3g} behind it"
        )
        return True
    return False


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
            for step in largest_steps(config, executor.loaded, sampling):
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
