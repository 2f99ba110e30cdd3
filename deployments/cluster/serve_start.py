"""Serve's own processes, started as a config file wants them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
