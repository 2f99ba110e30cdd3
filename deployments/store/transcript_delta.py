"""A transcript as the difference to the transcript of the turn before, and back.

So a conversation of n turns takes room for n turns and not for their sum. Pure functions on values; knows no database.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

from engine.text.transcript import Transcript, common_prefix_len

_EMPTY = Transcript(array("I"), "")
_SliceableT = TypeVar("_SliceableT", "array[int]", str)


@dataclass(frozen=True, slots=True)
class TranscriptDelta:
    """How much of the parent's to keep, and what to add.

    token_ids, anchors: little-endian uint32; an anchor is a number of tokens and a number of characters.
    text: UTF-8 in which a lone surrogate may stand.
    """

    num_kept_tokens: int
    num_kept_chars: int
    num_kept_anchors: int
    token_ids: bytes
    text: bytes
    anchors: bytes


def make_delta(parent: Transcript | None, transcript: Transcript) -> TranscriptDelta:
    """parent: None = keep nothing."""
    parent = parent or _EMPTY
    num_kept_tokens = common_prefix_len(parent.token_ids, transcript.token_ids)
    num_kept_chars = common_prefix_len(parent.text, transcript.text)
    anchors = array("I", chain.from_iterable(transcript.anchors))
    num_kept_anchors = common_prefix_len(array("I", chain.from_iterable(parent.anchors)), anchors) // 2
    return TranscriptDelta(
        num_kept_tokens,
        num_kept_chars,
        num_kept_anchors,
        _to_bytes(transcript.token_ids[num_kept_tokens:]),
        transcript.text[num_kept_chars:].encode("utf-8", "surrogatepass"),
        _to_bytes(anchors[2 * num_kept_anchors :]),
    )


def apply_deltas(deltas: Sequence[TranscriptDelta], fingerprint: str = "") -> Transcript:
    """The transcript at the end of a chain of deltas. Raises ValueError for bytes that are none of ours.

    Linear in what is read: each delta gives only the part that the ones after it kept.

    deltas: the wanted transcript's first, then its parent's, and so on to one that keeps nothing.
    """
    token_ids, anchors = array("I"), array("I")
    for part in _parts((delta.num_kept_tokens, _from_bytes(delta.token_ids)) for delta in deltas):
        token_ids.extend(part)
    for part in _parts((2 * delta.num_kept_anchors, _from_bytes(delta.anchors)) for delta in deltas):
        anchors.extend(part)
    text = "".join(_parts((delta.num_kept_chars, delta.text.decode("utf-8", "surrogatepass")) for delta in deltas))
    return Transcript(token_ids, text, tuple(zip(anchors[::2], anchors[1::2], strict=True)), fingerprint)


def _parts(youngest_first: Iterable[tuple[int, _SliceableT]]) -> list[_SliceableT]:
    parts: list[_SliceableT] = []
    end: int | None = None  # where the younger ones begin; None = nothing younger, take all
    for num_kept, added in youngest_first:
        if end is None or num_kept < end:
            parts.append(added if end is None else added[: end - num_kept])
            end = num_kept
    return parts[::-1]


def _to_bytes(values: array[int]) -> bytes:
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()


def _from_bytes(data: bytes) -> array[int]:
    values = array("I")
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values
