"""A way for bytes: between a slow tier and the CPU tier, or out of and into a replica. What is on it goes in order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Link:
    """Bandwidth, latency and queue of one direction.

    bytes_per_s, latency_s: of the link; the latency of one transfer overlaps with the bytes of others.
    free_at_s: when the last byte that is queued will have gone.
    """

    bytes_per_s: float
    latency_s: float = 0.0
    free_at_s: float = 0.0

    def send(self, num_bytes: float, now: float) -> float:
        """Queue so many bytes; returns when they are there."""
        self.free_at_s = max(self.free_at_s, now) + num_bytes / self.bytes_per_s
        return self.free_at_s + self.latency_s

    def receive(self, num_bytes: float, begins_s: float, ends_s: float) -> float:
        """Take in what comes through another link, its first byte and its last one then; returns when it is there.

        The bytes go through both links at once: two of the same bandwidth take no longer than one of them.
        """
        self.free_at_s = max(max(self.free_at_s, begins_s) + num_bytes / self.bytes_per_s, ends_s)
        return self.free_at_s + self.latency_s
