"""Why no engine replica answers: what Serve and Ray know of a deployment without one, as an error.

Starts and changes nothing.
"""

from __future__ import annotations

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from deployments.cluster.placement import why_not_placed
from deployments.cluster.start_failure import read_start_error
from deployments.errors import ModelNotLoadedError, NoReplicaError, ReplicaNotPlacedError, ServerStoppingError


def why_absent(app_name: str, deployment_name: str) -> NoReplicaError:
    """Why the deployment has no replica that runs. Blocking: asks Serve's controller and Ray's control store."""
    try:
        application = serve.status().applications.get(app_name)
        if application is None or application.status in (ApplicationStatus.DELETING, ApplicationStatus.NOT_STARTED):
            return ServerStoppingError("the server is shutting down", is_final=True)
        deployment = application.deployments.get(deployment_name)
        if deployment is not None and "failed to start" in deployment.message:
            reason = read_start_error(deployment.message) or "its process ended; see its log and the controller's"
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
