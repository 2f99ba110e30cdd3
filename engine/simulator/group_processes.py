"""The groups of a simulation, each in a process of its own if there are several."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from engine.errors import EngineError
from engine.simulator.groups import Group, GroupSpec, Message, Report
from engine.simulator.outcome import ReplicaRow

# Objects that are made before the garbage collector looks for cycles: a simulation makes millions, and hardly a cycle.
OBJECTS_PER_COLLECTION = 200_000


@contextmanager
def rare_collections() -> Iterator[None]:
    """The garbage collector does not go over all chunks again and again."""
    before = gc.get_threshold()
    gc.set_threshold(OBJECTS_PER_COLLECTION, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class GroupRow:
    """All groups. Use it as a context, which ends their processes."""

    def __init__(self, spec: GroupSpec, num_groups: int, *, in_processes: bool) -> None:
        """in_processes: each group is in one of its own; else all are in this one."""
        self._local = [] if in_processes else [Group(spec) for _ in range(num_groups)]
        self._spec = spec
        self._num_groups = num_groups
        self._processes: list[Any] = []
        self._connections: list[Connection[Any, Any]] = []

    def __enter__(self) -> Self:
        if not self._local:
            context = multiprocessing.get_context("spawn")
            for number in range(self._num_groups):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, self._spec), name=f"group {number}", daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.close()  # which ends its process
        for process in self._processes:
            process.join()

    def run(self, messages: Sequence[Sequence[Message]], num_changes: int, end_s: float) -> list[Report]:
        """Let each group compute a window; see Group.run. messages: for each group."""
        if self._local:
            return [group.run(part, num_changes, end_s) for group, part in zip(self._local, messages, strict=True)]
        for connection, part in zip(self._connections, messages, strict=True):
            connection.send(("run", part, num_changes, end_s))
        return [self._receive(connection) for connection in self._connections]

    def finish(self, ended_s: float) -> list[ReplicaRow]:
        """See Group.finish."""
        if self._local:
            return [row for group in self._local for row in group.finish(ended_s)]
        for connection in self._connections:
            connection.send(("finish", ended_s))
        return [row for connection in self._connections for row in self._receive(connection)]

    @staticmethod
    def _receive(connection: Connection[Any, Any]) -> Any:
        """Raises what the group has raised."""
        try:
            answer = connection.recv()
        except EOFError:
            raise EngineError(
                "a process of the simulation has ended, perhaps because there is too little memory; use fewer replicas, a "
                "larger chunk_size or a shorter time"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Connection[Any, Any], spec: GroupSpec) -> None:
    """The process of one group, until its parent closes the connection."""
    group = Group(spec)
    with rare_collections():
        while True:
            try:
                name, *arguments = connection.recv()
            except (EOFError, KeyboardInterrupt):
                return
            try:
                answer = getattr(group, name)(*arguments)
            except Exception as error:  # the parent raises it
                answer = error
            connection.send(answer)
