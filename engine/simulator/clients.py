"""Clients: each sends a turn of its session, waits for the answer, pauses, and sends the next one."""

from __future__ import annotations

from functools import lru_cache
from itertools import repeat

from engine.core.engine_core import RequestOutput
from engine.core.request import Request, SamplingParams
from engine.core.reuse import NO_REUSE, Reuse, tool_class
from engine.simulator.outcome import TurnRow
from engine.simulator.replica import Replica
from engine.workloads.session import Session, Turn
from engine.workloads.tokens import TokenContext, repeated_tokens

# Streams of answers lie above those of workloads; a token is the number of its stream.
FIRST_ANSWER_STREAM = 1 << 31
NUM_ANSWER_STREAMS = (1 << 32) - FIRST_ANSWER_STREAM
NO_CONTEXT = TokenContext(repeated_tokens)


@lru_cache(maxsize=4096)
def _sampling(max_tokens: int) -> SamplingParams:
    """One for all requests of that length: making one takes long, with its checks."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens)


@lru_cache(maxsize=4096)
def _reuse_before(tool: str) -> Reuse:
    """What a server sees of an answer that calls a tool: which one."""
    return Reuse(tool_class(tool))


class Client:
    """One session under way.

    Between its turns it has no context: that is made again from the session, because a token takes eight bytes.

    number: of the turn that is next or under way.
    answer_token: what its answers consist of, unless the turn has a recorded one.
    sent_s: when that turn was sent, at first. first_token_s: of what was lost with a replica; None = nothing was.
    num_retries: how often all replicas were full. ingress: through which the turn came in.
    last_rank: the replica that answered last; None = none has. is_asked: that turn has been sent.
    num_known: of the prompt, tokens that were in the context before. num_seen: those that any session is known to have had.
    """

    __slots__ = (
        "_context",
        "_keys",
        "answer_token",
        "first_token_s",
        "ingress",
        "is_asked",
        "last_rank",
        "num_known",
        "num_retries",
        "num_seen",
        "number",
        "sent_s",
        "session",
    )

    def __init__(self, session: Session, index: int) -> None:
        """index: counts up over all sessions."""
        self.session = session
        self.answer_token = FIRST_ANSWER_STREAM + index % NUM_ANSWER_STREAMS
        self.number = 0
        self.sent_s = 0.0
        self.first_token_s: float | None = None
        self.num_retries = 0
        self.num_known = self.num_seen = 0
        self.ingress = 0
        self.last_rank: int | None = None
        self.is_asked = False
        self._context = NO_CONTEXT
        self._keys: list[bytes] = []

    @property
    def turn(self) -> Turn:
        return self.session.turns[self.number]

    @property
    def following(self) -> Turn | None:
        """The turn after that one; None if there is none."""
        turns = self.session.turns
        return turns[self.number + 1] if self.number + 1 < len(turns) else None

    @property
    def token(self) -> int:
        """What each step of the answer samples."""
        return self._token(self.turn)

    def _token(self, turn: Turn) -> int:
        return self.answer_token if turn.answer_stream is None else turn.answer_stream

    @property
    def _reuse(self) -> Reuse:
        """What can be told from the answer about the next turn."""
        following = self.session.turns[self.number + 1 : self.number + 2]
        return _reuse_before(following[0].tool) if following and following[0].kind == "tool" else NO_REUSE

    def ask(self, now: float) -> None:
        """The next turn is sent."""
        self.sent_s, self.first_token_s, self.num_retries = now, None, 0
        context = self._context = TokenContext(repeated_tokens)
        for turn in self.session.turns[: self.number]:
            context.ask(turn)
            context.add_answer(repeat(self._token(turn), turn.output_tokens))
        num_kept, keep_tokens = len(context.token_ids), self.turn.keep_tokens
        self.num_known = self.num_seen = num_kept if keep_tokens is None else min(num_kept, keep_tokens)
        self.is_asked = True
        context.ask(self.turn)

    def request(self, chunk_size: int, output_token_ids: list[int] | None = None) -> Request:
        """A request for the turn that was sent.

        output_token_ids: the beginning of the answer, if it was lost with its replica.
        """
        session = self.session
        # The last token of an answer is never computed, but it is known: keys of full chunks hold for the whole history.
        return Request(
            f"{session.session_id}.{self.number}",
            self._context.token_ids,
            _sampling(self.turn.output_tokens),
            conversation_id=session.session_id,
            tenant=session.tenant,
            output_token_ids=output_token_ids or (),
            chunk_keys=self._keys[: self.num_known // chunk_size],
            reuse=self._reuse,
        )

    def end_turn(self, request: Request) -> bool:
        """The answer is complete. Returns whether a further turn follows."""
        self._context, self._keys = NO_CONTEXT, request.chunk_keys
        return self.go_on()

    def go_on(self) -> bool:
        """The turn is over. Returns whether a further one follows."""
        self.number += 1
        self.is_asked = False
        return self.number < len(self.session.turns)


def turn_row(client: Client, replica: Replica, output: RequestOutput, now: float) -> TurnRow:
    """The account of a turn that has ended, before the client goes on."""
    stats = output.stats
    assert stats is not None
    assert stats.first_token_s is not None
    return TurnRow(
        client.answer_token,
        client.number,
        int(client.turn.kind == "tool"),
        int(client.last_rank not in (None, replica.rank)),
        replica.rank,
        client.sent_s,
        stats.first_token_s if client.first_token_s is None else client.first_token_s,
        now,
        stats.num_prompt_tokens,
        client.num_seen,
        stats.num_cached_tokens,
        stats.num_loaded_tokens,
        stats.num_not_loaded_tokens,
        stats.num_dropped_tokens,
        stats.num_new_tokens,
        stats.num_output_tokens,
        stats.num_suspensions,
        client.num_retries,
        *replica.take_recomputed(output.request_id),
    )
