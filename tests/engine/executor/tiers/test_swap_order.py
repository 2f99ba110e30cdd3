"""The order of copies and computation on a device with several streams.

The device of these tests runs the queued work of each stream in any order that the events allow: a copy that has not
arrived is never read, and a block is never reused before its copy is complete.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.protocol import LayerShape
from engine.core.plan import QuerySegment, StepPlan
from engine.executor.tiers import block_copy
from engine.executor.tiers.block_copy import DmaCopier
from engine.executor.tiers.kv_store import KVStore
from engine.executor.tiers.streams import Streams
from engine.executor.tiers.swapper import StreamSwapper
from tests.copies import local_copy, swap_in, swap_out

LAYERS = (LayerShape(1, 1, 1),) * 5
NUM_GPU_BLOCKS, NUM_CPU_BLOCKS = 9, 12


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.is_done = False
        self.time_ms = 0.0

    def synchronize(self) -> None:
        while not self.is_done:
            assert self._device.advance(), "the host waits for what can never happen"

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.is_done
        assert end.is_done
        return end.time_ms - self.time_ms


class FakeGate:
    """What a replay waits for. It finds the event that is there when it comes to it, not when it was launched."""

    def __init__(self, event: FakeEvent) -> None:
        self.event = event

    @property
    def is_done(self) -> bool:
        return self.event.is_done


class FakeStream:
    def __init__(self, device: FakeDevice, *, waits: bool) -> None:
        self._device = device
        self._waits = waits
        self.queue: deque[Callable[[], None] | FakeEvent | FakeGate] = deque()
        self.barriers: dict[int, FakeEvent] = {}

    def run(self, launch: Callable[[], None]) -> None:
        self._put(launch)

    def record(self, gate: FakeGate | None = None) -> FakeEvent:
        event = FakeEvent(self._device)
        if gate is not None:
            gate.event = event

        def set_done() -> None:
            event.is_done = True
            event.time_ms = self._device.time_ms

        self._put(set_done)
        return event

    mark = record

    def wait(self, event: FakeEvent | FakeGate) -> None:
        if self._waits:
            self._put(event)

    def _put(self, work: Callable[[], None] | FakeEvent | FakeGate) -> None:
        self.queue.append(work)
        self._device.advance_a_little()

    @property
    def can_go_on(self) -> bool:
        return bool(self.queue) and (not isinstance(self.queue[0], WAITS) or self.queue[0].is_done)

    def go_on(self) -> None:
        work = self.queue.popleft()
        self._device.time_ms += 1.0
        if not isinstance(work, WAITS):
            work()


WAITS = (FakeEvent, FakeGate)


class FakeDevice:
    """Runs queued work at any time, but before a wait for it ends."""

    def __init__(self, rng: random.Random, without_waits: str | None = None) -> None:
        self._rng = rng
        names = ("compute", "swap_in", "swap_out")
        streams = {name: FakeStream(self, waits=name != without_waits) for name in names}
        self._all = list(streams.values())
        self._eagerness = rng.choice([0, 1, 4])
        self.time_ms = 0.0  # each piece of work takes one
        self.streams = Streams(**streams, gate=self._make_gate)

    def _make_gate(self) -> FakeGate:
        return FakeGate(self.streams.compute.record())

    def advance(self) -> bool:
        """Run one piece of work of some stream; False where none can go on."""
        ready = [stream for stream in self._all if stream.can_go_on]
        if ready:
            self._rng.choice(ready).go_on()
        return bool(ready)

    def advance_a_little(self) -> None:
        for _ in range(self._rng.randint(0, self._eagerness)):
            self.advance()

    def drain(self) -> None:
        while self.advance():
            pass
        assert not any(stream.queue for stream in self._all), "a stream waits for what can never happen"


def make_stores() -> tuple[KVStore, KVStore]:
    sizes = {"chunk_size": 1, "dtype": torch.float64, "device": torch.device("cpu")}
    gpu = KVStore(LAYERS, num_blocks=NUM_GPU_BLOCKS, **sizes)
    cpu = KVStore(LAYERS, num_blocks=NUM_CPU_BLOCKS, **sizes)
    for number, store in enumerate((gpu, cpu)):
        count = store.storage.numel()
        store.storage.copy_((1000 * number + torch.arange(count, dtype=torch.float64)).view_as(store.storage))
    return gpu, cpu


def random_plan(rng: random.Random, step_id: int, swapped_out: set[int]) -> tuple[StepPlan, list[int]]:
    """A plan as the core may make it, and the blocks that its computation writes.

    swapped_out: CPU blocks with contents, which it adds to.
    """
    gpu, cpu = list(range(NUM_GPU_BLOCKS)), list(range(NUM_CPU_BLOCKS))
    rng.shuffle(gpu)
    rng.shuffle(cpu)
    leaving = gpu[: rng.randint(0, 2)]
    evictions = tuple(swap_out(block, cpu.pop()) for block in leaving)
    swapped_out |= {copy.target for copy in evictions}
    # Blocks to overwrite: those that leave, and others that are no longer in use.
    free = [*leaving, *gpu[2 : 2 + rng.randint(0, 3)]]
    rng.shuffle(free)
    local_copies = tuple(local_copy(rng.choice(gpu), free.pop()) for _ in range(min(len(free), rng.randint(0, 2))))
    sources = [block for block in swapped_out if rng.random() < 0.7]
    rng.shuffle(sources)
    swap_ins = tuple(swap_in(source, free.pop()) for source in sources[: len(free)])
    segments = (QuerySegment("r", 0, (1,)),) if rng.random() < 0.8 else ()
    targets = [copy.target for copy in (*local_copies, *swap_ins)]
    written = [block for block in (*free, *targets) if rng.random() < 0.5] if segments else []
    untouched = [block for block in gpu if block not in targets and block not in free and block not in leaving]
    unread = [block for block in cpu if block not in {copy.source for copy in swap_ins}]
    swap_outs = tuple(map(swap_out, untouched[: rng.randint(0, 4)], unread))
    swapped_out |= {copy.target for copy in swap_outs}
    plan = StepPlan(step_id, segments, (), (), (), evictions, local_copies, swap_ins, swap_outs)
    return plan, written


class Twin:
    """The same steps, one thing after the other."""

    def __init__(self) -> None:
        self.gpu, self.cpu = (store.storage.clone() for store in make_stores())
        self.seen: list[torch.Tensor] = []

    def step(self, plan: StepPlan, written: list[int], slices: list[slice]) -> None:
        for copy in plan.evictions:
            self.cpu[copy.target] = self.gpu[copy.source]
        before = self.gpu.clone()
        for copy in plan.local_copies:
            self.gpu[copy.target] = before[copy.source]
        for copy in plan.swap_ins:
            self.gpu[copy.target] = self.cpu[copy.source]
        for copy in plan.swap_outs:
            self.cpu[copy.target] = self.gpu[copy.source]
        if plan.segments:
            for layer, columns in enumerate(slices):
                self.seen.append(self.gpu[:, columns].clone())
                self.gpu[written, columns] = new_values(plan, layer)


def new_values(plan: StepPlan, layer: int) -> float:
    return -(plan.step_id + layer / 10)


def simulate(seed: int, *, verify: bool, without_waits: str | None = None) -> None:
    """Random steps; raises AssertionError where anything read or left is not what the twin has."""
    rng = random.Random(seed)
    device = FakeDevice(rng, without_waits)
    gpu, cpu = make_stores()
    copiers = (DmaCopier(), DmaCopier())
    swapper = StreamSwapper(gpu, cpu, device.streams, copiers, verify=verify)
    twin, seen = Twin(), []
    swapped_out: set[int] = set() if verify else set(range(NUM_CPU_BLOCKS))

    def compute(layer: int, plan: StepPlan, written: list[int]) -> None:
        columns = gpu.layer_slices[layer]
        seen.append(gpu.storage[:, columns].clone())
        gpu.storage[written, columns] = new_values(plan, layer)

    for step_id in range(1, 6):
        plan, written = random_plan(rng, step_id, swapped_out)
        wait_for_layer = swapper.begin(plan)
        assert (wait_for_layer is not None) == bool(plan.swap_ins)
        if plan.segments:
            is_replay = rng.random() < 0.5
            if is_replay:
                swapper.put_in()
            # A computation that fails half-way leaves the rest of the copies to finish().
            num_layers = len(LAYERS)
            for layer in range(num_layers):
                if is_replay:
                    swapper.gate(layer)
                elif wait_for_layer is not None:
                    wait_for_layer(layer)
                device.streams.compute.run(lambda args=(layer, plan, written): compute(*args))
        assert swapper.finish() == (), "a block came back as something else than went out"
        goes_out = bool(plan.evictions or plan.swap_outs)
        assert [seconds > 0 for seconds in swapper.seconds] == [bool(plan.swap_ins), goes_out]
        twin.step(plan, written, gpu.layer_slices)
        assert torch.equal(cpu.storage, twin.cpu), "the CPU tier is read when a step is over"
    swapper.shutdown()
    device.drain()
    assert torch.equal(gpu.storage, twin.gpu)
    assert all(map(torch.equal, seen, twin.seen))
    assert len(seen) == len(twin.seen)


def simulate_often(*, verify: bool, without_waits: str | None = None) -> None:
    for seed in range(300):
        simulate(seed, verify=verify, without_waits=without_waits)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Groups of 1, 1, 2 and 1 layers."""
    monkeypatch.setattr(block_copy, "MIN_DMA_BYTES", 2 * 2 * 8)


