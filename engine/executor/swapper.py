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

import torch

from engine.core.plan import BlockCopy, StepPlan
from engine.executor.kv_store import KVStore


class LayerGates:
    """One gate per layer; `wait(layer)` returns when that layer's KV of the step's swap-ins is in the GPU tier, and raises
    what the copy raised."""

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


class Swapper:
    """The copies of one step: `begin`, then the forward with the gates that it returned, then `finish`.

    verify: checksum every block when it is swapped out and again when it comes back; `finish` returns the GPU blocks whose
    content is wrong.
    """

    def __init__(self, gpu: KVStore, cpu: KVStore, *, verify: bool) -> None:
        self._gpu, self._cpu = gpu, cpu
        self._verify = verify
        self._checksums: dict[int, int] = {}
        self._failed: tuple[int, ...] = ()
        self._pending: list[Future[None]] = []
        # One thread per direction: a swap-in must not queue behind an ahead-of-time swap-out.
        self._in_thread = ThreadPoolExecutor(1, thread_name_prefix="swap-in")
        self._out_thread = ThreadPoolExecutor(1, thread_name_prefix="swap-out")

    def begin(self, plan: StepPlan) -> Callable[[int], None] | None:
        """Make the evictions and GPU copies, start the rest. Returns what a layer has to call before it attends, or None
        where nothing is swapped in."""
        self._failed = ()
        self._swap_out(plan.evictions)
        self._gpu.copy_blocks(plan.gpu_copies)
        if plan.swap_outs:
            self._pending.append(self._out_thread.submit(self._swap_out, plan.swap_outs))
        if not plan.swap_ins:
            return None
        if self._verify:
            self._failed = tuple(copy.target for copy in plan.swap_ins if not self._is_intact(copy.source))
        gates = LayerGates(len(self._gpu.layer_slices))
        self._pending.append(self._in_thread.submit(self._swap_in, plan.swap_ins, gates))
        return gates.wait

    def finish(self) -> tuple[int, ...]:
        """Wait for all copies of the step; raises what a copy raised. Returns the GPU blocks of failed swap-ins."""
        pending, self._pending = self._pending, []
        errors = [error for error in (future.exception() for future in pending) if error is not None]
        if errors:
            raise errors[0]
        return self._failed

    def shutdown(self) -> None:
        self._in_thread.shutdown()
        self._out_thread.shutdown()

    def _swap_out(self, copies: Sequence[BlockCopy]) -> None:
        if not copies:
            return
        sources, targets = _index(copies)
        self._cpu.storage[targets] = self._gpu.storage[sources]
        if self._verify:
            for copy in copies:
                self._checksums[copy.target] = self._checksum(copy.target)

    def _swap_in(self, copies: Sequence[BlockCopy], gates: LayerGates) -> None:
        try:
            sources, targets = _index(copies)
            for layer, columns in enumerate(self._gpu.layer_slices):
                self._gpu.storage[:, columns].index_copy_(0, targets, self._cpu.storage[:, columns].index_select(0, sources))
                gates.open(layer)
        except BaseException as error:
            gates.fail(error)
            raise

    def _is_intact(self, cpu_block: int) -> bool:
        return self._checksums.get(cpu_block) == self._checksum(cpu_block)

    def _checksum(self, cpu_block: int) -> int:
        return zlib.crc32(self._cpu.storage[cpu_block].view(torch.uint8).numpy())


def _index(copies: Sequence[BlockCopy]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([copy.source for copy in copies]), torch.tensor([copy.target for copy in copies])
