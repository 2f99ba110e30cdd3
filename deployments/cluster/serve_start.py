"""Serve's own processes, started as a config file wants them, and the list of the metrics' ports."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import gRPCOptions
from ray.serve.schema import ServeDeploySchema


def start_serve(config: Mapping[str, Any]) -> None:
    """Start Serve's controller and HTTP proxies in the Ray of this process, with the `logging_config` of the file.

    `serve run` and `serve deploy` give that to the replicas only: a proxy that they start logs a line for each request,
    whatever `enable_access_log` says. Deploys nothing. config: the content of a Serve config file, checked.
    """
    schema = ServeDeploySchema.model_validate(config)
    serve.start(
        proxy_location=schema.proxy_location,
        http_options=schema.http_options.model_dump(),
        grpc_options=gRPCOptions(**schema.grpc_options.model_dump()),
        logging_config=schema.logging_config,
        controller_options=schema.controller_options,
    )


def list_metrics_ports() -> Path:
    """Write the file in which Prometheus finds the metrics of this process's Ray, and return its path.

    It is in the folder of Ray's session, by the name that Ray's dashboard gives it, and complete at any time. A Ray with a
    dashboard needs no other.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    ports = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]
    path = Path(nodes[0]["ObjectStoreSocketName"]).parents[1] / "prom_metrics_service_discovery.json"
    made = path.with_suffix(".new")
    made.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": ports}]))
    os.replace(made, path)
    return path
