"""From the segments of a plan to the arrays of a ragged batch, and these to the device in one copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.core.plan import QuerySegment

# Kernels are compiled for pointers that are multiples of this, and anew for others.
ALIGNMENT = 16
# A few rows of logits cost as much as one.
MIN_KEPT_ROWS = 32
# A token that is on the device already: the one that its request sampled last.
SAMPLED_BEFORE = -1


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The most that a step may bring.

    With limits, everything a step reads lies in one place from the start, as CUDA graphs want it.

    num_blocks: of one block table.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int

    @property
    def max_kept_rows(self) -> int:
        """Whose logits a recorded step with prompts keeps: one of each request, and some of guesses."""
        return max(self.max_num_seqs, MIN_KEPT_ROWS)


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One ragged batch in host memory.

    token_ids, table_rows, positions, slot_mapping: int64 [num_tokens]; SAMPLED_BEFORE stands for the token that the request
    of that table row sampled last. segments: as AttentionMetadata has them. sampled: int64, the rows of the batch whose
    logits choose the next tokens; sampled_rows: table rows of their requests. scored: the same of those whose logits say how
    probable `targets` are, int64 [number of targets].
    """

    token_ids: np.ndarray
    table_rows: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray
    segments: np.ndarray
    sampled: np.ndarray
    sampled_rows: np.ndarray
    scored: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(
        cls, segments: Sequence[QuerySegment], table_rows: Sequence[int], block_tables: np.ndarray, chunk_size: int
    ) -> StepArrays:
        """table_rows: of the request of each segment."""
        # Every array in a few operations over all segments, whatever their number.
        token_ids = np.fromiter(_token_ids(segments), dtype=np.int64)
        starts = np.array([segment.start for segment in segments])
        lengths = np.array([segment.query_len for segment in segments])
        rows = np.array(table_rows)
        ends = lengths.cumsum()
        first_rows = ends - lengths
        positions = np.arange(len(token_ids)) + np.repeat(starts - first_rows, lengths)
        chunk_numbers, offsets = np.divmod(positions, chunk_size)
        rows_of_tokens = np.repeat(rows, lengths)
        block_ids = block_tables[rows_of_tokens, chunk_numbers]
        descriptors = np.stack([first_rows, lengths, starts + lengths, rows], axis=1).astype(np.int32)
        # Of each segment the last rows, as many as choose a token.
        nums_chosen = np.array([segment.num_chosen for segment in segments])
        places = np.arange(nums_chosen.sum()) - np.repeat(nums_chosen.cumsum() - nums_chosen, nums_chosen)
        return cls(
            token_ids,
            rows_of_tokens,
            positions,
            block_ids * np.int64(chunk_size) + offsets,
            descriptors,
            np.repeat(ends - nums_chosen, nums_chosen) + places,
            np.repeat(rows, nums_chosen),
            *_scored(first_rows, segments),
        )

    @classmethod
    def padding(cls, num_rows: int, num_segments: int) -> StepArrays:
        """So many rows and segments that write nothing, attend to nothing and sample nothing."""
        token_ids, table_rows, positions = np.zeros((3, num_rows), np.int64)
        segments = np.zeros((num_segments, 4), np.int32)
        segments[:, 0] = np.minimum(np.arange(num_segments), num_rows - 1)
        nothing = np.zeros(0, np.int64)
        return cls(token_ids, table_rows, positions, np.full(num_rows, -1), segments, *[nothing] * 4)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_decode_batch(self) -> bool:
        """Every segment is one row."""
        return len(self.token_ids) == len(self.segments)

    @property
    def continues(self) -> bool:
        """Some tokens are on the device already."""
        return bool((self.token_ids == SAMPLED_BEFORE).any())

    def padded(self, num_rows: int, num_segments: int) -> StepArrays:
        """The batch with rows and segments of padding behind it."""
        padding = StepArrays.padding(num_rows, num_segments)
        for name, array in self.batch().items():
            getattr(padding, name)[: len(array)] = array
        rest = {name: getattr(self, name) for name in ("sampled", "sampled_rows", "scored", "targets")}
        return replace(padding, **rest)

    def batch(self) -> dict[str, np.ndarray]:
        """What a forward reads, by name."""
        names = ("token_ids", "table_rows", "positions", "slot_mapping", "segments")
        return {name: getattr(self, name) for name in names}


def _token_ids(segments: Sequence[QuerySegment]) -> Iterator[int]:
    for segment in segments:
        if segment.token_ids is None:
            yield SAMPLED_BEFORE
        else:
            yield from segment.token_ids


def _scored(first_rows: np.ndarray, segments: Sequence[QuerySegment]) -> tuple[np.ndarray, np.ndarray]:
    """(rows before the targets, targets) of all segments."""
    targets = [target for segment in segments for target in segment.targets]
    if not targets:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    rows = [np.arange(row, row + len(s.targets)) for row, s in zip(first_rows, segments, strict=True)]
    return np.concatenate(rows), np.array(targets, np.int64)


