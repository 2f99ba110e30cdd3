"""What a replica that cannot start tells clients: the reason, in one line, and nothing of the server's folders."""

from __future__ import annotations

import pytest

from deployments.cluster.start_failure import MAX_REASON_CHARS, read_start_error, start_error
from engine.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("'/srv/models/llama' does not exist", "'llama' does not exist"),
        ("cannot read /srv/models/llama/model.bin: header too large", "cannot read model.bin: header too large"),
        ("~/models/llama: no config.json", "llama: no config.json"),
        ("https://example.org/a/b, and 3/4 of it", "https://example.org/a/b, and 3/4 of it"),
        ("lower\n  gpu_memory_gib", "lower gpu_memory_gib"),
        ("a" * 2 * MAX_REASON_CHARS, "a" * MAX_REASON_CHARS + "..."),
    ],
)
def test_one_line_without_folders(text: str, reason: str) -> None:
    assert str(start_error(ConfigError(text))) == reason


def test_other_exceptions_come_with_their_name() -> None:
    assert str(start_error(OSError("disk"))) == "OSError: disk"


def test_the_last_one_counts_and_there_may_be_none() -> None:
    told = "Error:\ndeployments.start_failure.EngineStartError: first\n\nTraceback\nEngineStartError: second\n"
    assert read_start_error(told) == "second"
    assert read_start_error("The deployment failed to start 3 times in a row. Error:\nThe actor died.") is None
