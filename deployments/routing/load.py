"""How busy engine replicas are, and whether a request waits at its session's home or goes elsewhere.

Decides only; time is an argument. Knows no Ray.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

# A request leaves home only to begin so much earlier, in seconds: what is known of the loads is half a second old.
MIN_GAIN_S = 1.0
# What was observed so long ago counts half, in seconds.
HALF_LIFE_S = 10.0


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What an engine replica says of itself.

    num_requests: that run or wait.
    num_ahead: that wait; if none does, minus the number of those that may begin at once.
    turn_s: seconds from one request that ends to the next, as long as some wait; 0 = not observed yet.
    compute_s: seconds to compute the first token of a context, and how much longer each further one takes than the one before
        it; None = not observed yet.
    pull_s: seconds until a token's KV has come from another replica; None = not observed yet.
    """

    num_requests: int
    num_ahead: int
    turn_s: float
    compute_s: tuple[float, float] | None
    pull_s: float | None = None


class LoadMeter:
    """Observes in a replica how fast its queue moves: every request that ends lets one begin."""

    def __init__(self) -> None:
        self._last_s = 0.0
        self._last_ended = 0
        self._was_waiting = False
        self._seconds = 0.0
        self._num_ended = 0.0

    def turn_s(self, num_ended: int, num_waiting: int, now: float) -> float:
        """See ReplicaLoad; call it now and then.

        num_ended: requests since the start. now: of a monotonic clock, in seconds.
        """
        passed_s, num_new = now - self._last_s, num_ended - self._last_ended
        if self._was_waiting and num_waiting:  # all the time, about: else a pause would count as slowness
            decay = 0.5 ** (passed_s / HALF_LIFE_S)
            self._seconds = self._seconds * decay + passed_s
            self._num_ended = self._num_ended * decay + num_new
        self._last_s, self._last_ended, self._was_waiting = now, num_ended, num_waiting > 0
        return self._seconds / max(1.0, self._num_ended)

    def load(
        self,
        *,
        num_running: int,
        num_waiting: int,
        num_ended: int,
        max_num_seqs: int,
        compute_s: tuple[float, float] | None,
        pull_s: float | None,
        now: float,
    ) -> ReplicaLoad:
        """What the replica says of itself now; see `turn_s` and ReplicaLoad. max_num_seqs: requests that may run at once."""
        return ReplicaLoad(
            num_requests=num_running + num_waiting,
            num_ahead=num_waiting or min(0, num_running - max_num_seqs),
            turn_s=self.turn_s(num_ended, num_waiting, now),
            compute_s=compute_s,
            pull_s=pull_s,
        )


def num_passed_over(
    order: Sequence[int], loads: Mapping[int, ReplicaLoad], num_fallbacks: int, num_tokens: int, last_rank: int | None
) -> int:
    """How many of a session's choices a request does not go to: 0 = it goes home, however long it waits there.

    It goes elsewhere if it begins earlier there by more than what it costs to have the session's KV there: to bring it, or to
    compute it again.

    order: the ranks, the session's home first. num_fallbacks: how many of the others may be asked.
    num_tokens: of the session, as far as known. last_rank: where its KV was last; None = nowhere.
    """
    home = loads[order[0]]
    compute_s = math.inf
    if home.compute_s is not None:
        first_s, slope_s = home.compute_s
        compute_s = num_tokens * (first_s + slope_s * num_tokens / 2)
    best, best_s = 0, max(0, home.num_ahead) * home.turn_s - MIN_GAIN_S
    for num_passed, rank in enumerate(order[1 : 1 + num_fallbacks], 1):
        load = loads[rank]
        begins_s = max(0, load.num_ahead) * (load.turn_s or home.turn_s)
        if rank != last_rank:
            begins_s += compute_s if load.pull_s is None else min(compute_s, num_tokens * load.pull_s)
        if begins_s < best_s:
            best, best_s = num_passed, begins_s
    return best


class SessionSizes:
    """How long the last `max_sessions` sessions are, in tokens, and which replica answered last."""

    def __init__(self, max_sessions: int = 65536) -> None:
        self._max_sessions = max_sessions
        # By hash: a client may choose names of any length.
        self._sizes: OrderedDict[int, tuple[int, int]] = OrderedDict()

    def note(self, session_id: str, num_tokens: int, rank: int) -> None:
        """A turn has ended there."""
        key = hash(session_id)
        self._sizes[key] = (num_tokens, rank)
        self._sizes.move_to_end(key)
        if len(self._sizes) > self._max_sessions:
            self._sizes.popitem(last=False)

    def find(self, session_id: str) -> tuple[int, int | None]:
        """(tokens, rank) as of its last turn; (0, None) if none is known."""
        return self._sizes.get(hash(session_id), (0, None))


def pass_over(
    session_id: str, order: Sequence[int], loads: dict[int, ReplicaLoad], num_fallbacks: int, sizes: SessionSizes
) -> int:
    """See num_passed_over; and until the next news of the loads, that is where the request was sent."""
    num_passed = num_passed_over(order, loads, num_fallbacks, *sizes.find(session_id))
    load = loads[rank := order[num_passed]]
    loads[rank] = replace(load, num_ahead=load.num_ahead + 1)
    return num_passed
