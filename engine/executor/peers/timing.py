"""What bounds the transport between peers in time: a rate, back-offs, and deadlines. Knows no socket."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable
from itertools import count

logger = logging.getLogger(__name__)

# So much may be moved at once after a pause, in seconds of the rate.
BURST_S = 0.05
FIRST_BACK_OFF_S = 1.0
LONGEST_BACK_OFF_S = 30.0


class Rate:
    """A bound of the bytes per second that all threads together move."""

    def __init__(self, bytes_per_s: float) -> None:
        """bytes_per_s: 0 = no bound."""
        self.bytes_per_s = bytes_per_s
        self._free_at_s = 0.0
        self._mutex = threading.Lock()

    def reserve(self, num_bytes: int, now: float) -> float:
        """How long to wait before so many bytes are moved, in seconds; they count from now on."""
        if not self.bytes_per_s:
            return 0.0
        with self._mutex:
            start_s = max(self._free_at_s, now - BURST_S)
            self._free_at_s = start_s + num_bytes / self.bytes_per_s
        return max(0.0, start_s - now)

    def wait(self, num_bytes: int, stop: threading.Event) -> None:
        """Return when so many bytes may be moved, or `stop` is set."""
        delay_s = self.reserve(num_bytes, time.monotonic())
        if delay_s:
            stop.wait(delay_s)


class BackOff:
    """How long a peer that failed is left alone: twice as long after each further failure."""

    def __init__(self) -> None:
        self.num_failures = 0  # in a row
        self._until_s = 0.0

    def is_over(self, now: float) -> bool:
        return now >= self._until_s

    def fail(self, now: float) -> None:
        """Failures of what was under way when it failed before do not count."""
        if self.is_over(now):
            self.num_failures += 1
            self._until_s = now + min(LONGEST_BACK_OFF_S, FIRST_BACK_OFF_S * 2 ** min(10, self.num_failures - 1))

    def end(self) -> None:
        """It does well again."""
        self.num_failures, self._until_s = 0, 0.0


class Deadlines:
    """One thread that calls functions when their time has come."""

    def __init__(self, name: str) -> None:
        """Starts no thread before the first deadline."""
        self._name = name
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def call_after(self, delay_s: float, function: Callable[[], None]) -> None:
        """function: has to return at once. Not called after `close`."""
        with self._changed:
            heapq.heappush(self._heap, (time.monotonic() + delay_s, next(self._numbers), function))
            if self._thread is None and not self._is_closing:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, timeout_s: float) -> bool:
        """End the thread. Returns whether it has ended."""
        with self._changed:
            self._is_closing = True
            self._heap.clear()
            self._changed.notify()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._is_closing and (delay_s := self._delay_s()) != 0.0:
                    self._changed.wait(delay_s)
                if self._is_closing:
                    return
                _, _, function = heapq.heappop(self._heap)
            try:
                function()
            except Exception:
                logger.exception("what was due failed")

    def _delay_s(self) -> float | None:
        """Until the next one is due; None if there is none."""
        return max(0.0, self._heap[0][0] - time.monotonic()) if self._heap else None
