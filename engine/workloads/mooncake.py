"""Mooncake's traces: one request a line, with a number for each block of 512 tokens; equal numbers are equal prefixes.

The trace does not say which requests are one conversation, so that is guessed: a request goes on from the last one whose last
whole block it begins with, if no other conversation had that block before. `session_id` and `delay`, which aiperf and our own
recordings write, are taken if they are there.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.workloads.records import MAX_TOKENS, Record, read_jsonl
from engine.workloads.session import Session, Span, Turn

BLOCK_TOKENS = 512
_MAX_HASH = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace.

    hash_ids: of its blocks, the last one possibly partial. session_id: empty = unknown.
    delay_s: from the answer before; None = unknown.
    """

    time_s: float
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...]
    session_id: str = ""
    delay_s: float | None = None


def read_rows(path: Path, block_tokens: int = BLOCK_TOKENS) -> Iterator[Row]:
    """In the order of the file. Raises WorkloadError."""
    time_s = 0.0
    for record in read_jsonl(path):
        row = _row(record, time_s, block_tokens)
        time_s = row.time_s
        yield row


def read_mooncake(
    path: Path, *, guess_sessions: bool = True, block_tokens: int = BLOCK_TOKENS, s_per_token: float = 0.0
) -> Iterator[Session]:
    """Sessions by the time of their first request, from that of the first one on.

    guess_sessions: else each request without a session_id is a session of its own.
    s_per_token: how fast answers came, which the trace does not tell. A pause is the time between two requests less that of
        the answer between them: all of it if this is 0.
    """
    threads: dict[str, _Thread] = {}
    guesses = _Guesses() if guess_sessions else None
    streams: dict[int, int] = {}
    rows = sorted(read_rows(path, block_tokens), key=lambda row: row.time_s)  # a recording has them as they ended
    for number, read in enumerate(rows):
        hash_ids = tuple(streams.setdefault(block, len(streams)) for block in read.hash_ids)
        row = replace(read, hash_ids=hash_ids, time_s=read.time_s - rows[0].time_s)
        name = row.session_id or (guesses.session_of(row) if guesses else "") or f"session-{number}"
        if guesses:
            guesses.remember(row, name)
        threads.setdefault(name, _Thread()).add(row, block_tokens, s_per_token)
    for name, thread in threads.items():  # in the order of their first requests
        yield Session(name, tuple(thread.turns), thread.start_s)


@dataclass(slots=True)
class _Thread:
    """The requests of one session so far."""

    turns: list[Turn] = field(default_factory=list)
    start_s: float = 0.0
    last: Row | None = None

    def add(self, row: Row, block_tokens: int, s_per_token: float) -> None:
        pause_s, keep_tokens, num_kept = 0.0, None, 0
        if self.last is None:
            self.start_s = row.time_s
        else:
            pause_s = row.delay_s if row.delay_s is not None else row.time_s - self.last.time_s
            if row.delay_s is None:
                pause_s = max(0.0, pause_s - self.last.output_len * s_per_token)
            num_kept = _num_equal(self.last.hash_ids, row.hash_ids)
            # A block of the last prompt that was full, or one that ends this prompt just as the last one.
            keep_tokens = min(num_kept * block_tokens, self.last.input_len, row.input_len)
        spans = _spans(row, num_kept, keep_tokens or 0, block_tokens)
        self.turns.append(Turn(spans, row.output_len, pause_s, keep_tokens=keep_tokens))
        self.last = row


class _Guesses:
    """Which session a request goes on with.

    _ends: session by the last whole block of its last request. _owners: the session that brought each block.
    """

    def __init__(self) -> None:
        self._ends: dict[int, str] = {}
        self._owners: dict[int, str] = {}

    def session_of(self, row: Row) -> str:
        """Empty if it begins one."""
        for block in reversed(row.hash_ids):
            if block in self._ends:
                return self._ends[block]
        return ""

    def remember(self, row: Row, session_id: str) -> None:
        for block in row.hash_ids:
            self._owners.setdefault(block, session_id)
        for block in row.hash_ids[:-1]:
            if self._ends.get(block) == session_id:
                del self._ends[block]
        whole = row.hash_ids[:-1]
        if whole and self._owners[whole[-1]] == session_id:
            self._ends[whole[-1]] = session_id


