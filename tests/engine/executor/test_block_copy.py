"""Copies of parts of blocks, by copy engines and by the kernel (in Triton's interpreter), against one element at a time."""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.metadata import LayerShape
from engine.core.plan import BlockCopy
from engine.errors import ConfigError
from engine.executor import block_copy
from engine.executor.block_copy import DmaCopier, choose_copiers, layer_groups, max_group_layers
from engine.executor.kv_store import KVStore

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
    copies = tuple(BlockCopy((first + i) % num_blocks, block) for i, block in enumerate(targets))
    if rng.random() < 0.5:  # rows that follow each other
        copies = tuple(BlockCopy(i, i + 1) for i in range(len(copies)))
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


@needs_interpreter
@given(
    seed=st.integers(0, 2**16),
    num_columns=st.sampled_from([1, 7, 16, 60, 4096 * 3 + 8]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(deadline=None, max_examples=40)
def test_the_kernel_moves_what_it_is_told(seed, num_columns, dtype):
    from engine.executor.block_copy_kernel import KernelCopier

    assert_copies_right(KernelCopier(), seed, dtype, num_columns)


@needs_interpreter
def test_the_groups_of_one_swap_in_share_their_list_and_another_swap_in_has_its_own():
    from engine.executor.block_copy_kernel import KernelCopier

    gpu, cpu = make_store(6), make_store(6)
    gpu.storage.zero_()
    copier = KernelCopier()
    for copies in ((BlockCopy(0, 1), BlockCopy(4, 2)), (BlockCopy(3, 5),)):
        for columns in gpu.layer_slices:
            copier.copy(gpu.storage, cpu.storage, copies, columns)
    expected = torch.zeros_like(gpu.storage)
    expected[[1, 2, 5]] = cpu.storage[[0, 4, 3]]
    assert torch.equal(gpu.storage, expected)


def test_whole_blocks_that_follow_each_other_are_one_copy():
    copies = [BlockCopy(*pair) for pair in [(3, 0), (4, 1), (5, 2), (9, 3), (10, 4), (2, 5), (1, 6)]]
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
    """The sizes of a tier whose memory nobody needs."""

    def __init__(self, layers: tuple[LayerShape, ...], num_blocks: int = 1) -> None:
        numel = sum(layer.numel_per_token for layer in layers) * 32
        self.num_blocks = num_blocks
        self.storage = torch.empty(num_blocks, numel, dtype=torch.bfloat16, device="meta")
        self.layer_slices = [slice(0, 0)] * len(layers)


class FakeKernel:
    def copy(self, target, source, copies, columns) -> None: ...


def test_large_blocks_go_by_copy_engines_and_small_parts_of_them_by_the_kernel(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(block_copy, "_load_kernel", lambda gpu, cpu: FakeKernel)
    kinds = {}
    for name, layers in {
        "OPT-13B": shapes_of(40, 40),
        "Llama-3.1-8B": shapes_of(32, 8),
        "Qwen2.5-0.5B": shapes_of(24, 2, 64),
    }.items():
        sizes = Sizes(layers)
        copiers = choose_copiers("auto", sizes, sizes)
        kinds[name] = tuple("dma" if isinstance(copier, DmaCopier) else "kernel" for copier in copiers)
    assert kinds == {
        "OPT-13B": ("dma", "dma"),
        "Llama-3.1-8B": ("kernel", "dma"),
        "Qwen2.5-0.5B": ("kernel", "kernel"),
    }
    assert "swaps: in by kernel, out by copy engines (blocks of 4.00 MiB, 32 layers)" in caplog.text
    llama = Sizes(shapes_of(32, 8))
    assert max_group_layers(llama, FakeKernel()) == 3
    assert max_group_layers(llama, DmaCopier()) == 8
    assert max_group_layers(Sizes(shapes_of(40, 40)), DmaCopier()) == 4
    both = choose_copiers("kernel", llama, llama)
    assert all(isinstance(copier, FakeKernel) for copier in both)
    assert both[0] is not both[1], "a kernel's list of copies belongs to one stream"
    assert all(isinstance(copier, DmaCopier) for copier in choose_copiers("dma", llama, llama))
    nothing = Sizes(shapes_of(24, 2, 64), num_blocks=0)
    assert all(isinstance(copier, DmaCopier) for copier in choose_copiers("auto", nothing, nothing))


@needs_interpreter
def test_the_kernel_is_tried_before_it_is_taken(monkeypatch, caplog):
    from engine.executor import block_copy_kernel

    gpu, cpu = make_store(2), make_store(2)
    assert isinstance(choose_copiers("auto", gpu, cpu)[0], block_copy_kernel.KernelCopier)

    def fail(*_) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(block_copy_kernel.KernelCopier, "copy", fail)
    assert isinstance(choose_copiers("auto", gpu, cpu)[0], DmaCopier)
    assert "no such device" in caplog.text
    with pytest.raises(ConfigError, match=r"no such device.*use 'dma'"):
        choose_copiers("kernel", gpu, cpu)
