"""Why no engine replica answers: what Serve and Ray know of a deployment that has none, as an error for clients. Starts and
changes nothing.

NoReplicaError                (503) none is ready; a request may wait for one
|-- ModelNotLoadedError       a replica cannot start
|-- ReplicaNotPlacedError     no node has room for a replica
`-- ServerStoppingError       the application is on its way out, and no replica will come
"""

from __future__ import annotations

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from deployments.cluster.placement import why_not_placed
from deployments.cluster.start_failure import read_start_error
from engine.errors import EngineStoppedError


class NoReplicaError(EngineStoppedError):
    """No engine replica is ready. is_final: none will be as long as nothing is done about it, and waiting is no use."""

    code = "no_replica"

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final
        self.retry_after_s = 30.0 if is_final else 5.0


class ModelNotLoadedError(NoReplicaError):
    """An engine replica cannot start; the message has the reason, without folders of the server."""

    code = "model_not_loaded"


class ReplicaNotPlacedError(NoReplicaError):
    """An engine replica waits for a node with room for it, or for its group of ranks."""

    code = "replica_not_placed"


class ServerStoppingError(NoReplicaError):
    """The application is being deleted."""

    code = "server_stopping"


def why_absent(app_name: str, deployment_name: str) -> NoReplicaError:
    """Why the deployment has no replica that runs. Blocking: asks Serve's controller and Ray's control store."""
    try:
        application = serve.status().applications.get(app_name)
        if application is None or application.status in (ApplicationStatus.DELETING, ApplicationStatus.NOT_STARTED):
            return ServerStoppingError("the server is shutting down", is_final=True)
        deployment = application.deployments.get(deployment_name)
        if deployment is not None and "failed to start" in deployment.message:
            reason = (
                read_start_error(deployment.message) or "its process ended; its log, and the controller's, say more"
            )
            is_final = deployment.status.value == "DEPLOY_FAILED"
            outlook = "it is not tried again until the next deploy" if is_final else "it is tried again"
            return ModelNotLoadedError(f"the model cannot be loaded, and {outlook}: {reason}", is_final=is_final)
        if why := why_not_placed(app_name, deployment_name):
            return ReplicaNotPlacedError(why)
    except (RayError, RayServeException) as error:  # the controller starts anew
        return NoReplicaError(
            f"no engine replica is ready, and Serve's controller does not answer ({type(error).__name__})"
        )
    return NoReplicaError("no engine replica is ready yet; one is starting")