class BlockNumbers:
    """Numbers blocks by what they and all before them hold, as a trace does. Needs no tokens: spans tell what is equal."""

    def __init__(self, block_tokens: int = BLOCK_TOKENS) -> None:
        self._block_tokens = block_tokens
        self._numbers: dict[tuple[int, tuple[_Piece, ...]], int] = {}

    def of_session(self, session: Session) -> Iterator[tuple[int, ...]]:
        """The blocks of each turn's prompt."""
        context: list[_Piece] = []
        for number, turn in enumerate(session.turns):
            if turn.keep_tokens is not None:
                context = _first(context, turn.keep_tokens)
            for span in turn.new:
                _append(context, (span.stream, span.start, span.num_tokens))
            yield self._of_pieces(context)
            own = (session.session_id, number)
            _append(context, (own if turn.answer_stream is None else turn.answer_stream, 0, turn.output_tokens))

    def _of_pieces(self, pieces: list[_Piece]) -> tuple[int, ...]:
        blocks: list[int] = []
        block: list[_Piece] = []
        num_free = self._block_tokens
        for stream, start, num_tokens in pieces:
            while num_tokens:
                taken = min(num_free, num_tokens)
                block.append((stream, start, taken))
                start, num_tokens, num_free = start + taken, num_tokens - taken, num_free - taken
                if not num_free:
                    blocks.append(self._number(blocks, block))
                    block, num_free = [], self._block_tokens
        if block:
            blocks.append(self._number(blocks, block))
        return tuple(blocks)

    def _number(self, before: list[int], block: list[_Piece]) -> int:
        return self._numbers.setdefault((before[-1] if before else -1, tuple(block)), len(self._numbers))


# Tokens of a context: the stream, the first one, how many.
_Piece = tuple[Hashable, int, int]


def _append(context: list[_Piece], piece: _Piece) -> None:
    """Pieces that continue each other are one, so that equal tokens are equal pieces."""
    stream, start, num_tokens = piece
    if context and context[-1][0] == stream and context[-1][1] + context[-1][2] == start:
        context[-1] = (stream, context[-1][1], context[-1][2] + num_tokens)
    elif num_tokens:
        context.append(piece)


def _first(context: list[_Piece], num_tokens: int) -> list[_Piece]:
    kept: list[_Piece] = []
    for stream, start, num in context:
        if num_tokens <= 0:
            break
        kept.append((stream, start, min(num, num_tokens)))
        num_tokens -= num
    return kept


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """As Mooncake writes them, with aiperf's `session_id` and `delay` if they are known."""
    with path.open("w") as file:
        file.writelines(format_row(row) + "\n" for row in rows)


def format_row(row: Row) -> str:
    fields: dict[str, Any] = {
        "timestamp": round(row.time_s * 1e3),
        "input_length": row.input_len,
        "output_length": row.output_len,
        "hash_ids": list(row.hash_ids),
    }
    if row.session_id:
        fields["session_id"] = row.session_id
    if row.delay_s is not None:
        fields["delay"] = round(row.delay_s * 1e3)
    return json.dumps(fields)


def _row(record: Record, default_s: float, block_tokens: int) -> Row:
    input_len = record.integer("input_length", 1)
    hash_ids = record.items("hash_ids")
    for block in hash_ids:
        if not isinstance(block, int) or isinstance(block, bool) or not 0 <= block <= _MAX_HASH:
            record.fail(f"'hash_ids' must be whole numbers from 0 to {_MAX_HASH}, got {str(block)[:40]}")
    wanted = -(-input_len // block_tokens)
    if len(hash_ids) != wanted:
        record.fail(
            f"{input_len} tokens are {wanted} blocks of {block_tokens}, but 'hash_ids' has {len(hash_ids)}; "
            "if this trace has blocks of another size, give it (block_tokens)"
        )
    return Row(
        record.seconds("timestamp", scale=1e-3) if record.has("timestamp") else default_s,
        input_len,
        record.integer("output_length", 1, MAX_TOKENS),
        tuple(hash_ids),
        record.text("session_id", ""),
        record.seconds("delay", scale=1e-3) if record.has("delay") else None,
    )


def _num_equal(before: tuple[int, ...], after: tuple[int, ...]) -> int:
    """Blocks that two prompts begin with alike."""
    for number, (a, b) in enumerate(zip(before, after, strict=False)):
        if a != b:
            return number
    return min(len(before), len(after))


def _spans(row: Row, num_kept: int, keep_tokens: int, block_tokens: int) -> tuple[Span, ...]:
    """The blocks behind those that are kept; of the last one as much as the prompt has."""
    spans = []
    begin = keep_tokens
    for number in range(max(0, num_kept - 1) if keep_tokens < num_kept * block_tokens else num_kept, len(row.hash_ids)):
        end = min((number + 1) * block_tokens, row.input_len)
        if end > begin:
            spans.append(Span(row.hash_ids[number], end - begin, begin - number * block_tokens))
            begin = end
    return tuple(spans)
