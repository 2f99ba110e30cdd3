"""How plans go from rank 0 to the other ranks of a tensor-parallel group, and what comes back.

A worker reports that it lives, what it has, and what went wrong. One connection per worker, over a Unix socket or TCP;
knows no model.

    rank 0 -> worker   a step: encode_plan(...); an AdapterOrder; or STOP
    worker -> rank 0   Beat every second; Placement once; SwapsDone if swaps are verified; AdapterLoaded of an order to load;
                       Failure, its last word

If the ranks have slow tiers, each worker makes a second connection for these, which is no concern of this module: a worker
reads its plans between two steps only, and transfers do not wait for that. See tiers/group_channel.py.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge, wait
from pathlib import Path
from typing import Any

from engine.core.plan import BlockAppend, BlockCopy, QuerySegment, RequestStart, StepPlan
from engine.errors import AdapterError, EngineError, PensieveError
from engine.executor.process_group import GroupMember

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
# Without a heartbeat for so long, a worker is stopped or its machine gone: one that computes beats too. One that loads may
# be kept from it by a slow file system.
LOST_AFTER_S = 10.0
LOST_IN_LOADING_AFTER_S = 300.0
# While rank 0 waits for its workers: how often it looks whether they live, and how long each message of a worker that proves
# who it is may take.
CHECK_INTERVAL_S = 0.05
HANDSHAKE_TIMEOUT_S = 10
# A worker whose rank 0 is gone ends by itself within that, even in the middle of a collective.
END_ALONE_AFTER_S = 10.0
PROTOCOL = pickle.HIGHEST_PROTOCOL
STOP = b""


@dataclass(frozen=True, slots=True)
class Placement:
    """What one rank has, where: bytes of weights and of both tiers, and the device they are for."""

    rank: int
    host: str
    pid: int
    device: str
    num_weight_bytes: int
    num_gpu_tier_bytes: int
    num_cpu_tier_bytes: int

    def __str__(self) -> str:
        sizes = (self.num_weight_bytes, self.num_gpu_tier_bytes, self.num_cpu_tier_bytes)
        weights, gpu_tier, cpu_tier = (f"{num_bytes / (1 << 30):.2f} GiB" for num_bytes in sizes)
        return (
            f"rank {self.rank} on {self.host}, process {self.pid}, {self.device}: weights {weights}, GPU tier {gpu_tier}, "
            f"CPU tier {cpu_tier}"
        )


@dataclass(frozen=True, slots=True)
class Beat:
    """The worker lives. step_id: of the last step that it finished."""

    step_id: int


@dataclass(frozen=True, slots=True)
class SwapsDone:
    """GPU blocks to which a step's swap-ins brought something else than was swapped out on that rank."""

    failed_swap_ins: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AdapterOrder:
    """Load the adapter in a folder, or unload the one of an identity; behind the steps that were sent before."""

    folder: str = ""
    identity: str = ""


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    """What came of an order to load.

    identity: of the adapter. error: why it was not loaded.
    """

    identity: str = ""
    error: AdapterError | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the worker ends.

    error: if it is one that the engine raises on purpose.
    """

    text: str
    error: PensieveError | None = None


# The parts of a plan that are rows of one class. Rows travel as plain tuples: pickled with their class they take longer.
_ROWS: tuple[tuple[str, Any], ...] = (
    ("segments", QuerySegment),
    ("starts", RequestStart),
    ("appends", BlockAppend),
    ("evictions", BlockCopy),
    ("local_copies", BlockCopy),
    ("swap_ins", BlockCopy),
    ("swap_outs", BlockCopy),
)


def encode_plan(token_ids: tuple[int, ...], plan: StepPlan) -> bytes:
    """token_ids: sampled in the step before, by rank 0."""
    rows = tuple(tuple(map(tuple, getattr(plan, name))) for name, _ in _ROWS)
    return pickle.dumps((token_ids, plan.step_id, plan.ended, rows), PROTOCOL)


def decode_plan(message: bytes) -> tuple[tuple[int, ...], StepPlan]:
    """What `encode_plan` encoded."""
    return _plan_of(pickle.loads(message))


def _decode(message: bytes) -> tuple[tuple[int, ...], StepPlan] | AdapterOrder:
    content = pickle.loads(message)
    return content if isinstance(content, AdapterOrder) else _plan_of(content)


def _plan_of(content: Any) -> tuple[tuple[int, ...], StepPlan]:
    token_ids, step_id, ended, rows = content
    parts = {name: tuple(map(kind._make, part)) for (name, kind), part in zip(_ROWS, rows, strict=True) if part}
    return token_ids, StepPlan(step_id, parts.pop("segments", ()), ended=ended, **parts)


class PlanSender:
    """Rank 0's side.

    A thread listens to the workers and calls `on_lost(rank, why)`, once, when one of them is lost.

    tier_connections: by rank, for slow tiers; they end with the others.
    """

    def __init__(
        self,
        size: int,
        *,
        host: str | None,
        path: str,
        on_lost: Callable[[int, str], None],
        has_tiers: bool = False,
    ) -> None:
        """Listen for workers.

        host: this machine's name, if workers connect from others; None = listen on a Unix socket.
        path: of that socket, in a folder that is the group's alone.
        has_tiers: each worker makes a connection for slow tiers, too.
        """
        self._size = size
        self._has_tiers = has_tiers
        self.authkey = os.urandom(32)
        self._listener = socket.socket(socket.AF_UNIX if host is None else socket.AF_INET)
        self._listener.bind(path if host is None else (host, 0))
        self._listener.listen(2 * size)
        self._listener.settimeout(CHECK_INTERVAL_S)
        self.address: str | tuple[str, int] = path if host is None else (host, self._listener.getsockname()[1])
        self._on_lost = on_lost
        self._connections: dict[int, Connection[Any, Any]] = {}
        self.tier_connections: dict[int, Connection[Any, Any]] = {}
        self._changed = threading.Condition()
        self._beats: dict[int, tuple[float, int]] = {}
        self._placements: dict[int, Placement] = {}
        self._swaps_done: dict[int, SwapsDone] = {}
        self._adapters_loaded: dict[int, AdapterLoaded] = {}
        self._step: tuple[int, float] | None = None  # the step that runs, and its deadline
        self.failure: Failure | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._listen, name="workers", daemon=True)

    def accept(self, check: Callable[[], None], timeout_s: float) -> None:
        """Wait until every worker has connected.

        check: called again and again meanwhile; raises if waiting is of no use.
        """
        deadline = time.monotonic() + timeout_s
        while missing := self._missing_ranks():
            check()
            if time.monotonic() > deadline:
                raise EngineError(f"ranks {missing} of {self._size} did not connect within {timeout_s:.0f} s")
            with suppress(TimeoutError):
                connection, _ = self._listener.accept()
                # In a thread each, because over TCP a stranger may connect, and say nothing.
                threading.Thread(target=self._welcome, args=(connection,), name="welcome", daemon=True).start()
        self._listener.close()
        now = time.monotonic()
        self._beats = dict.fromkeys(self._connections, (now, -1))
        self._thread.start()

    def _missing_ranks(self) -> list[int]:
        have = set(self._connections)
        if self._has_tiers:
            have &= set(self.tier_connections)
        return sorted(set(range(1, self._size)) - have)

    def _welcome(self, accepted: socket.socket) -> None:
        """Make a connection a worker's when both sides have proved that they know the key; else close it."""
        _limit_receiving(accepted, HANDSHAKE_TIMEOUT_S)
        connection: Connection[Any, Any] = Connection(accepted.detach())
        try:
            deliver_challenge(connection, self.authkey)
            answer_challenge(connection, self.authkey)
            rank, is_for_tiers = connection.recv()
            with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
                _limit_receiving(duplicate, 0)
            if not isinstance(self.address, str):
                _tune_tcp(connection)
        except (OSError, EOFError, AuthenticationError) as error:
            logger.warning("a connection that is no worker's: %r", error)
            connection.close()
        else:
            (self.tier_connections if is_for_tiers else self._connections)[rank] = connection

    def send(self, token_ids: tuple[int, ...], plan: StepPlan, timeout_s: float) -> None:
        """To all workers. timeout_s: within that, `end_step` has to follow, or the group counts as hung."""
        message = encode_plan(token_ids, plan)
        self._step = (plan.step_id, time.monotonic() + timeout_s)
        for connection in self._connections.values():
            connection.send_bytes(message)

    def send_order(self, order: AdapterOrder) -> None:
        """To all workers; from the thread that sends plans."""
        message = pickle.dumps(order, PROTOCOL)
        for connection in self._connections.values():
            connection.send_bytes(message)

    def take_adapters_loaded(self) -> tuple[AdapterLoaded, ...]:
        """What came of the last order to load, by rank; blocks until all workers have reported, or one is lost."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._adapters_loaded) == self._size - 1 or self.failure is not None)
            loaded, self._adapters_loaded = self._adapters_loaded, {}
        return tuple(loaded[rank] for rank in sorted(loaded))

    def end_step(self) -> None:
        """Rank 0 has finished the step."""
        self._step = None

    def wait_until_ready(self) -> tuple[Placement, ...]:
        """What the workers have, by rank; blocks until all have loaded."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._placements) == self._size - 1 or self.failure is not None)
            return tuple(self._placements[rank] for rank in sorted(self._placements))

    def take_failed_swap_ins(self) -> set[int]:
        """The failed swap-ins of all workers, after a step with verified ones; blocks until all have reported."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._swaps_done) == self._size - 1 or self.failure is not None)
            done, self._swaps_done = self._swaps_done, {}
        return {block for swaps in done.values() for block in swaps.failed_swap_ins}

    def close(self, timeout_s: float) -> None:
        """Tell the workers to stop, and wait that long for them to leave."""
        self._is_closing = True
        for connection in self._connections.values():
            try:
                connection.send_bytes(STOP)
            except OSError:
                logger.debug("a worker is gone already")
        if self._thread.is_alive():
            self._thread.join(timeout_s)
            for connection in self._connections.values():
                hang_up(connection)  # ends the thread if a worker has not
            self._thread.join()
        self._listener.close()
        for connection in self._connections.values():
            connection.close()
        for connection in self.tier_connections.values():
            hang_up(connection)  # a thread may read from it still

    def _listen(self) -> None:
        ranks = {connection: rank for rank, connection in self._connections.items()}
        while ranks:
            for connection in wait(list(ranks), HEARTBEAT_S):
                assert isinstance(connection, Connection)
                rank = ranks[connection]
                try:
                    self._note(rank, connection.recv())
                except (EOFError, OSError):
                    del ranks[connection]
                    self._lose(rank, "its process has ended")
            now = time.monotonic()
            for rank in ranks.values():
                silent_s = now - self._beats[rank][0]
                if silent_s > (LOST_AFTER_S if rank in self._placements else LOST_IN_LOADING_AFTER_S):
                    self._lose(rank, f"it has not answered for {silent_s:.0f} s")
            step = self._step
            if step is not None and now > step[1]:
                behind = [rank for rank in ranks.values() if self._beats[rank][1] < step[0]]
                self._lose(min(behind, default=0), f"step {step[0]} does not end")

    def _note(self, rank: int, message: Any) -> None:
        with self._changed:
            match message:
                case Beat(step_id):
                    self._beats[rank] = (time.monotonic(), step_id)
                case Placement():
                    self._placements[rank] = message
                case SwapsDone():
                    self._swaps_done[rank] = message
                case AdapterLoaded():
                    self._adapters_loaded[rank] = message
                case Failure():
                    self._lose(rank, message.text, message)
            self._changed.notify_all()

    def _lose(self, rank: int, why: str, failure: Failure | None = None) -> None:
        with self._changed:
            if self._is_closing or self.failure is not None:
                return
            self.failure = failure or Failure(why)
            self._changed.notify_all()
        self._on_lost(rank, why)


class PlanReceiver:
    """A worker's side.

    A thread sends heartbeats. When rank 0 is gone, it ends the process should that not end by itself.
    """

    def __init__(self, member: GroupMember) -> None:
        self._path = member.plan_address if isinstance(member.plan_address, str) else None
        self._is_orphan = False
        self._connection = _connect(member, is_for_tiers=False)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._step_id = -1
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def receive(self) -> tuple[tuple[int, ...], StepPlan] | AdapterOrder | None:
        """The next plan, with the tokens that rank 0 sampled in the step before, or an order; None = stop.

        Raises EOFError if rank 0 is gone.
        """
        try:
            message = self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            self._is_orphan = True
            raise EOFError from error
        return None if message == STOP else _decode(message)

    def finish_step(self, step_id: int) -> None:
        self._step_id = step_id

    def report(self, message: Placement | SwapsDone | AdapterLoaded | Failure) -> None:
        """Nothing happens where rank 0 is gone."""
        try:
            self._send(message)
        except OSError as error:
            logger.warning("cannot tell rank 0 %s: %r", message, error)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._connection.close()
        self._tidy_up()

    def _send(self, message: Any) -> None:
        try:
            with self._lock:
                self._connection.send(message)
        except OSError:
            self._is_orphan = True
            raise

    def _tidy_up(self) -> None:
        """What rank 0 would have removed, had it not been killed."""
        if self._is_orphan and self._path is not None:
            shutil.rmtree(Path(self._path).parent, ignore_errors=True)

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            try:
                self._send(Beat(self._step_id))
            except OSError:
                if not self._closed.wait(END_ALONE_AFTER_S):
                    logger.error("rank 0 is gone, and a collective does not end: leaving")
                    self._tidy_up()
                    os._exit(1)
                return


def connect_tiers(member: GroupMember) -> Connection[Any, Any]:
    """A worker's connection for slow tiers, if the group has any."""
    return _connect(member, is_for_tiers=True)


