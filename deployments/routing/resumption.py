"""How a request outlives the replicas that compute it.

What of its answer has come, and when another replica is to go on from there. Decides only; time is an argument. Knows
no Ray.
"""

from __future__ import annotations

from dataclasses import replace

from deployments.errors import ReplicaLostError
from deployments.generation import DeltaItem, ErrorItem, GenerationRequest
from engine.errors import EngineStoppedError, OverloadedError
from engine.text.prompt import AnswerBeginning
from engine.text.transcript import Transcript

# Replicas in a row that a request may lose without getting a token: it may be what kills them.
MAX_LOSSES_IN_A_ROW = 5
# The pauses between them are 0, 1, 3, 7 and 15 times this, in seconds.
RESUME_BACKOFF_S = 0.5
# How long a request whose replica was lost goes on asking replicas that are full, in seconds: they are full of others that
# were lost with it.
RESUME_PATIENCE_S = 60.0


class Progress:
    """What of an answer has come, so that another replica can go on from there."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self.token_ids: list[int] = []
        self._history = request.history
        self._prompt: Transcript | None = None
        self._model = ""
        self.is_finished = False
        self._num_chars = 0
        self._num_attempts = 0

    def note(self, item: DeltaItem) -> DeltaItem:
        """Takes in an item on its way to the client, and makes it what the client expects next."""
        if item.delta.prompt_transcript is not None:
            self._history = self._prompt = item.delta.prompt_transcript
            item = replace(item, delta=replace(item.delta, prompt_transcript=None))
        if self.token_ids and item.delta.prompt_token_ids:  # they came with the first one
            item = replace(item, delta=replace(item.delta, prompt_token_ids=()))
        self._model = item.model
        self.token_ids += item.delta.token_ids
        self._num_chars += len(item.delta.text)
        self.is_finished = item.delta.finish_reason is not None
        return item

    def rest_of_request(self) -> GenerationRequest:
        """What the next replica is asked: the request, and from the second time on, where to go on."""
        self._num_attempts += 1
        if self._num_attempts == 1:
            return self._request
        # Another id: the first replica may be alive and not know yet that its answer is no longer read.
        request_id = f"{self._request.request_id}-{self._num_attempts}"
        beginning = AnswerBeginning(tuple(self.token_ids), self._num_chars, self._prompt) if self.token_ids else None
        begun_by = self._model if self.token_ids else ""
        sampling = self._request.sampling
        if self.token_ids:  # what is told of the prompt came with the first one
            sampling = replace(sampling, prompt_logprobs=None)
        return replace(
            self._request,
            request_id=request_id,
            sampling=sampling,
            return_prompt_text=self._request.return_prompt_text and not self.token_ids,
            history=self._history,
            beginning=beginning,
            begun_by=begun_by,
        )


class Retries:
    """Whether a request that met an error is tried again, and when.

    full       the next choice of the session, up to `num_fallback_replicas`; after a loss, all of them again for a while
    lost       another replica, after growing pauses, as long as each one gives a token now and then
    """

    def __init__(self, num_fallback_replicas: int) -> None:
        self._num_fallback_replicas = num_fallback_replicas
        self._num_losses = 0
        self._patient_until_s = 0.0
        self.num_refusals = 0  # choices of the session to pass over
        self.is_lost = False  # whether the last error was the loss of a replica

    def note_delta(self) -> None:
        """A token came: the request kills nothing."""
        self._num_losses = 0

    def pause_s(self, error: ErrorItem, now: float) -> float | None:
        """How long to wait before the next attempt, in seconds; None if the error is the answer.

        now: of a monotonic clock, in seconds.
        """
        self.is_lost = error.is_a(ReplicaLostError) or error.is_a(EngineStoppedError)
        if self.is_lost:
            self._num_losses += 1
            self._patient_until_s = now + RESUME_PATIENCE_S
            if self._num_losses > MAX_LOSSES_IN_A_ROW:
                return None
            # Routers and health checks need a moment to see what is dead.
            return RESUME_BACKOFF_S * ((1 << (self._num_losses - 1)) - 1)
        if not error.is_a(OverloadedError):
            return None
        if self.num_refusals < self._num_fallback_replicas:
            self.num_refusals += 1
            return 0.0
        if now < self._patient_until_s:
            self.num_refusals = 0  # the home first again
            return 2 * RESUME_BACKOFF_S
        return None
