"""Moves blocks between the GPU tier and the CPU tier beside the computation.

Follows the order that StepPlan states; never decides what moves.

Swap-ins come layer by layer, so that the first layers run while later ones are still on their way: each layer has a gate
that its attention waits at. With CUDA the copies run in streams of their own and the gates are events, one for a few layers;
without, a thread copies and the gates are threading events.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from engine.core.plan import BlockCopy, StepPlan
from engine.executor.tiers.block_copy import (
    BlockCopier,
    DmaCopier,
    columns_of,
    layer_groups,
    load_cold_copiers,
    max_group_layers,
)
from engine.executor.tiers.cold_copies import make_cold_copies
from engine.executor.tiers.cuda_copies import load_cuda_copies
from engine.executor.tiers.kv_store import BlockStore, ColdStore, KVStore
from engine.executor.tiers.streams import Event, Stream, Streams, cuda_streams


class Swapper(Protocol):
    """The copies of one step: `begin`, then the forward, whose layers call what `begin` returned, then `finish`.

    checksums: of the CPU tier's blocks; None if they are not verified.
    seconds: how long the copies of the step that was finished last took, in and out; local copies are not counted.
    """

    checksums: Checksums | None
    seconds: tuple[float, float]

    @property
    def gate(self) -> Callable[[int], None] | None:
        """What a recorded step calls with each layer before it touches its KV.

        Each replay waits there for what `put_in` put in before. None = it cannot, and steps that swap in are not replayed.
        """
        ...

    def begin(self, plan: StepPlan) -> Callable[[int], None] | None:
        """Make the evictions and local copies, start the rest.

        Returns what a layer has to call, with its number, before it touches its KV; None if nothing is swapped in.
        """
        ...

    def put_in(self) -> None:
        """Put in all copies of the step that are not yet, in front of a replay."""
        ...

    def finish(self) -> tuple[int, ...]:
        """Wait for all copies of the step; raises what a copy raised. Returns the GPU blocks of failed swap-ins."""
        ...

    def shutdown(self) -> None: ...


class HostCopies(Protocol):
    """Copies single blocks between two tiers in host memory; any thread may call it."""

    def swap_out(self, copy: BlockCopy) -> None: ...

    def swap_in(self, copy: BlockCopy, layer: int) -> None:
        """One layer of a block."""
        ...


class PlainCopies:
    """The bytes as they are, by numpy.

    torch's copies start an OpenMP team for each thread that calls them, and once there are more OpenMP threads than cores,
    GNU's OpenMP sleeps at every barrier, those of the model too.
    """

    def __init__(self, gpu: KVStore, cpu: BlockStore) -> None:
        # The same memory, by bytes: numpy knows no bfloat16.
        self._gpu, self._cpu = (store.storage.view(torch.uint8).numpy() for store in (gpu, cpu))
        size = gpu.storage.element_size()
        self._layers = [slice(columns.start * size, columns.stop * size) for columns in gpu.layer_slices]

    def swap_out(self, copy: BlockCopy) -> None:
        """See HostCopies."""
        self._cpu[copy.target] = self._gpu[copy.source]

    def swap_in(self, copy: BlockCopy, layer: int) -> None:
        """See HostCopies."""
        part = self._layers[layer]
        self._gpu[copy.target, part] = self._cpu[copy.source, part]


def make_swapper(gpu: KVStore, cpu: BlockStore, *, verify: bool) -> Swapper:
    """verify: checksum every block when it was swapped out and before it comes back."""
    if gpu.storage.device.type == "cuda":
        dma = DmaCopier(load_cuda_copies())
        copiers = load_cold_copiers(gpu, cpu) if isinstance(cpu, ColdStore) else (dma, dma)
        return StreamSwapper(gpu, cpu, cuda_streams(gpu.storage.device), copiers, verify=verify)
    return ThreadSwapper(gpu, cpu, verify=verify)


class Checksums:
    """What was swapped out to each CPU block."""

    def __init__(self, cpu: BlockStore) -> None:
        self._cpu = cpu
        self._sums: dict[int, int] = {}

    def note(self, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            self.note_block(copy.target)

    def note_block(self, cpu_block: int) -> None:
        """That is what it holds. From any thread, as long as the block is lent to a transfer."""
        self._sums[cpu_block] = self._sum(cpu_block)

    def is_intact(self, cpu_block: int) -> bool:
        """Whether it holds what was noted."""
        return self._sums.get(cpu_block) == self._sum(cpu_block)

    def failed(self, copies: Sequence[BlockCopy]) -> tuple[int, ...]:
        """The targets of those swap-ins whose source is not what was swapped out."""
        return tuple(copy.target for copy in copies if not self.is_intact(copy.source))

    def _sum(self, cpu_block: int) -> int:
        return zlib.crc32(self._cpu.storage[cpu_block].view(torch.uint8).numpy())


class LayerGates:
    """One gate for each layer.

    `wait(layer)` returns when that layer's KV of the step's swap-ins is in the GPU tier, and raises if the copy failed.
    """

    def __init__(self, num_layers: int) -> None:
        self._gates = [threading.Event() for _ in range(num_layers)]
        self._error: BaseException | None = None

    def open(self, layer: int) -> None:
        self._gates[layer].set()

    def fail(self, error: BaseException) -> None:
        """Open all gates; each `wait` raises the error."""
        self._error = error
        for gate in self._gates:
            gate.set()

    def wait(self, layer: int) -> None:
        self._gates[layer].wait()
        if self._error is not None:
            raise RuntimeError("a swap-in failed") from self._error


class ThreadSwapper:
    """Both tiers in host memory: real copies, by threads."""

    def __init__(self, gpu: KVStore, cpu: BlockStore, *, verify: bool) -> None:
        self._gpu = gpu
        self._copies: HostCopies = make_cold_copies(gpu, cpu) if isinstance(cpu, ColdStore) else PlainCopies(gpu, cpu)
        self.checksums = Checksums(cpu) if verify else None
        self.gate: Callable[[int], None] | None = None
        self.seconds = (0.0, 0.0)
        self._in_s = self._out_s = 0.0  # of this step; each is of one thread at a time
        self._failed: tuple[int, ...] = ()
        self._pending: list[Future[None]] = []
        # One thread per direction: a swap-in must not queue behind an ahead-of-time swap-out.
        self._in_thread = ThreadPoolExecutor(1, thread_name_prefix="swap-in")
        self._out_thread = ThreadPoolExecutor(1, thread_name_prefix="swap-out")

    def begin(self, plan: StepPlan) -> Callable[[int], None] | None:
        self._failed = ()
        self._in_s = self._out_s = 0.0
        if plan.evictions:
            self._swap_out(plan.evictions)
        self._gpu.copy_blocks(plan.local_copies)
        if plan.swap_outs:
            self._pending.append(self._out_thread.submit(self._swap_out, plan.swap_outs))
        if not plan.swap_ins:
            return None
        if self.checksums is not None:
            self._failed = self.checksums.failed(plan.swap_ins)
        gates = LayerGates(len(self._gpu.layer_slices))
        self._pending.append(self._in_thread.submit(self._swap_in, plan.swap_ins, gates))
        return gates.wait

    def put_in(self) -> None: ...

    def finish(self) -> tuple[int, ...]:
        pending, self._pending = self._pending, []
        errors = [error for error in (future.exception() for future in pending) if error is not None]
        self.seconds = (self._in_s, self._out_s)
        if errors:
            raise errors[0]
        return self._failed

    def shutdown(self) -> None:
        self._in_thread.shutdown()
        self._out_thread.shutdown()

    def _swap_out(self, copies: Sequence[BlockCopy]) -> None:
        start_s = time.perf_counter()
        for copy in copies:
            self._copies.swap_out(copy)
        self._out_s += time.perf_counter() - start_s
        if self.checksums is not None:
            self.checksums.note(copies)

    def _swap_in(self, copies: Sequence[BlockCopy], gates: LayerGates) -> None:
        try:
            start_s = time.perf_counter()
            for layer in range(len(self._gpu.layer_slices)):
                for copy in copies:
                    self._copies.swap_in(copy, layer)
                gates.open(layer)
            self._in_s = time.perf_counter() - start_s
        except BaseException as error:
            gates.fail(error)
            raise


class StreamSwapper:
    """GPU memory and pinned host memory: copies in streams of their own, ordered by events against the stream that computes.

    Swap-ins come in groups of layers (`layer_groups`). Their copies are put in while the layers before them are: launching
    them all at once would keep the model from starting. (A replay is launched whole, so that all are put in before it; see
    `put_in`.) Swap-outs ahead of time share the bus with them, so they are spread
    over the groups: a share of them runs beside each group, and none in front of it. Everything is complete after `finish`,
    so that the copies of a step have to be ordered among themselves and against the model only.
    """

    def __init__(
        self,
        gpu: KVStore,
        cpu: BlockStore,
        streams: Streams,
        copiers: tuple[BlockCopier, BlockCopier],
        *,
        verify: bool,
    ) -> None:
        """copiers: for swap-ins, for swap-outs."""
        self._gpu, self._cpu = gpu, cpu
        self._streams = streams
        self._copy_in, self._copy_out = (copier.copy for copier in copiers)
        num_layers = len(gpu.layer_slices)
        self._groups = layer_groups(num_layers, max_group_layers(gpu, copiers[0]))
        self._whole = [range(num_layers)]
        self.checksums = Checksums(cpu) if verify else None
        # Recorded anew by each step that swaps in.
        self._gates = [streams.gate() for _ in self._groups]
        self._ready: Event | None = None
        self._failed: tuple[int, ...] = ()
        self._transfer = _Transfer((), (), [], [])
        self._swapped_out: list[BlockCopy] = []
        self.seconds = (0.0, 0.0)
        # Of this step: where the copies of each call begin and end in their stream.
        self._marks: tuple[list[_Marks], list[_Marks]] = ([], [])

    def begin(self, plan: StepPlan) -> Callable[[int], None] | None:
        compute, swap_in, swap_out = self._streams.compute, self._streams.swap_in, self._streams.swap_out
        self._failed = ()
        self._swapped_out = [*plan.evictions, *plan.swap_outs]
        if plan.evictions:
            swap_out.wait(compute.record())  # earlier steps wrote what leaves
            self._run_timed(swap_out, 1, partial(self._swap_out, plan.evictions))
            compute.wait(swap_out.record())  # this one overwrites it
        if plan.local_copies:
            compute.run(lambda: self._gpu.copy_blocks(plan.local_copies))
        if not plan.swap_ins and not plan.swap_outs:
            return None
        # Behind it: what earlier steps wrote is there, what swap-ins overwrite is no longer read, and what was just
        # evicted may come back for another request.
        ready = self._ready = compute.record()
        swap_in.wait(ready)
        swap_out.wait(ready)
        if plan.swap_ins and self.checksums is not None:
            if plan.evictions:
                swap_out.record().synchronize()
                self.checksums.note(plan.evictions)
            self._failed = self.checksums.failed(plan.swap_ins)
        groups = self._groups if plan.segments and plan.swap_ins else self._whole
        self._transfer = _Transfer(plan.swap_ins, plan.swap_outs, groups, [])
        self._start_groups(1)
        return self._wait_for_layer if plan.swap_ins else None

    @property
    def gate(self) -> Callable[[int], None]:
        """See Swapper."""
        return self._wait_at_gate

    def _wait_at_gate(self, layer: int) -> None:
        for gate, group in zip(self._gates, self._groups, strict=True):
            if layer == group.start:
                self._streams.compute.wait(gate)

    def put_in(self) -> None:
        """See Swapper."""
        transfer = self._transfer
        if transfer.swap_ins and transfer.groups is self._groups:
            assert self._ready is not None
            # A replay that is still under way has to find the gates of its own step.
            self._ready.synchronize()
            for index, gate in enumerate(self._gates):
                self._start_groups(index + 1)
                self._streams.swap_in.record(gate)
        self._start_groups(len(transfer.groups))

    def finish(self) -> tuple[int, ...]:
        self._start_groups(len(self._transfer.groups))
        if self._transfer.swap_ins:
            self._streams.swap_in.record().synchronize()
        if self._swapped_out:
            self._streams.swap_out.record().synchronize()
        if self.checksums is not None:
            self.checksums.note(self._swapped_out)
        marks, self._marks = self._marks, ([], [])
        in_s, out_s = (sum(mark.seconds() for mark in of_direction) for of_direction in marks)
        self.seconds = (in_s, out_s)
        self._transfer, self._swapped_out = _Transfer((), (), [], []), []
        return self._failed

    def shutdown(self) -> None:
        self.finish()

    def _run_timed(self, stream: Stream, direction: int, launch: Callable[[], None]) -> None:
        """direction: 0 in, 1 out."""
        start = stream.mark()
        stream.run(launch)
        self._marks[direction].append(_Marks(start, stream.mark()))

    def _wait_for_layer(self, layer: int) -> None:
        transfer = self._transfer
        for index, group in enumerate(transfer.groups):
            if layer == group.start:
                self._start_groups(index + 2)  # the next one too, so that the bus always has something to do
                self._streams.compute.wait(transfer.arrived[index])

    def _start_groups(self, num_groups: int) -> None:
        """Put in the copies up to the group of that number."""
        transfer, streams = self._transfer, self._streams
        for index in range(len(transfer.arrived), min(num_groups, len(transfer.groups))):
            if transfer.swap_ins:
                columns = columns_of(self._gpu, transfer.groups[index])
                copy_in = partial(self._copy_in, self._gpu.storage, self._cpu.storage, transfer.swap_ins, columns)
                self._run_timed(streams.swap_in, 0, copy_in)
            if (share := transfer.share_of_swap_outs(index)) and index > 0:
                streams.swap_out.wait(transfer.arrived[index - 1])
            if share:
                self._run_timed(streams.swap_out, 1, partial(self._swap_out, share))
            transfer.arrived.append(streams.swap_in.record())

    def _swap_out(self, copies: Sequence[BlockCopy]) -> None:
        self._copy_out(self._cpu.storage, self._gpu.storage, copies, slice(0, self._gpu.storage.shape[1]))


@dataclass(frozen=True, slots=True)
class _Marks:
    """Where some copies begin and end in their stream."""

    start: Event
    end: Event

    def seconds(self) -> float:
        """How long they took; once the stream has come to the end."""
        return self.start.elapsed_time(self.end) / 1e3


@dataclass(frozen=True, slots=True)
class _Transfer:
    """The copies of one step beside its computation. arrived: an event for each group that was put in."""

    swap_ins: Sequence[BlockCopy]
    swap_outs: Sequence[BlockCopy]
    groups: Sequence[range]
    arrived: list[Event]

    def share_of_swap_outs(self, index: int) -> Sequence[BlockCopy]:
        """Those that go beside the group of that number: as many beside each, about."""
        num_groups = len(self.groups)
        num_copies = len(self.swap_outs)
        return self.swap_outs[num_copies * index // num_groups : num_copies * (index + 1) // num_groups]
