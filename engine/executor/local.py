"""The executor for a model on one device, in this process: loads it, allocates its tiers, runs it."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from engine.attention.choice import choose_backend
from engine.attention.protocol import AttentionBackend
from engine.config import EngineConfig
from engine.core.executor_protocol import ExecutorFacts, Grammars, PendingStep
from engine.core.plan import StepPlan, StepResult
from engine.errors import AdapterError, ConfigError, DeviceFailedError, EngineStoppedError
from engine.executor.host import available_cores, end_openmp_team, keep_freed_memory
from engine.executor.lora.adapters import Adapters
from engine.executor.memory import bytes_left_for_blocks, out_of_memory_means, recorded_prompts, step_limits
from engine.executor.model_loader import LoadedModel, load_model
from engine.executor.model_runner import ModelRunner
from engine.executor.plan_channel import Placement
from engine.executor.process_group import ProcessGroup
from engine.executor.step_graphs import CudaGraphMaker, bucket_sizes
from engine.executor.tiers.cold_format import ColdFormat
from engine.executor.tiers.kv_store import BlockStore, ColdStore, KVStore, block_bytes
from engine.executor.tiers.swapper import make_swapper
from engine.executor.warm_up import warm_up
from engine.host_memory import check_tiers

logger = logging.getLogger(__name__)

GIB = 1 << 30
DEFAULT_CPU_DEVICE_GIB = 1.0
# Of the GPU tier, if the cold tiers have another.
CONVERTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LocalExecutor:
    """One model, or one rank's shard of it, and its KV stores.

    `execute` runs in the caller's thread, one call after the other; `submit` in a thread of the executor.

    loaded: the model, or the shard.
    gpu_store, cpu_store: the memory of the two tiers.
    cold_format: of the blocks of the CPU tier and those behind it; None = as in the GPU tier.
    rank, num_ranks: of its group; 0 of 1 without.
    runner: computes the steps; benchmarks and tests may exchange it between two steps.
    steps_thread: where submitted steps run. One thread for all, because torch's worker threads belong to the thread that
        started them.
    """

    def __init__(self, config: EngineConfig, group: ProcessGroup | None = None) -> None:
        """Load and allocate; blocking.

        group: of this rank, if the model is sharded.

        Raises ModelLoadError or ConfigError.
        """
        self.rank, self.num_ranks = (0, 1) if group is None else (group.rank, group.size)
        self._device_failure: DeviceFailedError | None = None
        num_threads = config.num_threads or available_cores()
        torch.set_num_threads(num_threads)
        self.steps_thread = ThreadPoolExecutor(1, "executor", torch.set_num_threads, (num_threads,))
        with out_of_memory_means(
            f"the weights of {config.model!r} do not fit the device; take a smaller model", "model"
        ):
            self.loaded: LoadedModel = load_model(config, group)
        # A device with a queue: while it computes a step, the next one is put behind it.
        self.max_steps_in_flight = 1 if self.loaded.device.type == "cpu" else 2
        backend = choose_backend(
            config.attention_backend,
            self.loaded.device,
            self.loaded.dtype,
            self.loaded.attention_calls,
            config.chunk_size,
        )
        bytes_per_block = block_bytes(self.loaded.layers, config.chunk_size, self.loaded.dtype)
        self.bytes_per_block = bytes_per_block * self.num_ranks  # of all ranks
        self.num_gpu_blocks = config.num_gpu_blocks or self._num_blocks_for_memory(config, bytes_per_block, backend)
        self.cold_format = make_cold_format(config, self.loaded)
        bytes_per_cold_block = bytes_per_block if self.cold_format is None else self.cold_format.block_bytes
        self.bytes_per_cold_block = bytes_per_cold_block * self.num_ranks
        self.num_cpu_blocks = self._num_cpu_blocks(config, self.bytes_per_cold_block)
        if group is not None:  # one scheduler for all of them: the smallest counts
            self.num_gpu_blocks = group.minimum(self.num_gpu_blocks)
            self.num_cpu_blocks = group.minimum(self.num_cpu_blocks)
        sizes = {"chunk_size": config.chunk_size, "dtype": self.loaded.dtype}
        layers, device = self.loaded.layers, self.loaded.device
        check_tiers(
            config,
            self.num_gpu_blocks * bytes_per_block if device.type == "cpu" else 0,
            self.num_cpu_blocks * bytes_per_cold_block,
        )
        with out_of_memory_means(
            f"{self.num_gpu_blocks} blocks of {bytes_per_block} bytes do not fit the device beside the model; lower "
            "gpu_memory_utilization (or num_gpu_blocks, gpu_memory_gib)",
            "gpu_memory_utilization",
        ):
            self.gpu_store = KVStore(layers, num_blocks=self.num_gpu_blocks, device=device, **sizes)
        pinned = device.type == "cuda" and self.num_cpu_blocks > 0
        self.cpu_store: BlockStore
        if self.cold_format is None:
            host = torch.device("cpu")
            self.cpu_store = KVStore(layers, num_blocks=self.num_cpu_blocks, device=host, pin_memory=pinned, **sizes)
        else:
            self.cpu_store = ColdStore(self.cold_format, num_blocks=self.num_cpu_blocks, pin_memory=pinned)
        if device.type == "cpu":
            keep_freed_memory()  # not before: what loading leaves free goes back
            end_openmp_team()
        swapper = make_swapper(self.gpu_store, self.cpu_store, verify=config.verify_swaps)
        limits = step_limits(config, self.loaded, self.num_gpu_blocks) if device.type == "cuda" else None
        self.attention_backend = backend
        self.runner = ModelRunner(self.loaded, self.gpu_store, swapper, backend, limits, samples=self.rank == 0)
        if device.type == "cuda" and backend.CAN_REPLAY_DECODES and not config.enforce_eager:
            self.runner.capture_graphs(
                CudaGraphMaker(device), bucket_sizes(config.max_num_seqs), recorded_prompts(config, backend)
            )
            if group is not None:  # all ranks replay, or none: they exchange tensors of the recorded sizes
                nums_of_sizes = len(self.runner.graphs.sizes), len(self.runner.prompt_graphs.sizes)
                if any(group.minimum(number) != -group.minimum(-number) for number in nums_of_sizes):
                    self.runner.drop_graphs()
        if device.type == "cuda":
            with out_of_memory_means(
                "the first steps do not fit the device beside the model and its blocks; lower gpu_memory_utilization (or "
                "num_gpu_blocks, gpu_memory_gib)",
                "gpu_memory_utilization",
            ):
                # In the thread of the steps to come: compiled code depends on the state of torch there.
                self.steps_thread.submit(warm_up, config, self.loaded, self.gpu_store, self.runner).result()
        logger.info(
            "%s: %.1fM parameters, %s on %s; blocks of %d tokens, GPU tier %d (%.2f GiB), CPU tier %d (%.2f GiB)",
            config.model,
            self.loaded.num_parameters / 1e6,
            self.loaded.dtype,
            self.loaded.device,
            config.chunk_size,
            self.num_gpu_blocks,
            self.num_gpu_blocks * bytes_per_block / GIB,
            self.num_cpu_blocks,
            self.num_cpu_blocks * bytes_per_cold_block / GIB,
        )

    def execute(self, plan: StepPlan) -> StepResult:
        with self._noting_failed_devices():
            return self.runner.execute(plan)

    def submit(self, plan: StepPlan) -> PendingStep:
        self.steps_thread.submit(self.runner.launch, plan)
        return _SubmittedStep(self.steps_thread, self._complete)

    def load_adapter(self, folder: str) -> str:
        """See Executor. From any thread."""
        return self._adapters.load(folder)

    def unload_adapter(self, identity: str) -> None:
        """See Executor."""
        self.steps_thread.submit(self._adapters.unload, identity)  # behind the steps that were submitted

    @property
    def _adapters(self) -> Adapters:
        if self.loaded.adapters is None:
            raise AdapterError("no adapter can be loaded: neither adapters nor adapter_folder is set", param="adapters")
        return self.loaded.adapters

    def use_grammars(self, grammars: Grammars) -> None:
        """Tell it where the grammars of requests are found, before the first step; else no request may have one."""
        self.runner.grammars = grammars

    def note_sampled(self, token_ids: Sequence[int]) -> None:
        """Take in what rank 0 sampled in the last step, before the next one; on the other ranks."""
        self.runner.note_sampled(token_ids)

    def check_health(self) -> None:
        """Raise EngineStoppedError if a step has found the device broken; other failures concern one step."""
        if self._device_failure is not None:
            raise EngineStoppedError(self._device_failure.message) from self._device_failure

    def _complete(self) -> StepResult:
        with self._noting_failed_devices():
            return self.runner.complete()

    @contextmanager
    def _noting_failed_devices(self) -> Iterator[None]:
        try:
            yield
        except DeviceFailedError as error:
            self._device_failure = error
            raise

    @property
    def facts(self) -> ExecutorFacts:
        """What was loaded, and the sizes of the tiers."""
        return ExecutorFacts(
            model=self.loaded.facts,
            device=str(self.loaded.device),
            attention_backend=backend_name(self.attention_backend),
            num_gpu_blocks=self.num_gpu_blocks,
            num_cpu_blocks=self.num_cpu_blocks,
            bytes_per_block=self.bytes_per_block,
            bytes_per_cold_block=self.bytes_per_cold_block,
        )

    @property
    def placement(self) -> Placement:
        """What this rank has, and on which device."""
        return Placement(
            rank=self.rank,
            host=platform.node(),
            pid=os.getpid(),
            device=_device_name(self.loaded.device),
            num_weight_bytes=self.loaded.num_weight_bytes,
            num_gpu_tier_bytes=self.gpu_store.num_bytes,
            num_cpu_tier_bytes=self.cpu_store.num_bytes,
        )

    def shutdown(self) -> None:
        """Free the model and the KV stores, after the step that runs."""
        self.steps_thread.shutdown()
        try:
            self.runner.swapper.shutdown()
        finally:
            self.cpu_store.unpin()
            self.runner.drop_graphs()
            del self.runner, self.gpu_store, self.cpu_store, self.loaded

    @staticmethod
    def _num_cpu_blocks(config: EngineConfig, bytes_per_block: int) -> int:
        if config.mode == "stateless":
            return 0
        if config.num_cpu_blocks is not None:
            return config.num_cpu_blocks
        return int(config.kv_offloading_size * GIB // bytes_per_block)

    def _num_blocks_for_memory(self, config: EngineConfig, bytes_per_block: int, backend: AttentionBackend) -> int:
        if config.gpu_memory_gib is not None:
            num_bytes = config.gpu_memory_gib * GIB
        elif self.loaded.device.type == "cuda":
            num_bytes = bytes_left_for_blocks(config, self.loaded, backend)
            if self.loaded.adapters is not None:
                num_bytes -= self.loaded.adapters.num_bytes(config.max_adapters)
        else:
            num_bytes = DEFAULT_CPU_DEVICE_GIB * GIB
        num_blocks = int(num_bytes // bytes_per_block)
        if num_blocks < 1:
            raise ConfigError(
                f"only {num_bytes / GIB:.3f} GiB are left for the GPU tier, but one block has {bytes_per_block} bytes; raise "
                "gpu_memory_utilization or gpu_memory_gib, or lower chunk_size, max_num_batched_tokens or max_num_seqs",
                param="gpu_memory_gib" if config.gpu_memory_gib is not None else "gpu_memory_utilization",
            )
        return num_blocks


class _SubmittedStep:
    """A launched step, completed in the thread when its result is asked for.

    That comes behind the launch of what was submitted since.
    """

    def __init__(self, thread: ThreadPoolExecutor, complete: Callable[[], StepResult]) -> None:
        self.steps_thread = thread
        self._complete = complete

    def result(self, timeout: float | None = None) -> StepResult:
        return self.steps_thread.submit(self._complete).result(timeout)


def make_cold_format(config: EngineConfig, loaded: LoadedModel) -> ColdFormat | None:
    """None if the cold tiers hold KV as the GPU tier does. Raises ConfigError for a dtype that cannot be converted."""
    if config.kv_cold_dtype == "same":
        return None
    if loaded.dtype not in CONVERTED_DTYPES:
        raise ConfigError(
            f"kv_cold_dtype {config.kv_cold_dtype!r} cannot hold KV in {loaded.dtype}; use 'same', or another dtype",
            param="kv_cold_dtype",
        )
    return ColdFormat(config.kv_cold_dtype, loaded.layers, config.chunk_size, loaded.dtype)


def backend_name(backend: AttentionBackend) -> str:
    """The name of an attention backend: of its module, or of its class."""
    return str(getattr(backend, "__name__", type(backend).__name__)).rpartition(".")[2]


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
