"""The attention backends by name, one row for each.

A new backend is a file with `load` and a row here. Imports no backend, and not torch: the configuration reads the names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BackendRow:
    """One backend.

    name: value of the option `attention_backend`.
    module: has `load(device, dtype, calls, chunk_size)`, see `AttentionLoader`; imported only if the backend is considered.
    devices: torch's device types that it is made for. It is compared with the reference there before it is used.
    is_automatic: `auto` considers it on these devices.
    """

    name: str
    module: str
    devices: tuple[str, ...]
    is_automatic: bool = True


# `auto` takes the first that loads on its device, unless a later one measures faster there.
BACKENDS = (
    BackendRow("triton", "engine.attention.triton_paged", ("cuda",)),
    BackendRow("flashinfer", "engine.attention.flashinfer_paged", ("cuda",)),
    BackendRow("cpu", "engine.attention.cpu", ("cpu",)),
    BackendRow("reference", "engine.attention.reference", (), is_automatic=False),
)
BACKEND_NAMES = tuple(row.name for row in BACKENDS)
