"""Copies of parts of blocks, by copy engines and by the kernel (in Triton's interpreter), against one element at a time."""

from __future__ import annotations

import ctypes
import random
from importlib.util import find_spec
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention import device_clock
from engine.attention.device_clock import seconds_on
from engine.attention.protocol import LayerShape
from engine.errors import ConfigError, DeviceFailedError
from engine.executor.tiers import block_copy
from engine.executor.tiers.block_copy import DmaCopier, choose_copiers, columns_of, layer_groups, max_group_layers
from engine.executor.tiers.cuda_copies import CudaCopies
from engine.executor.tiers.kv_store import KVStore
from tests.copies import swap_in

needs_interpreter = pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(), reason="needs Triton's interpreter"
)


def make_store(num_blocks: int) -> KVStore:
    layers = (LayerShape(1, 3, 5), LayerShape(2, 4, 4))
    store = KVStore(layers, num_blocks=num_blocks, chunk_size=2, dtype=torch.float32, device=torch.device("cpu"))
    store.storage.copy_(torch.arange(store.storage.numel()).view_as(store.storage))
    return store


def assert_copies_right(copier, seed: int, dtype: torch.dtype, num_columns: int) -> None:
    """Random blocks, random columns; all other elements, NaN among them, stay as they are."""
    rng = random.Random(seed)
    num_blocks = rng.randint(1, 12)
    source = torch.randint(0, 100, (num_blocks, num_columns)).to(dtype)
    target = torch.randint(0, 100, (num_blocks + 3, num_columns)).to(dtype)
    if dtype.is_floating_point:
        target[rng.randrange(len(target))] = float("nan")
        source[rng.randrange(num_blocks), 0] = float("nan")
    targets = rng.sample(range(len(target)), rng.randint(1, num_blocks))
    first = rng.randrange(num_blocks)
    copies = tuple(swap_in((first + i) % num_blocks, block) for i, block in enumerate(targets))
    if rng.random() < 0.5:  # rows that follow each other
        copies = tuple(swap_in(i, i + 1) for i in range(len(copies)))
    start = rng.randrange(num_columns)
    columns = slice(0, num_columns) if rng.random() < 0.4 else slice(start, rng.randint(start + 1, num_columns))
    expected = target.clone()
    for copy in copies:
        expected[copy.target, columns] = source[copy.source, columns]
    copier.copy(target, source, copies, columns)
    torch.testing.assert_close(target, expected, rtol=0, atol=0, equal_nan=True)


@given(seed=st.integers(0, 2**16), num_columns=st.integers(1, 40))
@settings(deadline=None, max_examples=50)
def test_the_copy_engines_move_what_they_are_told(seed, num_columns):
    assert_copies_right(DmaCopier(), seed, torch.float32, num_columns)


class FakeRuntime:
    """CUDA's runtime library on host memory. Notes the number of copies of each call, and the batches' stream."""

    def __init__(self, *, has_batches: bool) -> None:
        self.calls: list[int] = []
        self.extra_arguments: set[int] = set()
        self.cudaMemcpyAsync = self._make(self._copy)
        if has_batches:
            self.cudaMemcpyBatchAsync = self._copy_batch

    @staticmethod
    def _make(function):
        def call(*arguments):
            return function(*arguments)

        return call

    def _copy(self, target, source, size, kind, stream) -> int:
        assert kind == 4, "cudaMemcpyDefault"
        self.calls.append(1)
        ctypes.memmove(target, source, size)
        return 0

    def _copy_batch(self, targets, sources, sizes, count, attributes, first, num_attributes, *rest) -> int:
        number = count.value
        self.calls.append(number)
        self.extra_arguments.add(len(rest))
        assert (attributes._obj.source_access_order, first._obj.value, num_attributes.value) == (1, 0, 1)
        arrays = [(ctypes.c_int64 * number).from_address(pointer.value) for pointer in (targets, sources, sizes)]
        for target, source, size in zip(*arrays, strict=True):
            ctypes.memmove(target, source, size)
        return 0


@pytest.mark.parametrize(
    ("has_batches", "is_before_13", "stream"), [(True, False, 7), (True, True, 7), (True, False, 0), (False, False, 7)]
)
def test_copies_by_address_move_what_they_are_told(has_batches, is_before_13, stream):
    """In a batch if the library has them and the stream takes them; CUDA before 13 is told where to put what failed."""
    runtime = FakeRuntime(has_batches=has_batches)
    copies = CudaCopies(runtime, is_before_13=is_before_13)
    copier = DmaCopier(lambda *arrays: copies(*arrays[:3], stream))
    for seed in range(60):
        assert_copies_right(copier, seed, (torch.float32, torch.bfloat16)[seed % 2], 1 + seed)
    is_batched = has_batches and stream != 0
    assert (max(runtime.calls) > 1) == is_batched
    assert runtime.extra_arguments == ({2 if is_before_13 else 1} if is_batched else set())


