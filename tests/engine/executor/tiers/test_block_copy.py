"""Copies of parts of blocks, by copy engines, against one element at a time; and the groups of layers that come together."""

from __future__ import annotations

import ctypes
import random
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.protocol import LayerShape
from engine.errors import DeviceFailedError
from engine.executor.tiers import block_copy
from engine.executor.tiers.block_copy import DmaCopier, layer_groups, max_group_layers
from engine.executor.tiers.cuda_copies import CudaCopies
from tests.copies import swap_in


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


class Converting:
    """A copier that is none of the copy engines, as those of the cold tiers."""

    def copy(self, target, source, copies, columns) -> None: ...


def test_groups_are_large_enough_for_the_copy_engines():
    llama = Sizes(shapes_of(32, 8))
    assert max_group_layers(llama, Converting()) == 3
    assert max_group_layers(llama, DmaCopier()) == 8
    assert max_group_layers(Sizes(shapes_of(40, 40)), DmaCopier()) == 4