class BlockTables:
    """The block tables of all started requests.

    array: int32 [rows, capacity], a row for each request; what lies behind a row's blocks means nothing. Both dimensions
        grow by doubling, unless a copy is kept on a device, which stays where it is.
    """

    def __init__(self, num_rows: int = 8, capacity: int = 8, device: torch.device | None = None) -> None:
        """device: of the copy; None = there is none."""
        self.array = np.zeros((num_rows, capacity), dtype=np.int32)
        self._num_blocks = np.zeros(num_rows, dtype=np.int64)
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._on_device = None if device is None else torch.zeros(num_rows, capacity, dtype=torch.int32, device=device)
        # Places of the flattened array that the copy does not have yet. A dict, because a set does not keep the order.
        self._changed: dict[int, None] = {}

    @property
    def tensor(self) -> torch.Tensor:
        """On the device, once `apply` has seen all changes; or `array` itself."""
        return torch.from_numpy(self.array) if self._on_device is None else self._on_device

    def add(self, block_ids: Sequence[int]) -> int:
        """The row of a new table."""
        if not self._free_rows:
            assert self._on_device is None, "more requests than the tables have rows"
            num_rows = len(self.array)
            self.array = np.concatenate([self.array, np.zeros_like(self.array)])
            self._num_blocks = np.concatenate([self._num_blocks, np.zeros_like(self._num_blocks)])
            self._free_rows = list(range(2 * num_rows - 1, num_rows - 1, -1))
        row = self._free_rows.pop()
        self._num_blocks[row] = 0
        self._write(row, block_ids)
        return row

    def append(self, row: int, block_id: int) -> None:
        self._write(row, (block_id,))

    def remove(self, row: int) -> None:
        self._free_rows.append(row)

    def changes(self) -> dict[str, np.ndarray]:
        """What the copy on the device lacks until `apply`; empty if it lacks nothing.

        `changed_places` of the flattened tables, and `changed_blocks`, their contents.
        """
        if not self._changed:
            return {}
        places = np.fromiter(self._changed, dtype=np.int64)
        return {"changed_places": places, "changed_blocks": self.array.reshape(-1)[places]}

    def apply(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Bring the copy up to date with `changes` that were sent to the device; no table has changed since."""
        if self._on_device is not None and "changed_places" in tensors:
            self._on_device.view(-1).index_copy_(0, tensors["changed_places"], tensors["changed_blocks"])
            self._changed = {}

    def _write(self, row: int, block_ids: Sequence[int]) -> None:
        first = int(self._num_blocks[row])
        end = first + len(block_ids)
        while self.array.shape[1] < end:
            assert self._on_device is None, "a longer context than the tables have room for"
            self.array = np.concatenate([self.array, np.zeros_like(self.array)], axis=1)
        self.array[row, first:end] = block_ids
        self._num_blocks[row] = end
        if self._on_device is not None:
            start = row * self.array.shape[1]
            self._changed.update(dict.fromkeys(range(start + first, start + end)))


class Staging:
    """Brings the arrays of a step to the device in one copy. On a CPU nothing has to be brought."""

    def __init__(self, device: torch.device, limits: StepLimits | None) -> None:
        """Allocate the buffer.

        limits: None = the arrays are used where they are. Else they come to lie in one buffer, always the same, which is
            large enough for any batch within the limits.
        """
        self._device = device
        self._host: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        if limits is not None:
            # Four arrays of int64 and a row of `segments` for each token is more than there will be; besides, parameters of
            # sampling, and changes of tables.
            num_bytes = 64 * limits.max_num_batched_tokens + 256 * limits.max_num_seqs + 64 * 1024
            self._host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
            self._buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def send(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """The arrays as tensors on the device, in the current stream; valid until the next call.

        Arrays of the same sizes, in the same order, come to lie in the same places, whatever follows them.
        """
        if self._host is None:
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self._copied is not None:
            self._copied.synchronize()  # the last copy may still be reading
        places, _ = _lay_out(arrays)
        fitting = {name: array for name, array in arrays.items() if places[name] + array.nbytes <= len(self._host)}
        tensors = _copy(fitting, self._host, self._buffer)
        if len(fitting) < len(arrays):  # penalties over very long prompts, which come last
            tensors |= self.send_apart({name: array for name, array in arrays.items() if name not in fitting})
        if self._device.type == "cuda":
            self._copied = torch.cuda.current_stream(self._device).record_event()
        return tensors

    def send_apart(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """As `send`, in memory of its own: what was sent before stays valid. For arrays that are made while a step runs."""
        if self._host is None:
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        _, end = _lay_out(arrays)
        host = torch.empty(end, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        return _copy(arrays, host, torch.empty(end, dtype=torch.uint8, device=self._device))


def _lay_out(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, int], int]:
    """Where each array begins in a buffer, and the end of all."""
    places, end = {}, 0
    for name, array in arrays.items():
        places[name] = end
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return places, end


def _copy(arrays: Mapping[str, np.ndarray], host: torch.Tensor, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    """Copy to `buffer`, which holds the tensors, through `host`, which is free again when that is done."""
    places, end = _lay_out(arrays)
    flat = host.numpy()
    for name, array in arrays.items():
        flat[places[name] : places[name] + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    end = min(end, len(host))  # behind the last array is no padding
    buffer[:end].copy_(host[:end], non_blocking=True)
    return {
        name: buffer[places[name] : places[name] + array.nbytes]
        .view(torch.from_numpy(array[:0]).dtype)
        .view(array.shape)
        for name, array in arrays.items()
    }