def test_what_a_refused_batch_was_to_copy_is_copied_one_by_one():
    class Refusing(FakeRuntime):
        num_refused = num_asked = 0

        def _copy_batch(self, *_) -> int:
            self.num_refused += 1
            return 801

        def cudaGetLastError(self) -> int:
            self.num_asked += 1
            return 801

    runtime = Refusing(has_batches=True)
    copies = CudaCopies(runtime, is_before_13=False)
    copier = DmaCopier(lambda *arrays: copies(*arrays[:3], 7))
    for seed in range(10):
        assert_copies_right(copier, seed, torch.float32, 1 + seed)
    assert (runtime.num_refused, runtime.num_asked) == (1, 1)
    assert set(runtime.calls) == {1}


def test_a_copy_that_cannot_be_started_says_so():
    class Failing(FakeRuntime):
        def _copy(self, *_) -> int:
            return 700

    copies = CudaCopies(Failing(has_batches=False), is_before_13=False)
    with pytest.raises(DeviceFailedError, match="error 700"):
        assert_copies_right(DmaCopier(lambda *arrays: copies(*arrays[:3], 7)), 1, torch.float32, 3)


def test_what_launching_takes_is_counted_once_more(monkeypatch):
    """Launching that lasts for 3 s of 10 is 13; of what waits, the median of five."""
    now = 0.0
    monkeypatch.setattr(device_clock.time, "perf_counter", lambda: now)

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: advance(7))
    assert seconds_on(torch.device("cuda"))(lambda: advance(3)) == 10
    assert seconds_on(torch.device("cuda"), counts_launching=True)(lambda: advance(3)) == 13


