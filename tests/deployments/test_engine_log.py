"""The engine's log lines go where Serve's go, with the level that Serve's logger has at the time."""

from __future__ import annotations

import logging

import pytest

from deployments.engine_log import ENGINE_LOGGER, SERVE_LOGGER, log_engine_with_serve


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def test_by_serves_handlers_and_level(monkeypatch: pytest.MonkeyPatch) -> None:
    for logger in (ENGINE_LOGGER, SERVE_LOGGER):
        for name in ("handlers", "propagate"):
            monkeypatch.setattr(logger, name, getattr(logger, name))
    levels = ENGINE_LOGGER.level, SERVE_LOGGER.level
    try:
        for _ in range(2):
            log_engine_with_serve(logging.INFO)
        serve = Lines()
        SERVE_LOGGER.handlers = [serve]  # as Serve does when its configuration changes
        engine = logging.getLogger("engine.executor.local")
        engine.info("float32 on cpu")
        engine.debug("details")
        SERVE_LOGGER.setLevel(logging.WARNING)
        engine.info("more")
        engine.warning("torch's operations")
    finally:
        ENGINE_LOGGER.setLevel(levels[0])
        SERVE_LOGGER.setLevel(levels[1])
    assert serve.lines == ["INFO float32 on cpu", "WARNING torch's operations"]
