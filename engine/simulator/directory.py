"""What replicas know of each other's conversations: where to ask. Rows that are out of date do no harm."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

# As live: how often replicas hear of each other's conversations, in seconds; those that are next in a session's order hear at
# once of its turns.
REFRESH_INTERVAL_S = 2.0


class _Row(NamedTuple):
    """What a replica knows of a conversation.

    num_tokens, noted_s: as of the last turn. heard_s: when all others hear of that; num_before: what they know until then.
    told, told_s: those that hear before, and when.
    """

    num_tokens: int
    noted_s: float
    heard_s: float
    num_before: int
    told: Collection[int]
    told_s: float

    def known_to(self, peer_id: int, now: float) -> int:
        """How many tokens another replica knows of."""
        is_known = self.heard_s <= now or (self.told_s <= now and peer_id in self.told)
        return self.num_tokens if is_known else self.num_before


class Directory:
    """Which replica knows how much of which conversation, as the others hear of it."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[int, _Row]] = {}
        self._joined_s: dict[int, float] = {}

    def join(self, peer_id: int, now: float) -> None:
        """A replica has started. It asks all others at once."""
        self._joined_s[peer_id] = now

    def note(
        self,
        conversation_id: str,
        peer_id: int,
        num_tokens: int,
        now: float,
        told: Collection[int] = (),
        told_s: float = 0.0,
    ) -> None:
        """A turn has ended there. told, told_s: who hears of that before the others do, and when."""
        rows = self._rows.setdefault(conversation_id, {})
        known = rows.get(peer_id)
        num_before = 0 if known is None else known.num_tokens if known.heard_s <= now else known.num_before
        heard_s = REFRESH_INTERVAL_S * (now // REFRESH_INTERVAL_S + 1)
        rows[peer_id] = _Row(num_tokens, now, heard_s, num_before, told, told_s)

    def best(self, conversation_id: str, asker_id: int, now: float) -> tuple[int, int] | None:
        """The other replica that knows most of a conversation, of equal ones the latest; and how many tokens."""
        best: tuple[int, float, int] | None = None
        for peer_id, row in self._rows.get(conversation_id, {}).items():
            was_asked = row.noted_s <= self._joined_s.get(asker_id, -1.0)
            num_tokens = row.num_tokens if was_asked else row.known_to(asker_id, now)
            if peer_id != asker_id and num_tokens and (best is None or (num_tokens, row.noted_s) > best[:2]):
                best = num_tokens, row.noted_s, peer_id
        return None if best is None else (best[2], best[0])

    def forget(self, conversation_id: str) -> None:
        """It will not come back."""
        self._rows.pop(conversation_id, None)

    def forget_peer(self, peer_id: int) -> None:
        """A replica has gone."""
        self._joined_s.pop(peer_id, None)
        for rows in self._rows.values():
            rows.pop(peer_id, None)