@needs_interpreter
@given(
    seed=st.integers(0, 2**16),
    num_columns=st.sampled_from([1, 7, 16, 60, 4096 * 3 + 8]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(deadline=None, max_examples=40)
def test_the_kernel_moves_what_it_is_told(seed, num_columns, dtype):
    from engine.executor.tiers.block_copy_kernel import KernelCopier

    assert_copies_right(KernelCopier(), seed, dtype, num_columns)


@needs_interpreter
def test_the_groups_of_one_swap_in_share_their_list_and_another_swap_in_has_its_own():
    from engine.executor.tiers.block_copy_kernel import KernelCopier

    gpu, cpu = make_store(6), make_store(6)
    gpu.storage.zero_()
    copier = KernelCopier()
    for copies in ((swap_in(0, 1), swap_in(4, 2)), (swap_in(3, 5),)):
        for columns in gpu.layer_slices:
            copier.copy(gpu.storage, cpu.storage, copies, columns)
    expected = torch.zeros_like(gpu.storage)
    expected[[1, 2, 5]] = cpu.storage[[0, 4, 3]]
    assert torch.equal(gpu.storage, expected)


def test_whole_blocks_that_follow_each_other_are_one_copy():
    copies = [swap_in(*pair) for pair in [(3, 0), (4, 1), (5, 2), (9, 3), (10, 4), (2, 5), (1, 6)]]
    assert block_copy._runs(copies) == [(0, 3), (3, 2), (5, 1), (6, 1)]
    assert block_copy._runs([]) == []


def test_groups_of_layers_grow_up_to_their_largest_and_hold_each_layer_once():
    assert [len(group) for group in layer_groups(32, 8)] == [1, 1, 2, 4, 8, 8, 8]
    assert [len(group) for group in layer_groups(40, 4)] == [1, 1, 2, *[4] * 9]
    assert layer_groups(1, 5) == [range(1)]
    for num_layers in range(1, 60):
        for most in (1, 3, 7):
            layers = [layer for group in layer_groups(num_layers, most) for layer in group]
            assert layers == list(range(num_layers))


def shapes_of(num_layers: int, num_kv_heads: int, head_dim: int = 128) -> tuple[LayerShape, ...]:
    return (LayerShape(num_kv_heads, head_dim, head_dim),) * num_layers


class Sizes:
    """The sizes of a tier, without its memory."""

    def __init__(self, layers: tuple[LayerShape, ...], num_blocks: int = 40) -> None:
        widths = [layer.numel_per_token * 32 for layer in layers]
        ends = list(accumulate(widths))
        self.num_blocks = num_blocks
        self.storage = torch.empty(num_blocks, ends[-1], dtype=torch.bfloat16, device="meta")
        self.layer_slices = [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]


class FakeCopier:
    """Notes what it was to copy. log: of all copiers."""

    log: list[tuple[str, int, slice]]

    def copy(self, target, source, copies, columns) -> None:
        pairs = {(copy.source, copy.target) for copy in copies}
        assert len({source for source, _ in pairs}) == len({target for _, target in pairs}) == len(copies)
        assert not {(source + 1, target + 1) for source, target in pairs} & pairs, "would be one copy"
        self.log.append((type(self).__name__, len(copies), columns))


class FakeKernel(FakeCopier): ...


class FakeDma(FakeCopier, DmaCopier): ...


@pytest.fixture
def log(monkeypatch) -> list[tuple[str, int, slice]]:
    log: list[tuple[str, int, slice]] = []
    monkeypatch.setattr(FakeCopier, "log", log, raising=False)
    monkeypatch.setattr(block_copy, "DmaCopier", FakeDma)
    monkeypatch.setattr(block_copy, "_load_kernel", lambda gpu, cpu: FakeKernel)
    return log


def kinds_of(copiers) -> tuple[str, ...]:
    return tuple("dma" if isinstance(copier, DmaCopier) else "kernel" for copier in copiers)


@pytest.mark.parametrize(
    ("seconds", "kinds"),
    [
        ((1.0, 1.0, 1.0, 1.0), ("dma", "dma")),
        ((1.05, 1.05, 1.0, 1.0), ("dma", "dma")),  # not worth the processors
        ((1.2, 1.0, 1.0, 1.0), ("kernel", "dma")),
        ((1.0, 9.0, 1.0, 1.0), ("dma", "kernel")),
        ((2.0, 2.0, 1.0, 1.0), ("kernel", "kernel")),
    ],
)
def test_each_way_goes_by_what_was_measured(seconds, kinds, log, caplog):
    """seconds: in and out by copy engines, in and out by the kernel."""
    caplog.set_level("INFO")
    measured = iter(seconds)

    def seconds_of(call) -> float:
        call()
        return next(measured)

    llama = Sizes(shapes_of(32, 8))
    copiers = choose_copiers("auto", llama, llama, seconds_of)
    assert kinds_of(copiers) == kinds
    assert next(measured, None) is None
    in_gbs = [32 * (4 << 20) / seconds[i] / 1e9 for i in (0, 2)]
    assert (
        f"swaps in: by {'copy engines' if kinds[0] == 'dma' else 'the kernel'}, measured {in_gbs[0]:.1f} GB/s by copy "
        f"engines and {in_gbs[1]:.1f} by the kernel (blocks of 4.00 MiB)" in caplog.text
    )
    # Everything was copied once each way by both; in, in the groups that it would come in.
    width = llama.storage.shape[1]
    for name, num_layers in (("FakeDma", 8), ("FakeKernel", 3)):
        copied = [(num, columns) for kind, num, columns in log if kind == name]
        assert all(num == 32 for num, _ in copied)
        *ins, out = [columns for _, columns in copied]
        assert out == slice(0, width)
        assert [ins[0].start, *(columns.stop for columns in ins)] == [*(columns.start for columns in ins), width]
        assert max(columns.stop - columns.start for columns in ins) == num_layers * width // 32


def test_a_tier_of_few_blocks_is_measured_with_as_many(log):
    few = Sizes(shapes_of(2, 1), num_blocks=3)
    choose_copiers("auto", Sizes(shapes_of(2, 1)), few, lambda call: (call(), 1.0)[1])
    assert {num for _, num, _ in log} == {3}


def test_what_was_asked_for_is_not_measured(log):
    sizes, nothing = Sizes(shapes_of(2, 1)), Sizes(shapes_of(2, 1), num_blocks=0)
    both = choose_copiers("kernel", sizes, sizes)
    assert kinds_of(both) == ("kernel", "kernel")
    assert both[0] is not both[1], "a kernel's list of copies belongs to one stream"
    assert kinds_of(choose_copiers("dma", sizes, sizes)) == ("dma", "dma")
    assert kinds_of(choose_copiers("auto", sizes, nothing)) == ("dma", "dma")
    assert log == []


def test_groups_are_large_enough_for_the_copy_engines():
    llama = Sizes(shapes_of(32, 8))
    assert max_group_layers(llama, FakeKernel()) == 3
    assert max_group_layers(llama, DmaCopier()) == 8
    assert max_group_layers(Sizes(shapes_of(40, 40)), DmaCopier()) == 4


@needs_interpreter
def test_the_kernel_is_compiled_for_all_that_will_be_copied(monkeypatch):
    """Its elements are as wide as the borders of the columns allow: each group of layers may be another kernel."""
    from engine.executor.tiers import block_copy_kernel

    gpu, cpu = make_store(2), make_store(2)
    copied = []
    monkeypatch.setattr(
        block_copy_kernel.KernelCopier, "copy", lambda self, to, source, copies, columns: copied.append((to, columns))
    )
    choose_copiers("kernel", gpu, cpu)
    groups = layer_groups(2, max_group_layers(gpu, block_copy_kernel.KernelCopier()))
    expected = [columns_of(gpu, layers) for layers in (range(2), *groups)]
    assert len(expected) == 3
    for store in (gpu, cpu):
        assert [columns for target, columns in copied if target is store.storage] == expected


@needs_interpreter
def test_the_kernel_is_tried_before_it_is_taken(monkeypatch, caplog):
    from engine.executor.tiers import block_copy_kernel

    gpu, cpu = make_store(2), make_store(2)
    seconds = iter([2.0, 2.0, 1.0, 1.0])
    copiers = choose_copiers("auto", gpu, cpu, lambda call: (call(), next(seconds))[1])
    assert all(isinstance(copier, block_copy_kernel.KernelCopier) for copier in copiers)

    def fail(*_) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(block_copy_kernel.KernelCopier, "copy", fail)
    assert isinstance(choose_copiers("auto", gpu, cpu)[0], DmaCopier)
    assert "no such device" in caplog.text
    with pytest.raises(ConfigError, match=r"no such device.*use 'dma'"):
        choose_copiers("kernel", gpu, cpu)
