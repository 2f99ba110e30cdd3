"""What every eviction policy does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from engine.core.cache.index import Chunk


class EvictionPolicy(Protocol):
    """Holds chunks whose `last_active` does not change while they are held."""

    def insert(self, chunk: Chunk) -> None: ...
    def remove(self, chunk: Chunk) -> None: ...
    def choose_victim(self, now: float) -> Chunk | None:
        """The next to go, still held; None when the policy holds nothing."""
        ...

    def goes_before(self, chunk: Chunk, other: Chunk, now: float) -> bool:
        """Whether `chunk` would be chosen before `other`, held or not."""
        ...

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Chunk]: ...
    def __contains__(self, chunk: object) -> bool: ...
