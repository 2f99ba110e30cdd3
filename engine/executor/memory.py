"""What of a GPU's memory is left for blocks.

It is measured: by running the largest step and recording graphs over a toy of a GPU tier. If memory runs
out at the start, the error says what to lower, so that it does not run out later.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from engine.attention.protocol import AttentionBackend
from engine.config import EngineConfig
from engine.core.plan import StepPlan
from engine.core.request import SamplingParams
from engine.errors import ConfigError
from engine.executor.model_loader import LoadedModel
from engine.executor.model_runner import ModelRunner
from engine.executor.step_graphs import CudaGraphMaker, bucket_sizes, prompt_sizes
from engine.executor.step_inputs import StepLimits
from engine.executor.tiers.kv_store import KVStore
from engine.executor.tiers.swapper import make_swapper
from engine.executor.warm_up import end_of, longest_context, step_of

logger = logging.getLogger(__name__)

MIB, GIB = 1 << 20, 1 << 30
# All that sampling can do, over a distribution so flat that the whole vocabulary has to be sorted; and what of it a step may
# do before the tokens of the one in front are known.
WITHOUT_PENALTIES = SamplingParams(temperature=100.0, top_p=0.9999, logprobs=20, prompt_logprobs=20, seed=0)
COSTLY_SAMPLING = (replace(WITHOUT_PENALTIES, repetition_penalty=1.1, frequency_penalty=0.1), WITHOUT_PENALTIES)


@contextmanager
def out_of_memory_means(remedy: str, param: str) -> Iterator[None]:
    """Memory of the device that runs out inside becomes a ConfigError with `remedy`."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, torch.OutOfMemoryError):
            cause = cause.__cause__
        if cause is None:
            raise
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else "out of memory"
        raise ConfigError(f"{remedy} ({reason})", param=param) from error


def step_limits(config: EngineConfig, loaded: LoadedModel, num_gpu_blocks: int | None) -> StepLimits:
    """num_gpu_blocks: None = not known yet."""
    window = loaded.facts.window(config.max_model_len)
    num_blocks = -(-window // config.chunk_size) + 1
    if num_gpu_blocks is not None:
        num_blocks = min(num_blocks, num_gpu_blocks + 1)
    return StepLimits(config.max_num_seqs, config.max_num_batched_tokens, num_blocks)


def bytes_left_for_blocks(config: EngineConfig, loaded: LoadedModel, backend: AttentionBackend) -> float:
    """What weights, the largest step and the graphs leave of our share of the device.

    Raises ConfigError if memory runs out.
    """
    device = loaded.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    with out_of_memory_means(
        f"the largest step does not fit the device beside the weights; lower max_num_batched_tokens "
        f"({config.max_num_batched_tokens}) or max_num_seqs ({config.max_num_seqs})",
        "max_num_batched_tokens",
    ):
        runner = make_toy_runner(config, loaded, backend)
        for sampling in COSTLY_SAMPLING:
            step = largest_step(config, loaded, sampling)
            runner.launch(step)
            runner.launch(replace(step, starts=()))  # beside what the first one keeps until it is complete
            for _ in range(2):
                runner.complete()
            runner.execute(end_of(step))
        torch.cuda.synchronize(device)
    step_bytes = torch.cuda.max_memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    other_bytes = total - free - torch.cuda.memory_reserved(device)
    graph_bytes = 0
    if backend.CAN_REPLAY_DECODES and not config.enforce_eager:
        graph_bytes = _measure_graphs(runner, device, config, backend)
    del runner
    gc.collect()
    torch.cuda.empty_cache()
    logger.info(
        "GPU memory of %d MiB: weights and largest step %d, CUDA graphs %d, others %d",
        *(num_bytes // MIB for num_bytes in (total, step_bytes, graph_bytes, other_bytes)),
    )
    return float(total * config.gpu_memory_utilization - step_bytes - graph_bytes - other_bytes)


def make_toy_runner(config: EngineConfig, loaded: LoadedModel, backend: AttentionBackend) -> ModelRunner:
    """Over one block of zeros, in which all contexts lie."""
    sizes = {"chunk_size": config.chunk_size, "dtype": loaded.dtype}
    store = KVStore(loaded.layers, num_blocks=1, device=loaded.device, **sizes)
    store.storage.zero_()
    nothing = KVStore(loaded.layers, num_blocks=0, device=torch.device("cpu"), **sizes)
    limits = step_limits(config, loaded, None)
    return ModelRunner(loaded, store, make_swapper(store, nothing, verify=False), backend, limits)


def largest_step(config: EngineConfig, loaded: LoadedModel, sampling: SamplingParams) -> StepPlan:
    """As many requests as may run, all sampling, and prompts among them that fill the budget. All in block 0."""
    longest = longest_context(config, loaded)
    query_lens: list[int] = []
    left = config.max_num_batched_tokens
    for num_others in reversed(range(config.max_num_seqs)):
        query_lens.insert(0, min(longest, left - num_others))
        left -= query_lens[0]
    return step_of([(query_len, longest) for query_len in query_lens], sampling, config.chunk_size)


def recorded_prompts(config: EngineConfig, backend: AttentionBackend) -> tuple[int, ...]:
    """Numbers of rows of the steps that are recorded beside decodes."""
    return prompt_sizes(config.max_num_batched_tokens) if backend.CAN_REPLAY_PROMPTS else ()


def _measure_graphs(runner: ModelRunner, device: torch.device, config: EngineConfig, backend: AttentionBackend) -> int:
    """Bytes of all graphs, from the largest one of each kind, whose memory the others share, and the next."""
    maker = CudaGraphMaker(device)

    def measured(sizes: tuple[int, ...], prompts: tuple[int, ...]) -> int:
        torch.cuda.empty_cache()
        before, _ = torch.cuda.mem_get_info(device)
        runner.capture_graphs(maker, sizes, prompts)
        torch.cuda.empty_cache()
        after, _ = torch.cuda.mem_get_info(device)
        return max(0, int(before) - int(after))

    num_bytes = 0
    prompts = sorted(recorded_prompts(config, backend), reverse=True)
    for number, size in enumerate(prompts[:2]):
        num_bytes += measured((), (size,)) * (1 if number == 0 else len(prompts) - 1)
    sizes = sorted(bucket_sizes(config.max_num_seqs), reverse=True)
    for number, size in enumerate(sizes[:2]):
        num_bytes += measured((size,), ()) * (1 if number == 0 else len(sizes) - 1)
    return num_bytes
