"""What replicas know of each other's conversations: where to ask. Rows that are out of date do no harm."""

from __future__ import annotations

from typing import NamedTuple

# As live: how often replicas hear of each other's conversations, in seconds.
REFRESH_INTERVAL_S = 2.0


class _Row(NamedTuple):
    """num_tokens, noted_s: as of the last turn. heard_s: when others hear of that. num_before: what they know until then."""

    num_tokens: int
    noted_s: float
    heard_s: float
    num_before: int


class Directory:
    """Which replica knows how much of which conversation, as the others hear of it."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[int, _Row]] = {}

    def note(self, conversation_id: str, peer_id: int, num_tokens: int, now: float) -> None:
        """A turn has ended there."""
        rows = self._rows.setdefault(conversation_id, {})
        known = rows.get(peer_id)
        num_before = 0 if known is None else known.num_tokens if known.heard_s <= now else known.num_before
        heard_s = REFRESH_INTERVAL_S * (now // REFRESH_INTERVAL_S + 1)
        rows[peer_id] = _Row(num_tokens, now, heard_s, num_before)

    def best(self, conversation_id: str, asker_id: int, now: float) -> tuple[int, int] | None:
        """The other replica that knows most of a conversation, of equal ones the latest; and how many tokens."""
        best: tuple[int, float, int] | None = None
        for peer_id, row in self._rows.get(conversation_id, {}).items():
            num_tokens = row.num_tokens if row.heard_s <= now else row.num_before
            if peer_id != asker_id and num_tokens and (best is None or (num_tokens, row.noted_s) > best[:2]):
                best = num_tokens, row.noted_s, peer_id
        return None if best is None else (best[2], best[0])

    def forget(self, conversation_id: str) -> None:
        """It will not come back."""
        self._rows.pop(conversation_id, None)

    def forget_peer(self, peer_id: int) -> None:
        """A replica has gone."""
        for rows in self._rows.values():
            rows.pop(peer_id, None)
