"""The arrays of a step, and their way to one place on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.plan import QuerySegment
from engine.executor.step_inputs import ALIGNMENT, SAMPLED_BEFORE, BlockTables, Staging, StepArrays, StepLimits

CPU = torch.device("cpu")
LIMITS = StepLimits(max_num_seqs=4, max_num_batched_tokens=8, num_blocks=16)


def test_a_ragged_batch_as_arrays():
    tables = np.array([[5, 6, 7], [1, 2, 3]], dtype=np.int32)
    segments = (
        QuerySegment("a", 9, None, True),
        QuerySegment("b", 2, (70, 71, 72)),
        QuerySegment("b", 6, (73,), True),
    )
    arrays = StepArrays.of(segments, [1, 0, 0], tables, chunk_size=4)
    assert arrays.token_ids.tolist() == [SAMPLED_BEFORE, 70, 71, 72, 73]
    assert arrays.table_rows.tolist() == [1, 0, 0, 0, 0]
    assert arrays.positions.tolist() == [9, 2, 3, 4, 6]
    assert arrays.slot_mapping.tolist() == [3 * 4 + 1, 5 * 4 + 2, 5 * 4 + 3, 6 * 4, 6 * 4 + 2]
    assert arrays.segments.tolist() == [[0, 1, 10, 1], [1, 3, 5, 0], [4, 1, 7, 0]]
    assert arrays.sampled.tolist() == [0, 4]
    assert arrays.sampled_rows.tolist() == [1, 0]
    assert arrays.continues
    assert not arrays.is_decode_batch


def test_padding_writes_nothing_attends_to_nothing_and_samples_nothing():
    tables = np.array([[5, 6, 7], [1, 2, 3]], dtype=np.int32)
    segments = (QuerySegment("a", 9, None, True), QuerySegment("b", 4, (70,)))
    arrays = StepArrays.of(segments, [1, 0], tables, chunk_size=4)
    assert arrays.is_decode_batch
    padded = arrays.padded(4, 4)
    assert padded.token_ids.tolist() == [SAMPLED_BEFORE, 70, 0, 0]
    assert padded.table_rows.tolist() == [1, 0, 0, 0]
    assert padded.positions.tolist() == [9, 4, 0, 0]
    assert padded.slot_mapping.tolist() == [3 * 4 + 1, 6 * 4, -1, -1]
    assert padded.segments.tolist() == [[0, 1, 10, 1], [1, 1, 5, 0], [2, 0, 0, 0], [3, 0, 0, 0]]
    assert padded.sampled.tolist() == [0]
    assert padded.sampled_rows.tolist() == [1]
    assert arrays.padded(4, 3).segments.tolist() == [[0, 1, 10, 1], [1, 1, 5, 0], [2, 0, 0, 0]]


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_the_tables_on_the_device_are_those_of_the_host(data):
    """Requests come, grow and go; rows are used again; the device is told at any time."""
    tables = BlockTables(3, 5, CPU)
    model: dict[int, list[int]] = {}
    block_ids = st.integers(0, 99)
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["add", "append", "remove", "tell"]))
        if action == "add" and len(model) < 3:
            new = data.draw(st.lists(block_ids, min_size=1, max_size=5))
            row = tables.add(new)
            assert row not in model
            model[row] = list(new)
        elif action == "append" and model:
            row = data.draw(st.sampled_from(sorted(model)))
            if len(model[row]) < 5:
                model[row].append(data.draw(block_ids))
                tables.append(row, model[row][-1])
        elif action == "remove" and model:
            row = data.draw(st.sampled_from(sorted(model)))
            tables.remove(row)
            del model[row]
        else:
            tables.apply({name: torch.from_numpy(array) for name, array in tables.changes().items()})
            for row, blocks in model.items():
                assert tables.tensor[row, : len(blocks)].tolist() == blocks
                assert tables.array[row, : len(blocks)].tolist() == blocks


def test_tables_without_a_device_grow():
    tables = BlockTables()
    rows = [tables.add(range(number + 5)) for number in range(20)]
    assert len(set(rows)) == 20
    for number, row in enumerate(rows):
        assert tables.tensor[row, : number + 5].tolist() == list(range(number + 5))
    assert tables.changes() == {}


def arrays_of(*sizes: int) -> dict[str, np.ndarray]:
    dtypes = (np.int64, np.int32, np.float32, np.float64)
    rng = np.random.default_rng(sum(sizes))
    return {str(i): rng.integers(0, 100, size).astype(dtypes[i % 4]) for i, size in enumerate(sizes)}


def test_arrays_arrive_in_one_piece_of_memory_always_in_the_same_place():
    staging = Staging(CPU, LIMITS)
    places = set()
    for rest in ((), (3, 1), (0, 7, 2)):
        arrays = {**arrays_of(5, 3, 1), "table": np.arange(12, dtype=np.int32).reshape(3, 4)}
        arrays |= {f"rest {name}": array for name, array in arrays_of(*rest).items()}
        tensors = staging.send(arrays)
        assert list(tensors) == list(arrays)
        for name, array in arrays.items():
            assert tensors[name].tolist() == array.tolist()
            assert tensors[name].numpy().dtype == array.dtype
        places.add(tuple(tensors[name].data_ptr() for name in ("0", "1", "2", "table")))
        assert {tensor.untyped_storage().data_ptr() for tensor in tensors.values()} == {
            tensors["0"].untyped_storage().data_ptr()
        }
        base = tensors["0"].data_ptr()
        assert all((tensor.data_ptr() - base) % ALIGNMENT == 0 for tensor in tensors.values() if tensor.numel())
    assert len(places) == 1


def test_what_does_not_fit_leaves_what_came_before_it_in_its_place():
    staging = Staging(CPU, LIMITS)
    small = arrays_of(8, 4)
    place = staging.send(small)["0"].data_ptr()
    tensors = staging.send({**small, "long": np.arange(100_000), "last": np.array([3.5])})
    assert tensors["0"].data_ptr() == place
    assert torch.equal(tensors["long"], torch.arange(100_000))
    assert tensors["last"].tolist() == [3.5]
    assert tensors["1"].tolist() == small["1"].tolist()


def test_more_than_the_limits_is_a_defect():
    tables = BlockTables(1, 2, CPU)
    tables.add([1])
    with pytest.raises(AssertionError, match="rows"):
        tables.add([2])
    with pytest.raises(AssertionError, match="room"):
        tables.append(0, 2) or tables.append(0, 3)
