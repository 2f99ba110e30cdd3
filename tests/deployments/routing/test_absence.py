"""What is made of Serve's word on an application whose engine has no replica; test_rolling.py has the real thing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve.exceptions import RayServeException

from deployments.errors import ModelNotLoadedError, NoReplicaError, ReplicaNotPlacedError, ServerStoppingError
from deployments.generation import ErrorItem
from deployments.http.errors import wire_of
from deployments.routing import absence
from deployments.routing.absence import why_absent

FAILED = "A replica failed to start with exception. Error:\ndeployments.start_failure.EngineStartError: no config.json"


def status(application: str = "DEPLOYING", deployment: str = "UPDATING", message: str = "") -> Any:
    engine = SimpleNamespace(status=SimpleNamespace(value=deployment), message=message)
    app = SimpleNamespace(status=application, deployments={"LLMServer": engine})
    return SimpleNamespace(applications={"app": app})


@pytest.mark.parametrize(
    ("told", "kind", "is_final", "part"),
    [
        (status(), NoReplicaError, False, "starting"),
        (status(message=FAILED), ModelNotLoadedError, False, "tried again: no config.json"),
        (status("DEPLOY_FAILED", "DEPLOY_FAILED", FAILED), ModelNotLoadedError, True, "next deploy: no config.json"),
        (
            status(message="The deployment failed to start 3 times. Error:\nActorDied"),
            ModelNotLoadedError,
            False,
            "log",
        ),
        (status("DELETING"), ServerStoppingError, True, "shutting down"),
        (SimpleNamespace(applications={}), ServerStoppingError, True, "shutting down"),
        (RayServeException("no controller"), NoReplicaError, False, "controller"),
    ],
)
def test_why(told: Any, kind: type[NoReplicaError], is_final: bool, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> Any:
        if isinstance(told, Exception):
            raise told
        return told

    monkeypatch.setattr(serve, "status", ask)
    monkeypatch.setattr(absence, "why_not_placed", lambda app_name, deployment_name: None)
    error = why_absent("app", "LLMServer")
    assert (type(error), error.is_final, wire_of(error).status) == (kind, is_final, 503)
    assert part in error.message
    assert (ErrorItem.of(error).retry_after_s or 0) >= 1


def test_a_replica_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(absence, "why_not_placed", lambda app_name, deployment_name: "1 GPU of 0")
    error = why_absent("app", "LLMServer")
    assert (type(error), error.message, error.is_final) == (ReplicaNotPlacedError, "1 GPU of 0", False)
