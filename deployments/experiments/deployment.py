"""The application of a measured cell: from a case to what Serve deploys, and what is done with it there."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState, ServeDeploySchema

from deployments.cluster.start_failure import read_start_error
from deployments.experiment import BATCHINGS, Case, Experiment
from deployments.schema import IMPORT_PATH, AppArgs
from engine.config import EngineConfig
from engine.errors import ConfigError, PensieveError

APP, ENGINE = "experiment", "LLMServer"
LOGGING = {"enable_access_log": False}
# How often Serve is asked what there is, in seconds.
LOOK_S = 0.5
# Of Serve's calls, in seconds.
CALL_TIMEOUT_S = 30.0
TAKE_DOWN_TIMEOUT_S = 300.0
# A difference that Serve sees and no client does, in seconds.
DEFAULT_INTERVAL_S: float = AppArgs.model_fields["stream_interval_s"].default
ROLL_INTERVAL_S = 1e-6
# Routings of a case that a cluster can do: our router's, or Serve's own without affinity.
MEASURED_ROUTINGS = {
    "price_of_moving": "affinity",
    "price_of_moving_of_two": "affinity",
    "power_of_two": "power_of_two",
}


class DeploymentFailedError(PensieveError):
    """A cell's application does not come up."""


@dataclass(frozen=True, slots=True)
class ReplicaSeen:
    """An engine replica as Serve's controller knows it."""

    replica_id: str
    actor_name: str
    state: str


def check_measurable(experiment: Experiment) -> None:
    """Raises ConfigError if a cluster cannot do what a case asks."""
    for case in experiment.cases:
        if case.routing not in MEASURED_ROUTINGS:
            raise ConfigError(
                f"routing {case.routing} is a baseline of the simulator; on a cluster there are "
                f"{', '.join(MEASURED_ROUTINGS)}",
                param="routing",
            )
        if (case.routing == "price_of_moving_of_two") != (experiment.cluster.api == "responses-stored"):
            raise ConfigError(
                "routing price_of_moving_of_two is for conversations that the server stores: it goes with "
                "`api: responses-stored` under cluster, and that with no other",
                param="routing",
            )
        if experiment.cluster.autoscaling_config is not None and any(
            change.what in ("add", "drain") for change in case.changes
        ):
            raise ConfigError(
                "with an autoscaling_config Serve says how many replicas there are: leave add and drain out of the changes",
                param="changes",
            )
        if case.batching != BATCHINGS[0]:
            raise ConfigError(
                f"batching {case.batching} exists in the simulator only: engines have prompts and decodes in one batch; run "
                "this file with --simulate",
                param="batching",
            )
        if varied := {name for name, _ in case.axes} & {"device", "model_shape"}:
            raise ConfigError(
                f"{sorted(varied)[0]} has several values, but a cluster has its own; run this file with --simulate",
                param=sorted(varied)[0],
            )
        serve_config_of(experiment, case)


def serve_config_of(experiment: Experiment, case: Case) -> dict[str, Any]:
    """What `serve deploy` takes: the file that the experiment names, if any, with what the case says. Raises ConfigError."""
    base = copy.deepcopy(experiment.serve or {})
    own: dict[str, Any] = next(
        (each for each in base.get("applications", ()) if each["import_path"] == IMPORT_PATH), {}
    )
    args = {**(own.get("args") or {}), **experiment.cluster.args}
    args.pop("num_replicas", None)
    args |= {
        "engine": _engine_options(case.engine, experiment.folder),
        "num_fallback_replicas": case.num_fallback_replicas,
        "routing": MEASURED_ROUTINGS[case.routing],
    }
    if case.num_ingresses > 1:
        args["num_ingress_replicas"] = case.num_ingresses
    try:
        AppArgs.model_validate(args)
    except ValueError as error:
        raise ConfigError(f"args of cluster: {error}", param="args") from None
    deployments = [each for each in own.get("deployments") or () if each["name"] != ENGINE]
    scale: dict[str, Any] = {"num_replicas": case.num_replicas}
    if experiment.cluster.autoscaling_config is not None:
        scale = {"autoscaling_config": {**experiment.cluster.autoscaling_config, "initial_replicas": case.num_replicas}}
        if unknown := scale["autoscaling_config"].keys() - AutoscalingConfig.model_fields.keys():
            raise ConfigError(
                f"autoscaling_config of cluster: unknown key {sorted(unknown)[0]}; known are "
                f"{', '.join(AutoscalingConfig.model_fields)}",
                param="autoscaling_config",
            )
        try:
            AutoscalingConfig.model_validate(scale["autoscaling_config"])
        except ValueError as error:
            raise ConfigError(f"autoscaling_config of cluster: {error}", param="autoscaling_config") from None
    application = {
        "name": APP,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        **{name: value for name, value in own.items() if name == "runtime_env"},
        "args": args,
        "deployments": [{"name": ENGINE, **scale}, *deployments],
    }
    return {"logging_config": LOGGING, "applications": [application]}


def serving_options(experiment: Experiment) -> dict[str, Any]:
    """How Serve is started for it: the file's own options, if it names one, and no application."""
    base = experiment.serve or {}
    return {
        "proxy_location": base.get("proxy_location", "EveryNode"),
        "http_options": {"host": "127.0.0.1", **base.get("http_options", {}), "port": experiment.cluster.port},
        "logging_config": LOGGING,
        "applications": [],
    }