def _connect(member: GroupMember, *, is_for_tiers: bool) -> Connection[Any, Any]:
    is_local = isinstance(member.plan_address, str)
    family = "AF_UNIX" if is_local else "AF_INET"
    connection: Connection[Any, Any] = Client(member.plan_address, family, authkey=member.authkey)
    if not is_local:
        _tune_tcp(connection)
    connection.send((member.rank, is_for_tiers))
    return connection


def failure_of(error: BaseException) -> Failure:
    """An error as it is reported to rank 0."""
    return Failure(str(error) or repr(error), error if isinstance(error, PensieveError) else None)


def hang_up(connection: Connection[Any, Any]) -> None:
    """Both sides read the end from here on."""
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate, suppress(OSError):
        duplicate.shutdown(socket.SHUT_RDWR)


def _limit_receiving(connection: socket.socket, timeout_s: int) -> None:
    """Let reading fail with an OSError after so long a silence; 0 = never.

    Unlike a timeout of Python's sockets, it goes with the file descriptor.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", timeout_s, 0))


def _tune_tcp(connection: Connection[Any, Any]) -> None:
    """Small messages leave at once, and a machine that is gone is noticed."""
    with socket.socket(fileno=os.dup(connection.fileno())) as tcp:
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(LOST_AFTER_S * 1000))
