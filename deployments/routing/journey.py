"""The way of one request to replicas and back, measured by who sends it. Time is an argument; knows no Ray."""

from __future__ import annotations

from dataclasses import replace

from deployments.generation import DeltaItem, ErrorItem, GenerationRequest
from engine.explanation import Explanation, Loss, Route

MAX_LOSSES = 32  # that are told of one request


class Journey:
    """Notes when replicas were asked, lost and heard of; times are in seconds of a monotonic clock."""

    def __init__(self, request: GenerationRequest, now: float, unix_now: float) -> None:
        """unix_now: the same moment as Unix time."""
        self._is_streamed = request.stream
        self._begun_s = self._asked_s = now
        self._unix_offset_s = unix_now - now
        self._first_s: float | None = None
        self._losses: list[Loss] = []

    def ask(self, now: float) -> None:
        """A replica is asked, perhaps not the first one."""
        self._asked_s, self._first_s = now, None

    def lose(self, error: ErrorItem, num_output_tokens: int, now: float) -> None:
        """The replica did not complete the answer, of which so many tokens have come."""
        if len(self._losses) < MAX_LOSSES:
            at_s = now + self._unix_offset_s
            self._losses.append(Loss(at_s=at_s, kind=error.kind, num_output_tokens=num_output_tokens))

    def note(self, item: DeltaItem, is_home: bool | None, now: float) -> DeltaItem:
        """An item of the answer; if it explains the answer, the same with the way.

        is_home: whether the replica is the home of the session; None = not known.
        """
        if self._first_s is None:
            self._first_s = now
        explanation = item.delta.explanation
        if explanation is None:
            return item
        route = Route(
            begun_s=self._begun_s + self._unix_offset_s,
            replica_rank=item.replica_rank,
            is_home=is_home,
            seconds=max(0.0, self._first_s - self._asked_s - self._replica_s(explanation)),
            lost_s=self._asked_s - self._begun_s,
            losses=tuple(self._losses),
        )
        return replace(item, delta=replace(item.delta, explanation=replace(explanation, route=route)))

    def _replica_s(self, explanation: Explanation) -> float:
        """What the replica's own work took until it said anything."""
        stats = explanation.stats
        end_s = stats.finished_s if not self._is_streamed or stats.first_token_s is None else stats.first_token_s
        return explanation.prepare_s + end_s - stats.arrival_s