def _engine_options(config: EngineConfig, folder: Path) -> dict[str, Any]:
    """Those that are not at their defaults. A model beside the experiment's file is found from wherever a replica runs."""
    defaults = EngineConfig()
    options = {
        each.name: value
        for each in fields(config)
        if (value := getattr(config, each.name)) != getattr(defaults, each.name)
    }
    if (folder / config.model).exists():
        options["model"] = str((folder / config.model).resolve())
    return options


class Deployment:
    """The application of one cell on the cluster of this process."""

    def __init__(self, config: Mapping[str, Any], loop: asyncio.AbstractEventLoop) -> None:
        """Deploys nothing yet. loop: see handle_loop."""
        self._config = copy.deepcopy(dict(config))
        self._loop = loop
        self._handle: DeploymentHandle | None = None
        self._args = self._config["applications"][0]["args"]
        self._engine = self._config["applications"][0]["deployments"][0]

    def start(self, timeout_s: float) -> None:
        """Returns when all replicas run. Raises DeploymentFailedError."""
        self._deploy()
        scale = self._engine.get("autoscaling_config") or {"initial_replicas": self._engine["num_replicas"]}
        num_replicas = scale["initial_replicas"]
        deadline_s = time.monotonic() + timeout_s
        while True:
            status, message = _status()
            if status == "RUNNING" and len(self.running) == num_replicas:
                return
            if status == "DEPLOY_FAILED":
                raise DeploymentFailedError(f"the application does not come up: {message[-1000:]}")
            if time.monotonic() > deadline_s:
                raise DeploymentFailedError(
                    f"not ready within {timeout_s:g} s (ready_timeout_s): {len(self.running)} of "
                    f"{num_replicas} replicas run, the application is {status} {message[-1000:]}"
                )
            time.sleep(LOOK_S)

    def scale(self, change: int) -> None:
        """So many replicas more, or fewer; does not wait."""
        self._engine["num_replicas"] = max(1, self._engine["num_replicas"] + change)
        self._deploy()

    def roll(self) -> None:
        """Replace every replica, as after any change of `args`, by one that changes nothing else; does not wait."""
        self._args["stream_interval_s"] = self._args.get("stream_interval_s", DEFAULT_INTERVAL_S) + ROLL_INTERVAL_S
        self._deploy()

    def kill(self, rank: int) -> str:
        """End the replica of that rank at once, as if its machine were lost; Serve starts another one. Returns its id."""
        for each in self.statistics():
            if each["replica_rank"] == rank:
                seen = next(replica for replica in self.seen() if replica.replica_id == each["replica_id"])
                ray.kill(ray.get_actor(seen.actor_name, namespace="serve"), no_restart=True)
                return seen.replica_id
        raise DeploymentFailedError(f"there is no replica of rank {rank} to lose")

    @property
    def running(self) -> list[ReplicaSeen]:
        return [each for each in self.seen() if each.state == ReplicaState.RUNNING]

    def seen(self) -> list[ReplicaSeen]:
        """The engine replicas that there are, in whatever state: all of them take a place."""
        application = _client().get_serve_details()["applications"].get(APP)
        if application is None or ENGINE not in application["deployments"]:
            return []
        replicas = application["deployments"][ENGINE]["replicas"]
        return [ReplicaSeen(each["replica_id"], each["actor_name"], each["state"]) for each in replicas]

    def statistics(self) -> list[dict[str, Any]]:
        """Of the engines that answer."""
        return asyncio.run_coroutine_threadsafe(self._ask_statistics(), self._loop).result()

    async def _ask_statistics(self) -> list[dict[str, Any]]:
        if self._handle is None:
            self._handle = serve.get_deployment_handle(ENGINE, APP)
        try:
            answers = await self._handle.broadcast("get_statistics").results_async(
                timeout_s=CALL_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, RayError, RayServeException):
            return []
        return [answer for answer in answers if isinstance(answer, dict)]

    def take_down(self) -> None:
        """Returns when nothing is left of it."""
        serve.delete(APP, _blocking=True)
        deadline_s = time.monotonic() + TAKE_DOWN_TIMEOUT_S
        while _actors() and time.monotonic() < deadline_s:
            time.sleep(LOOK_S)

    def _deploy(self) -> None:
        _client().deploy_apps(ServeDeploySchema.model_validate(copy.deepcopy(self._config)), _blocking=False)


@contextmanager
def handle_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread, for Serve's handles: as pensieve-serve sets Serve up, they work in one only."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="handles", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def check_free() -> None:
    """Raises ConfigError if the cluster serves something else, which a deploy would replace."""
    others = [name for name in serve.status().applications if name != APP]
    if others:
        raise ConfigError(
            f"the cluster serves {', '.join(others)}, which an experiment would replace; name a cluster of its own, or "
            "--local-nodes",
            param="address",
        )


def _client() -> Any:
    client = _get_global_client()
    assert client is not None
    return client


def _status() -> tuple[str, str]:
    application = serve.status().applications.get(APP)
    if application is None:
        return "NOT_STARTED", ""
    told = [str(each.message) for each in application.deployments.values()]
    reasons = [reason for text in told if (reason := read_start_error(text)) is not None]
    return str(application.status.value), "; ".join(reasons or [str(application.message), *filter(None, told)])


def _actors() -> Sequence[str]:
    names = (actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True))
    return [name for name in names if name.startswith(f"SERVE_REPLICA::{APP}#")]
