"""A fake server behind a port, and sessions to ask it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.workloads.session import Session, Span, Turn
from tests.deployments.serving import serving
from tests.engine.bench.fake_server import FakeServer


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def url(server: FakeServer) -> Iterator[str]:
    with serving(server.app) as url:
        yield f"{url}/v1"


@pytest.fixture
def sessions() -> list[Session]:
    """Three sessions of three turns, of 4 words and answers of 3, which share a prefix of 6."""
    return [
        Session(
            f"s{number}",
            (
                Turn((Span(0, 6), Span(1 + number, 4)), 3),
                Turn((Span(1 + number, 4, 4),), 3, pause_s=0.01),
                Turn((Span(1 + number, 4, 8),), 3, pause_s=0.02, kind="tool", tool="look"),
            ),
        )
        for number in range(3)
    ]
