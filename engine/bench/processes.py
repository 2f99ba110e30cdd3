"""Loads, each driven by several processes, so that the client is not what is measured.

Each process has its own sessions (in a closed loop: the next one that none has taken) and reports its turns as they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from engine.bench.client import Client, ClientFault, Endpoint
from engine.bench.driver import Driver, Load
from engine.bench.turns import LoopLag, TurnRecord
from engine.workloads.session import Session

# Importing and starting take this long at most, on a busy machine.
START_TIMEOUT_S = 120.0
# From the order to the start of the first session.
START_DELAY_S = 0.1
REPORT_INTERVAL_S = 0.2
# A stopped process that has not ended after this is killed.
STOP_TIMEOUT_S = 10.0
# Sessions at once that one process drives with ease.
SESSIONS_PER_PROCESS = 64
READY = "ready"


@dataclass(slots=True)
class RunResult:
    """The turns of one load, in the order in which they ended.

    lags: of the processes that came to an end.
    fault: why the client failed; empty if it did not.
    """

    records: list[TurnRecord] = field(default_factory=list)
    lags: list[LoopLag] = field(default_factory=list)
    fault: str = ""
    is_interrupted: bool = False


class Workers:
    """The client's processes. They start when they are first needed and serve one load after the other; close() ends them."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._counter = self._context.Value("q", 0)
        self._workers: list[tuple[Any, Connection]] = []

    def run(
        self,
        endpoint: Endpoint,
        load: Load,
        sessions: Sequence[Session],
        num_processes: int,
        on_turns: Callable[[Sequence[TurnRecord]], None] = lambda records: None,
    ) -> RunResult:
        """Drive the sessions and hear all answers out. Ctrl-C ends it early, with the turns that are complete.

        After Ctrl-C, or if the client failed, the processes have ended, and others start with the next load.
        """
        result = RunResult()
        try:
            connections = self._connections(min(num_processes, len(sessions), load.num_active or len(sessions)))
            self._counter.value = 0
            for number, connection in enumerate(connections):
                connection.send((endpoint, *_share(load, sessions, number, len(connections))))
            _start(connections)
            _collect(connections, result, on_turns)
        except KeyboardInterrupt:
            result.is_interrupted = True
            with contextlib.suppress(KeyboardInterrupt):  # a second one does not wait
                self._stop(result, on_turns)
        except ClientFault as fault:
            result.fault = str(fault)
        if result.is_interrupted or result.fault:
            self.close()
        result.records.sort(key=lambda record: record.end_s)
        return result

    def close(self) -> None:
        for _, connection in self._workers:
            connection.close()  # which a process that still runs takes as an order to stop
        for process, _ in self._workers:
            process.join(STOP_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers.clear()

    def _connections(self, count: int) -> list[Connection]:
        while len(self._workers) < count:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_work, args=(self._counter, there), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))
        return [connection for _, connection in self._workers[:count]]

    def _stop(self, result: RunResult, on_turns: Callable[[Sequence[TurnRecord]], None]) -> None:
        connections = [connection for _, connection in self._workers]
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        _collect(connections, result, on_turns, timeout_s=STOP_TIMEOUT_S)


def _share(load: Load, sessions: Sequence[Session], number: int, count: int) -> tuple[Load, Sequence[Session]]:
    """What a process drives: its sessions by their start, or its part of a closed loop over all of them."""
    if load.num_active is None:
        return load, sessions[number::count]
    return replace(load, num_active=load.num_active // count + (number < load.num_active % count)), sessions


def _start(connections: Sequence[Connection]) -> None:
    """All at the same time, once all are ready."""
    for connection in connections:
        if not connection.poll(START_TIMEOUT_S):
            raise ClientFault(
                f"a process of the client did not start within {START_TIMEOUT_S:g} s; is the machine overloaded?"
            )
        try:
            connection.recv()
        except EOFError:
            raise ClientFault("a process of the client ended as it started; its output says why") from None
    start_s = time.time() + START_DELAY_S
    for connection in connections:
        connection.send(start_s)


def _collect(
    connections: Sequence[Connection],
    result: RunResult,
    on_turns: Callable[[Sequence[TurnRecord]], None],
    timeout_s: float | None = None,
) -> None:
    """What they report, until all have come to an end. timeout_s: they are ordered to stop, and may do so without a word."""
    open_ones = list(connections)
    end_s = None if timeout_s is None else time.monotonic() + timeout_s
    while open_ones and (end_s is None or time.monotonic() < end_s):
        for connection in wait(open_ones, timeout=None if end_s is None else max(0.0, end_s - time.monotonic())):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except (EOFError, OSError):
                open_ones.remove(connection)
                if timeout_s is None:
                    result.fault = result.fault or "a process of the client ended early; its output says why"
                continue
            if isinstance(message, list):
                result.records += message
                on_turns(message)
            elif isinstance(message, LoopLag):
                open_ones.remove(connection)
                result.lags.append(message)
            elif message != READY:
                open_ones.remove(connection)
                result.fault = result.fault or str(message)


def _work(counter: Any, connection: Connection) -> None:
    """The process: for each load it reports turns in lists, then its lag, or a text that says what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides

    def next_index() -> int:
        with counter.get_lock():
            index: int = counter.value
            counter.value += 1
        return index

    with contextlib.suppress(BrokenPipeError, EOFError, OSError):
        while (job := connection.recv()) is not None:
            gc.freeze()  # the sessions are not looked at again and again
            connection.send(READY)
            start_s = connection.recv()
            if start_s is None:
                break
            endpoint, load, sessions = job
            connection.send(asyncio.run(_drive(endpoint, load, sessions, next_index, start_s, connection)))
            gc.unfreeze()


async def _drive(
    endpoint: Endpoint,
    load: Load,
    sessions: Sequence[Session],
    next_index: Callable[[], int],
    start_s: float,
    connection: Connection,
) -> LoopLag | str:
    """start_s: of the wall clock, which all processes share."""
    waiting: list[TurnRecord] = []

    def report() -> None:
        if waiting:
            connection.send(waiting.copy())
            waiting.clear()

    async def report_regularly() -> None:
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            report()

    client = Client(endpoint)
    driver = Driver(client, load, time.perf_counter() + start_s - time.time(), waiting.append)
    driving = asyncio.create_task(driver.run(sessions, next_index))
    reporting = asyncio.create_task(report_regularly())
    loop = asyncio.get_running_loop()
    loop.add_reader(connection.fileno(), driving.cancel)  # an order to stop, or the end of the parent
    try:
        return await driving
    except asyncio.CancelledError:
        return driver.loop_lag()
    except ClientFault as fault:
        return str(fault)
    finally:
        loop.remove_reader(connection.fileno())
        reporting.cancel()
        await client.close()
        report()
