"""The thread that steps an engine, and runs commands of other threads between two steps.

Knows no asyncio and no model.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from engine.errors import EngineStoppedError
from engine.step_loop import StepLoop

logger = logging.getLogger(__name__)

# After so many seconds in one step the engine reports that it hangs. No step is that slow, not even one that compiles.
MAX_STEP_S = 300.0


class EngineThread:
    """Steps a loop until `stop`; waits for commands when there is nothing to compute."""

    def __init__(
        self,
        loop: StepLoop,
        *,
        after_step: Callable[[], None],
        on_end: Callable[[EngineStoppedError], None],
        on_idle: Callable[[], bool] = lambda: False,
    ) -> None:
        """Starts the thread.

        after_step: called in it after each step.
        on_idle: called in it when there is nothing to do; says whether there is something now.
        on_end: called in it when it ends for whatever reason, to end the requests that are left with this error.
        """
        self._loop = loop
        self._after_step = after_step
        self._on_end = on_end
        self._on_idle = on_idle
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._step_start_s: float | None = None  # None while there is nothing to do
        self._is_stopping = False
        self._fatal: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a command, with nothing to compute."""
        return self._step_start_s is None

    @property
    def num_commands(self) -> int:
        """How many wait for the end of the step."""
        return self._commands.qsize()

    def put(self, command: Callable[[], None]) -> None:
        """Run `command` between two steps, unless the thread has ended.

        An exception of it ends the thread.
        """
        self._commands.put(command)

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        """Run `function` between two steps, unless the future is cancelled before; its result or exception.

        Raises EngineStoppedError if the thread has ended.
        """
        future: Future[Any] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if self._is_stopping:
                future.set_exception(EngineStoppedError("the engine is shut down"))
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self.put(command)
        if self._is_stopping:  # the thread may have looked for commands for the last time
            self.check_health()
        return future

    def check_health(self) -> None:
        """Raise EngineStoppedError if no request can be served any more."""
        if self._fatal is not None:
            raise EngineStoppedError(f"the engine thread died: {self._fatal!r}")
        self._loop.check_health()
        if self._is_stopping:
            raise EngineStoppedError("the engine is shut down")
        start_s = self._step_start_s
        if start_s is not None and time.monotonic() - start_s > MAX_STEP_S:
            raise EngineStoppedError(f"the engine hangs: its last step began more than {MAX_STEP_S:g} seconds ago")

    def stop(self) -> None:
        """End the thread after the step that runs; blocks until then. May be called again."""
        self._is_stopping = True
        self.put(lambda: None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._step_start_s = time.monotonic()
                self._run_commands(max_wait_s=0.0)
                if self._loop.step() is not None:
                    self._after_step()
                elif (
                    not self._is_stopping and not self._on_idle()
                ):  # a shutdown's wake-up call may have been taken already
                    self._step_start_s = None
                    self._run_commands(max_wait_s=self._loop.max_pause_s())
        except BaseException as error:
            logger.exception("the engine thread died")
            self._fatal = error
        finally:
            self._on_end(EngineStoppedError("the engine stopped while the request was running"))
            self._is_stopping = True
            self._run_commands(max_wait_s=0.0)

    def _run_commands(self, *, max_wait_s: float | None) -> None:
        """Run all commands that are there. If there is none, wait so long for one; None = for ever."""
        while True:
            try:
                command = self._commands.get(timeout=max_wait_s)
            except queue.Empty:
                return
            command()
            max_wait_s = 0.0
