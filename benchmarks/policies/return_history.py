"""How soon chunks come back, learned from what they did: by class of chunk and idle time.

For policies that weigh what it costs to compute a chunk by how likely it is used again. Learns from a sample of the chunks
that requests leave, wherever they lie and whether they are dropped meanwhile, because it goes by their names. Deterministic;
its memory does not grow.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from operator import mul

from engine.core.cache.index import Chunk
from engine.core.request import Request
from engine.core.reuse import NO_REUSE, NUM_TOOL_CLASSES, Reuse

# Idle times are told apart by these bounds, in seconds: 0, 1, then each by a quarter of an octave, to some nine hours. What
# is counted, is counted by half octaves.
EDGES = (0.0, *(2.0 ** (quarter / 4) for quarter in range(61)))
_COARSE_EDGES = (0.0, *EDGES[1::2])
_NUM_COARSE = len(_COARSE_EDGES)
_WIDTHS = tuple(high - low for low, high in pairwise((*EDGES, 2 * EDGES[-1])))
_COARSE_WIDTHS = tuple(high - low for low, high in pairwise((*_COARSE_EDGES, 2 * _COARSE_EDGES[-1])))
# Chunks that are waited for, at most; the oldest counts as not seen since.
MAX_SAMPLES = 4096
# How often what was learned is brought to use, and how fast it fades, in seconds.
REFRESH_S, HALF_LIFE_S = 20.0, 7200.0
# How many returns it takes to outweigh what is known before: of all chunks, of a class, of a bucket of it.
PRIOR_RETURNS = 4.0
# The prior: the chance to return in the next moment is this, over the idle time, as retention value takes it.
PRIOR_EXPONENT = 0.5

# Classes of chunks: by the tool that is called; by the turns that the conversation has had, apart for what its last turn
# added; and of chunks that several conversations use, by how many these are.
_TURN_BOUNDS = (2, 3, 4, 5, 8)
_USER_BOUNDS = (2, 4, 16)
_FIRST_TURN_CLASS = NUM_TOOL_CLASSES
_NUM_TURN_CLASSES = len(_TURN_BOUNDS) + 1
_FIRST_SHARED_CLASS = _FIRST_TURN_CLASS + 2 * _NUM_TURN_CLASSES
NUM_CLASSES = _FIRST_SHARED_CLASS + len(_USER_BOUNDS)


def class_of(chunk: Chunk) -> int:
    """The class of a chunk, as long as it is idle."""
    if chunk.num_users > 1:
        return _FIRST_SHARED_CLASS - 1 + bisect_right(_USER_BOUNDS, chunk.num_users)
    stamped = chunk.reuse.reuse_class
    if stamped < _FIRST_TURN_CLASS:
        return stamped
    return min(stamped, _FIRST_TURN_CLASS + _NUM_TURN_CLASSES - 1) + (_NUM_TURN_CLASSES if chunk.num_uses == 1 else 0)


def bucket_of(idle_s: float) -> int:
    """Which bucket of EDGES an idle time is in."""
    return bisect_right(EDGES, idle_s) - 1 if idle_s > 0 else 0


class ReturnHistory:
    """What is known of all tiers' chunks together.

    rates: by class and bucket of idle time (see EDGES), the return that a chunk is good for: the largest, over all times to
        come, of the chance that it is used until then over the time that it is kept for that, per second (Gittins' index).
    version: counts how often they have changed.
    """

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.version = 0
        self._samples: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        self._counts = [_Counts() for _ in range(NUM_CLASSES)]
        self._stamps: dict[int, Reuse] = {}
        self._refreshed_s = -math.inf
        self._random = 1
        self._refresh(0.0)

    # -- what requests do ----------------------------------------------------------------------------------------------

    def stamp(self, request: Request) -> Reuse:
        """What the request says of the next use, with its class: of a user's turn, how many there were."""
        reuse = request.reuse
        if 0 < reuse.reuse_class < _FIRST_TURN_CLASS:
            return reuse
        conversation_id = request.conversation_id
        num_turns = 1 + max(
            (
                chunk.num_uses
                for chunk in request.chunks
                if chunk.num_users == 1 and chunk.last_user_id == conversation_id
            ),
            default=0,
        )
        number = _FIRST_TURN_CLASS + bisect_right(_TURN_BOUNDS, num_turns)
        if reuse != NO_REUSE:
            return replace(reuse, reuse_class=number)
        if number not in self._stamps:
            self._stamps[number] = Reuse(number)
        return self._stamps[number]

    def note_end(self, request: Request, now: float) -> None:
        """A request leaves its chunks: wait for a full one of each class.

        A partial one has another name when it returns.
        """
        chosen: dict[int, tuple[int, bytes]] = {}
        state = self._random
        for chunk, key in zip(request.chunks, request.chunk_keys, strict=False):
            if chunk.key != key:
                continue
            number = class_of(chunk)
            count = chosen[number][0] + 1 if number in chosen else 1
            state = (state * 1103515245 + 12345) & 0x7FFFFFFF
            if count == 1 or (state >> 8) % count == 0:
                chosen[number] = count, key
            else:
                chosen[number] = count, chosen[number][1]
        self._random = state
        samples = self._samples
        for number, (_, key) in chosen.items():
            samples.pop(key, None)  # it was never idle between two requests that used it at once
            samples[key] = number, now
        while len(samples) > MAX_SAMPLES:
            _, (number, since_s) = samples.popitem(last=False)
            self._counts[number].add(now - since_s, has_returned=False)

    def note_start(self, request: Request, now: float) -> None:
        """A request's context is used, whatever of it is still here."""
        pop = self._samples.pop
        for key in request.chunk_keys:
            sample = pop(key, None)
            if sample is not None:
                self._counts[sample[0]].add(now - sample[1], has_returned=True)
        if now - self._refreshed_s >= REFRESH_S:
            self._refresh(now)

    # -- what is learned -----------------------------------------------------------------------------------------------

    def _refresh(self, now: float) -> None:
        if self._refreshed_s > -math.inf:
            fading = 0.5 ** ((now - self._refreshed_s) / HALF_LIFE_S)
            for counts in self._counts:
                counts.fade(fading)
        self._refreshed_s = now
        present = [counts.copy() for counts in self._counts]
        for number, since_s in self._samples.values():
            present[number].add(now - since_s, has_returned=False)
        total = _Counts()
        for counts in present:
            total.add_all(counts)
        prior = [
            PRIOR_EXPONENT * math.log(max(high, 1.0) / max(low, 0.25)) / (high - low)
            for low, high in pairwise((*_COARSE_EDGES, 2 * _COARSE_EDGES[-1]))
        ]
        common = total.hazards(prior)
        self.rates = [rates_of_return(refined(counts.hazards(common))) for counts in present]
        self.version += 1


class _Counts:
    """Chunks of one class by the bucket in which their waiting ended: how many, how long in it, and how many returned."""

    __slots__ = ("ended", "returned", "seconds")

    def __init__(self) -> None:
        self.ended = [0.0] * _NUM_COARSE
        self.returned = [0.0] * _NUM_COARSE
        self.seconds = [0.0] * _NUM_COARSE

    def add(self, idle_s: float, *, has_returned: bool) -> None:
        bucket = bisect_right(_COARSE_EDGES, idle_s) - 1
        self.ended[bucket] += 1.0
        self.returned[bucket] += has_returned
        self.seconds[bucket] += idle_s - _COARSE_EDGES[bucket]

    def fade(self, factor: float) -> None:
        for column in (self.ended, self.returned, self.seconds):
            column[:] = [value * factor for value in column]

    def copy(self) -> _Counts:
        other = _Counts()
        other.add_all(self)
        return other

    def add_all(self, other: _Counts) -> None:
        self.ended = [a + b for a, b in zip(self.ended, other.ended, strict=True)]
        self.returned = [a + b for a, b in zip(self.returned, other.returned, strict=True)]
        self.seconds = [a + b for a, b in zip(self.seconds, other.seconds, strict=True)]

    def hazards(self, prior: Sequence[float]) -> list[float]:
        """By bucket, the chance to return in a second of it, for those that come so far: returns over time spent waiting.

        Shrunk to the prior, times how much more or less often these chunks return than by it.
        """
        waited_s, num_longer = [0.0] * _NUM_COARSE, 0.0
        for bucket in reversed(range(_NUM_COARSE)):
            waited_s[bucket] = num_longer * _COARSE_WIDTHS[bucket] + self.seconds[bucket]
            num_longer += self.ended[bucket]
        num_expected = sum(map(mul, waited_s, prior))
        factor = (sum(self.returned) + PRIOR_RETURNS) / (num_expected + PRIOR_RETURNS)
        return [
            (returned + PRIOR_RETURNS) / (seconds + PRIOR_RETURNS / (factor * hazard))
            for returned, seconds, hazard in zip(self.returned, waited_s, prior, strict=True)
        ]


def refined(hazards: Sequence[float]) -> list[float]:
    """From half octaves to quarters: between the middles of two half octaves along a power of the time."""
    fine = [hazards[0]]
    for before, hazard, after in zip(
        (hazards[1], *hazards[1:]), hazards[1:], (*hazards[2:], hazards[-1]), strict=False
    ):
        fine += [hazard * (before / hazard) ** 0.25, hazard * (after / hazard) ** 0.25]
    return fine[: len(EDGES)]


def rates_of_return(hazards: Sequence[float]) -> list[float]:
    """Gittins' index by bucket: the best, over all times to come, of the chance of a return over the time waited.

    From the last bucket to the first: the best time to give up is at the end of a bucket, and a bucket joins those before it
    while its own best is better than theirs.
    """
    rates = [0.0] * len(hazards)
    # Runs of buckets, the first one last: (chance of a return, expected seconds, chance to outlast it), given its beginning.
    runs: list[tuple[float, float, float]] = []
    for bucket in reversed(range(len(hazards))):
        hazard, width = hazards[bucket], _WIDTHS[bucket]
        chance = -math.expm1(-hazard * width)
        seconds = chance / hazard if hazard > 0 else width
        outlasts = 1.0 - chance
        while runs and runs[-1][0] * seconds > chance * runs[-1][1]:
            next_chance, next_seconds, next_outlasts = runs.pop()
            chance, seconds = chance + outlasts * next_chance, seconds + outlasts * next_seconds
            outlasts *= next_outlasts
        runs.append((chance, seconds, outlasts))
        rates[bucket] = chance / seconds
    return rates
