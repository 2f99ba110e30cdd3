"""How long conversations pause, learned by tenant and by the tool that they wait for. Standard library only."""

from __future__ import annotations

from collections import OrderedDict, deque
from statistics import median

# Of each tenant and tool, the latest pauses; and as many of both as are remembered.
NUM_SAMPLES, MIN_SAMPLES = 32, 4
MAX_TOOLS = 1024
# Conversations whose next turn is awaited. One that has not come for so long, in seconds, counts as a pause of that length.
MAX_AWAITED = 1 << 14
MAX_PAUSE_S = 3600.0


class Pauses:
    """The pauses between the end of a turn and the next turn of its conversation.

    Only one thread may use it. Memory is bounded, whatever names clients give to tools.
    """

    def __init__(self) -> None:
        self._awaited: OrderedDict[str, tuple[str, str, float]] = OrderedDict()
        self._samples: OrderedDict[tuple[str, str], deque[float]] = OrderedDict()

    def note_end(self, conversation_id: str, tenant: str, tool: str, now: float) -> float | None:
        """A turn has ended with a call of that tool; "" = with an answer to a person.

        Returns in how many seconds the next one is expected; None if that is not known.
        """
        self._awaited.pop(conversation_id, None)
        self._awaited[conversation_id] = tenant, tool, now
        while self._awaited:
            oldest, (_, _, ended_s) = next(iter(self._awaited.items()))
            if now - ended_s < MAX_PAUSE_S and len(self._awaited) <= MAX_AWAITED:
                break
            self._end_pause(oldest, ended_s + MAX_PAUSE_S)
        return self.expected_s(tenant, tool)

    def expected_s(self, tenant: str, tool: str) -> float | None:
        """How long a pause behind a call of that tool is expected to be; None if that is not known."""
        samples = self._samples.get((tenant, tool), ())
        return median(samples) if len(samples) >= MIN_SAMPLES else None

    def note_return(self, conversation_id: str, now: float) -> None:
        """The conversation's next turn has come."""
        if conversation_id in self._awaited:
            self._end_pause(conversation_id, now)

    def _end_pause(self, conversation_id: str, now: float) -> None:
        tenant, tool, ended_s = self._awaited.pop(conversation_id)
        samples = self._samples.setdefault((tenant, tool), deque(maxlen=NUM_SAMPLES))
        samples.append(now - ended_s)
        self._samples.move_to_end((tenant, tool))
        if len(self._samples) > MAX_TOOLS:
            self._samples.popitem(last=False)
