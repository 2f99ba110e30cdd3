"""The adapters that an executor has loaded, and their rows in a step.

A step, and a request that was started, hold what they use: unloading takes nothing from them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from engine.errors import AdapterError
from engine.executor.lora.layers import AdaptedLayers, AdaptedRows, Change
from engine.executor.lora.low_rank_kernel import MAX_ROWS, load_kernel
from engine.executor.lora.peft_files import read_adapter

# Of one adapter, by the name of the layer.
Changes = Mapping[str, Change]


class Adapters:
    """Those of one model, or of one rank's shard of it; by identity, see PeftAdapter. From any thread.

    layers: the model's places for them.
    """

    def __init__(self, layers: AdaptedLayers, device: torch.device, dtype: torch.dtype, max_rank: int) -> None:
        self.layers = layers
        self._device, self._dtype = device, dtype
        self._max_rank = max_rank
        layers.step.kernel = load_kernel(device, dtype)
        self._loaded: dict[str, Changes] = {}
        self._lock = threading.Lock()

    def load(self, folder: str) -> str:
        """Read an adapter, and bring it to the device; blocking. Returns its identity. Raises AdapterError."""
        adapter = read_adapter(Path(folder).expanduser(), self.layers.shapes, self._max_rank)
        try:
            changes = {
                name: self.layers.take_part(name, layer, self._device, self._dtype)
                for name, layer in adapter.layers.items()
            }
        except torch.OutOfMemoryError as error:
            raise AdapterError(
                f"no memory is left on the device for the adapter in {folder}; unload another one", param="adapters"
            ) from error
        with self._lock:
            self._loaded[adapter.identity] = changes
        return adapter.identity

    def unload(self, identity: str) -> None:
        """Start no further request with it. Unknown ones are ignored."""
        with self._lock:
            self._loaded.pop(identity, None)

    def find(self, identity: str) -> Changes | None:
        """What a request holds that is started with it; None for no adapter. Raises AdapterError."""
        if not identity:
            return None
        changes = self._loaded.get(identity)
        if changes is None:
            raise AdapterError(f"the adapter {identity[:12]} is not loaded here")
        return changes

    def num_bytes(self, num_adapters: int) -> int:
        """The most that so many take on the device."""
        return num_adapters * self.layers.num_bytes(self._max_rank, self._dtype.itemsize)

    def rows_of(
        self,
        used: Sequence[Changes | None],
        segments: np.ndarray,
        send: Callable[[np.ndarray], torch.Tensor],
    ) -> list[AdaptedRows]:
        """The rows of each adapter in a step.

        used: by each segment.
        segments: int32 [number of segments, at least 2]: first row, and number of rows.
        send: brings an array to the device.
        """
        ranges: dict[int, list[tuple[int, int]]] = {}
        changes_of: dict[int, Changes] = {}
        for changes, (first, length) in zip(used, segments[:, :2].tolist(), strict=True):
            if changes is None:
                continue
            changes_of[id(changes)] = changes
            rows = ranges.setdefault(id(changes), [])
            if rows and rows[-1][1] == first:
                rows[-1] = (rows[-1][0], first + length)
            else:
                rows.append((first, first + length))
        max_few = 0 if self.layers.step.kernel is None else MAX_ROWS
        parts = []
        for key, rows in ranges.items():
            is_few = sum(end - first for first, end in rows) <= max_few
            where = slice(*rows[0]) if len(rows) == 1 and not is_few else send(_positions(rows))
            parts.append(AdaptedRows(changes_of[key], where, is_few))
        return parts


def _positions(ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([np.arange(start, end, dtype=np.int64) for start, end in ranges])
