"""What the future of a workload holds: when a chunk is used next. For bounds on what eviction policies can reach.

Sessions are known as a whole, with the tokens of all answers; so all chunks that any prompt will have are known by name.
When a turn is sent is known exactly as soon as the answer before it has ended; a turn behind that one, or behind one under
way, is foreseen as if answers took no time: too early, never too late.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate

from engine.core.cache.index import chunk_key, full_chunk_keys, root_key
from engine.simulator.clients import Client
from engine.workloads.session import Session


class Oracle:
    """Follows the sessions of one simulation as their turns begin and end."""

    def __init__(self, sessions: Iterable[Session], chunk_size: int, model: str = "") -> None:
        """sessions: as the simulation gets them, in order of their start times, with arrivals at these times.

        model: as in CacheConfig, part of each key.
        """
        self._chunk_size = chunk_size
        self._futures = [_Future(session, index, chunk_size, model) for index, session in enumerate(sessions)]
        self._by_name = {future.session_id: future for future in self._futures}
        self._uses: dict[bytes, list[tuple[_Future, int, int]]] = {}
        for future in self._futures:
            for key, first, last in future.take_uses():
                self._uses.setdefault(key, []).append((future, first, last))
        self._seen: set[bytes] = set()

    def begin_turn(self, session_id: str) -> int:
        """The next turn of the session is sent. Returns how many of its first tokens any session has had before."""
        future = self._by_name[session_id]
        future.is_running = True
        keys = future.prompt_keys[future.turn]
        num_seen = next((number for number, key in enumerate(keys) if key not in self._seen), len(keys))
        self._seen.update(keys)
        return num_seen * self._chunk_size

    def end_turn(self, session_id: str, now: float) -> None:
        """The answer is complete; the next turn is sent after its pause."""
        future = self._by_name[session_id]
        self._seen.update(future.context_keys[future.turn])
        future.is_running = False
        future.turn += 1
        if future.turn < len(future.times_s):
            future.ready_s = now - future.times_s[future.turn - 1]

    def next_use_s(self, key: bytes | None, since_s: float) -> float:
        """When the chunk of that name is used next; infinite = never, as that of a chunk without a name.

        since_s: when it was used last. If that was by a turn that ends just now, the next one follows from then on.
        """
        if key is None or key not in self._uses:
            return math.inf
        uses = self._uses[key]
        soonest, num_past = math.inf, 0
        for future, first, last in uses:
            turn = max(first, future.turn + future.is_running)
            if turn > last:
                num_past += 1
                continue
            if future.is_running:
                time_s = since_s + future.times_s[turn] - future.times_s[future.turn]
            else:
                time_s = future.ready_s + future.times_s[turn]
            soonest = min(soonest, time_s)
            if not turn and not future.is_running:  # it has not begun, and those behind it begin later
                break
        if num_past > 8 and 2 * num_past > len(uses):
            self._uses[key] = [each for each in uses if max(each[1], each[0].turn) <= each[2]]
        return soonest


class _Future:
    """One session: the keys of all its turns, and when they are sent.

    turn: under way if `is_running`, else the next one. times_s: of each turn, the pauses up to it.
    ready_s: a turn is sent that much later.
    prompt_keys, context_keys: by turn, of the full chunks of its prompt, and of its prompt and answer.
    """

    __slots__ = (
        "_uses",
        "context_keys",
        "is_running",
        "prompt_keys",
        "ready_s",
        "session_id",
        "times_s",
        "turn",
    )

    def __init__(self, session: Session, index: int, chunk_size: int, model: str) -> None:
        self.session_id = session.session_id
        self.turn, self.is_running, self.ready_s = 0, False, session.start_s
        self.times_s = list(accumulate(turn.pause_s for turn in session.turns))
        self.prompt_keys: list[list[bytes]] = []
        self.context_keys: list[list[bytes]] = []
        self._uses: dict[bytes, list[int]] = {}
        root = root_key(model, "", session.tenant)
        client = Client(session, index)
        for number, turn in enumerate(session.turns):
            client.ask(0.0)
            request = client.request(chunk_size)
            keys = request.chunk_keys
            _extend(keys, root, request.token_ids, chunk_size)
            self.prompt_keys.append(list(keys))
            for key in keys:
                self._note(key, number)
            request.token_ids += [client.token] * turn.output_tokens
            _extend(keys, root, request.token_ids, chunk_size)
            self.context_keys.append(list(keys))
            if client.end_turn(request) and session.turns[number + 1].keep_tokens is None:
                # What is computed of the answer ends with a partial chunk, which only the next turn finds under this name.
                num_full = (len(request.token_ids) - 1) // chunk_size
                tail = request.token_ids[num_full * chunk_size : -1]
                if tail:
                    self._note(chunk_key(keys[num_full - 1] if num_full else root, tail), number + 1)

    def _note(self, key: bytes, number: int) -> None:
        """Turn `number` uses the chunk."""
        interval = self._uses.get(key)
        if interval is None:
            self._uses[key] = [number, number]
        else:
            interval[1] = number

    def take_uses(self) -> list[tuple[bytes, int, int]]:
        """(key, first turn, last turn) of all chunks: turns between use it, too. Once."""
        uses = [(key, first, last) for key, (first, last) in self._uses.items()]
        self._uses = {}
        return uses


def _extend(keys: list[bytes], root: bytes, token_ids: list[int], chunk_size: int) -> None:
    keys += full_chunk_keys(keys[-1] if keys else root, token_ids[len(keys) * chunk_size :], chunk_size)