@given(seed=st.integers(0, 2**32), verify=st.booleans())
@settings(deadline=None, max_examples=300)
def test_whatever_the_device_runs_first_the_contents_are_those_of_one_after_the_other(seed, verify):
    simulate(seed, verify=verify)


@pytest.mark.parametrize("stream", ["compute", "swap_in", "swap_out"])
def test_the_simulation_sees_where_a_stream_does_not_wait(stream):
    with pytest.raises(AssertionError):
        simulate_often(verify=False, without_waits=stream)


def test_without_waiting_for_the_host_a_checksum_would_see_the_wrong_bytes(monkeypatch):
    """Blocks that go out and come back in one step are summed up between the two."""
    monkeypatch.setattr(FakeEvent, "synchronize", lambda self: None)
    with pytest.raises(AssertionError):
        simulate_often(verify=True)


class RecordingCopier:
    """Notes which columns of how many blocks were put in, and copies nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []

    def copy(self, target, source, copies, columns):
        self.calls.append((len(copies), columns.start, columns.stop))


def test_later_groups_are_put_in_while_earlier_ones_are_computed_with_a_share_of_the_swap_outs_beside_each():
    gpu, cpu = make_stores()
    device = FakeDevice(random.Random(0))
    ins, outs = RecordingCopier(), RecordingCopier()
    swapper = StreamSwapper(gpu, cpu, device.streams, (ins, outs), verify=False)
    swapper._groups = [range(1), range(1, 2), range(2, 4), range(4, 5)]
    copies = tuple(swap_in(i, i) for i in range(8))
    wait_for_layer = swapper.begin(StepPlan(1, (QuerySegment("r", 0, (1,)),), swap_ins=copies[:2], swap_outs=copies))
    seen = []
    for layer in range(5):
        device.drain()
        seen.append((len(ins.calls), len(outs.calls)))
        wait_for_layer(layer)
    # One group ahead; a share of the swap-outs with each of them.
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4), (4, 4)]
    swapper.finish()
    assert ins.calls == [(2, 0, 2), (2, 2, 4), (2, 4, 8), (2, 8, 10)]
    assert outs.calls == [(2, 0, 10)] * 4


def test_a_plan_that_only_copies_moves_whole_blocks():
    gpu, cpu = make_stores()
    device = FakeDevice(random.Random(0))
    ins = RecordingCopier()
    swapper = StreamSwapper(gpu, cpu, device.streams, (ins, DmaCopier()), verify=False)
    assert swapper.begin(StepPlan(1, (), swap_ins=(swap_in(0, 1),))) is not None
    swapper.finish()
    assert ins.calls == [(1, 0, 10)]
