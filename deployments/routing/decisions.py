"""What a router did with a session's requests, in one word each.

For counting only; routing does not read it. Knows no Ray.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

Decision = Literal["sticky", "spill", "new", "rehash"]


class RouterDecisions:
    """Remembers where the last `max_sessions` sessions had their home: the first choice among the replicas that there were.

    new: this router has not seen the session, or not for long. rehash: its home is another rank than at its last request,
    because replicas came or went. spill: its home is the same, but was full; the request went elsewhere. sticky: it went
    home. The first of them that is true. A replica that replaces a dead one has its rank: sticky, though the cache is gone.
    """

    def __init__(self, max_sessions: int = 65536) -> None:
        self._max_sessions = max_sessions
        # By hash: a client may choose names of any length.
        self._homes: OrderedDict[int, int] = OrderedDict()

    def classify(self, session_id: str, home_rank: int, chosen_rank: int) -> Decision:
        """The word for a request that went to `chosen_rank`; remembers the session's home."""
        key = hash(session_id)
        last_home = self._homes.get(key)
        self._homes[key] = home_rank
        self._homes.move_to_end(key)
        if len(self._homes) > self._max_sessions:
            self._homes.popitem(last=False)
        if last_home is None:
            return "new"
        if last_home != home_rank:
            return "rehash"
        return "sticky" if chosen_rank == home_rank else "spill"
