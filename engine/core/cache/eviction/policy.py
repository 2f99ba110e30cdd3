"""What every eviction policy does, and what those are told that learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from engine.core.cache.index import Chunk
from engine.core.reuse import Reuse

if TYPE_CHECKING:
    from engine.core.request import Request


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


class ReuseObserver(Protocol):
    """What the policies of all tiers learn from: a class with `LEARNS_FROM` makes one and is given it beside the costs."""

    def stamp(self, request: Request) -> Reuse:
        """What the chunks are to keep of a request that is about to leave them; see Chunk.reuse."""
        ...

    def note_end(self, request: Request, now: float) -> None:
        """A request leaves its `chunks`, which have been used once more by now."""
        ...

    def note_start(self, request: Request, now: float) -> None:
        """A request is admitted; its `chunk_keys` are the names of what it uses, whether that is here or not."""
        ...
