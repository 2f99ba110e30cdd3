"""Moves blocks between the GPU tier and the CPU tier beside the computation. Follows the order that StepPlan states; never
decides what moves.

Swap-ins come layer by layer, so that the first layers run while later ones are still on their way: each layer has a gate
that its attention waits at. With CUDA the copies run on streams of their own and the gates are events; without, a thread
copies and the gates are threading events.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from engine.core.plan import BlockCopy, StepPlan
from engine.executor.kv_store import KVStore


class Swapper(Protocol):
    """The copies of one step: `begin`, then the forward, whose layers call what `begin` returned, then `finish`."""

    def begin(self, plan: StepPlan) -> Callable[[int], None] | None:
        """Make the evictions and GPU copies, start the rest. Returns what a layer has to call, with its number, before it
        touches its KV; None where nothing is swapped in."""
        ...

    def finish(self) -> tuple[int, ...]:
        """Wait for all copies of the step; raises what a copy raised. Returns the GPU blocks of failed swap-ins."""
        ...

    def shutdown(self) -> None: ...


def make_swapper(gpu: KVStore, cpu: KVStore, *, verify: bool) -> Swapper:
    """verify: checksum every block when it was swapped out and before it comes back."""
    if gpu.storage.device.type == "cuda":
        return CudaSwapper(gpu, cpu, verify=verify)
    return ThreadSwapper(gpu, cpu, verify=verify)


class Checksums:
    """What was swapped out to each CPU block."""

    def __init__(self, cpu: KVStore) -> None:
        self._cpu = cpu
        self._sums: dict[int, int] = {}

    def note(self, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            self._sums[copy.target] = self._sum(copy.target)

    def failed(self, copies: Sequence[BlockCopy]) -> tuple[int, ...]:
        """The targets of those swap-ins whose source is not what was swapped out."""
        return tuple(copy.target for copy in copies if self._sums.get(copy.source) != self._sum(copy.source))

    def _sum(self, cpu_block: int) -> int:
        return zlib.crc32(self._cpu.storage[cpu_block].view(torch.uint8).numpy())


class LayerGates:
    """One gate per layer; `wait(layer)` returns when that layer's KV of the step's swap-ins is in the GPU tier, and raises
    where the copy failed."""

    def __init__(self, num_layers: int) -> None:
        self._gates = [threading.Event() for _ in range(num_layers)]
        self._error: BaseException | None = None

    def open(self, layer: int) -> None:
        self._gates[layer].set()

    def fail(self, error: BaseException) -> None:
        """Open all gates; whoever passes gets the error."""
        self._error = error
        for gate in self._gates:
            gate.set()

    def wait(self, layer: int) -> None:
        self._gates[layer].wait()
        if self._error is not None:
            raise RuntimeError("a swap-in failed") from self._error


class ThreadSwapper:
    """Both tiers in host memory: real copies, by threads."""

    def __init__(self, gpu: KVStore, cpu: KVStore, *, verify: bool) -> None:
        self._gpu, self._cpu = gpu, cpu
        self._checksums = Checksums(cpu) if verify else None
        self._failed: tuple[int, ...] = ()
        self._pending: list[Future[None]] = []
        # One thread per direction: a swap-in must not queue behind an ahead-of-time swap-out.
        self._in_thread = ThreadPoolExecutor(1, thread_name_prefix="swap-in")
        self._out_thread = ThreadPoolExecutor(1, thread_name_prefix="swap-out")

    def begin(self, plan: StepPlan) -> Callable[[int], None] | None:
        self._failed = ()
        if plan.evictions:
            self._swap_out(plan.evictions)
        self._gpu.copy_blocks(plan.gpu_copies)
        if plan.swap_outs:
            self._pending.append(self._out_thread.submit(self._swap_out, plan.swap_outs))
        if not plan.swap_ins:
            return None
        if self._checksums is not None:
            self._failed = self._checksums.failed(plan.swap_ins)
        gates = LayerGates(len(self._gpu.layer_slices))
        self._pending.append(self._in_thread.submit(self._swap_in, plan.swap_ins, gates))
        return gates.wait

    def finish(self) -> tuple[int, ...]:
        pending, self._pending = self._pending, []
        errors = [error for error in (future.exception() for future in pending) if error is not None]
        if errors:
            raise errors[0]
        return self._failed

    def shutdown(self) -> None:
        self._in_thread.shutdown()
        self._out_thread.shutdown()

    def _swap_out(self, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            self._cpu.storage[copy.target].copy_(self._gpu.storage[copy.source])
        if self._checksums is not None:
            self._checksums.note(copies)

    def _swap_in(self, copies: Sequence[BlockCopy], gates: LayerGates) -> None:
        try:
            for layer, columns in enumerate(self._gpu.layer_slices):
                gpu, cpu = self._gpu.storage[:, columns], self._cpu.storage[:, columns]
                for copy in copies:
                    gpu[copy.target].copy_(cpu[copy.source])
                gates.open(layer)
        except BaseException as error:
            gates.fail(error)
            raise


class CudaSwapper:
    """GPU memory and pinned host memory: one stream per direction, ordered by events against the stream that computes."""

    def __init__(self, gpu: KVStore, cpu: KVStore, *, verify: bool) -> None:
        self._gpu, self._cpu = gpu, cpu
        self._checksums = Checksums(cpu) if verify else None
        self._failed: tuple[int, ...] = ()
        self._swapped_out: list[BlockCopy] = []
        self._in_stream = torch.cuda.Stream(gpu.storage.device)
        self._out_stream = torch.cuda.Stream(gpu.storage.device)

    def begin(self, plan: StepPlan) -> Callable[[int], None] | None:
        compute = torch.cuda.current_stream(self._gpu.storage.device)
        self._swapped_out = [*plan.evictions, *plan.swap_outs]
        if plan.evictions:
            self._out_stream.wait_stream(compute)
            self._swap_out(plan.evictions)
            compute.wait_stream(self._out_stream)  # their blocks are written to from here on
        self._gpu.copy_blocks(plan.gpu_copies)
        if plan.swap_outs:
            self._out_stream.wait_stream(compute)
            self._swap_out(plan.swap_outs)
        self._failed = ()
        if not plan.swap_ins:
            return None
        if plan.evictions:
            self._out_stream.synchronize()  # a block may go out and, for somebody else, come back in the same step
        if self._checksums is not None:
            self._checksums.note(plan.evictions)
            self._failed = self._checksums.failed(plan.swap_ins)
        self._in_stream.wait_stream(compute)
        arrived = [self._swap_in(plan.swap_ins, columns) for columns in self._gpu.layer_slices]
        return lambda layer: torch.cuda.current_stream(self._gpu.storage.device).wait_event(arrived[layer])

    def finish(self) -> tuple[int, ...]:
        self._in_stream.synchronize()
        self._out_stream.synchronize()
        if self._checksums is not None:
            self._checksums.note(self._swapped_out)
        return self._failed

    def shutdown(self) -> None:
        torch.cuda.synchronize(self._gpu.storage.device)

    def _swap_out(self, copies: Sequence[BlockCopy]) -> None:
        with torch.cuda.stream(self._out_stream):
            for copy in copies:
                self._cpu.storage[copy.target].copy_(self._gpu.storage[copy.source], non_blocking=True)

    def _swap_in(self, copies: Sequence[BlockCopy], columns: slice) -> torch.cuda.Event:
        with torch.cuda.stream(self._in_stream):
            for copy in copies:
                self._gpu.storage[copy.target, columns].copy_(
                    self._cpu.storage[copy.source, columns], non_blocking=True
                )
            return self._in_stream.record_event()
