"""What `pensieve-serve` reads of its config file before anything starts: mistakes, our applications, their URLs.

Ray's schema and pydantic are imported in the functions, so that `--help` is quick.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.cluster.ray_settings import names_cluster
from engine.errors import ConfigError

if TYPE_CHECKING:
    from deployments.llm_configs import OpenAIAppArgs
    from deployments.schema import AppArgs

# Memory that is taken before any model: by the processes of Ray and Serve and the ingress together; by an engine replica.
RAY_GIB = 0.75
REPLICA_GIB = 0.3


def find_problems(path: str, fast_path: bool) -> Iterator[str]:
    """What is wrong with the file, the environment and the port, one line each. Starts nothing."""
    from deployments.schema import check_serve_config, read_serve_config
    from deployments.tenants import API_KEY_VARIABLE

    is_cluster = names_cluster(os.environ)
    try:
        problems = check_serve_config(path)
        yield from problems
        if not problems:
            config = read_serve_config(path)
            if fast_path:
                yield from _open_applications(config)
            if not is_cluster:
                yield from _port_problems(config)
                yield from _memory_problems(config)
    except ConfigError as error:
        yield error.message
    if is_cluster and API_KEY_VARIABLE in os.environ:
        yield (
            f"{API_KEY_VARIABLE} has no effect here, only on the nodes of the cluster that RAY_ADDRESS names, where without "
            "keys every local program is served: put the keys into args.tenants_file"
        )
    token_path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if token_path and not os.environ.get("RAY_AUTH_TOKEN"):
        try:
            if not Path(token_path).read_text().strip():
                yield f"RAY_AUTH_TOKEN_PATH: {token_path} is empty; see docs/security.md for how to make a token"
        except (OSError, UnicodeDecodeError) as error:
            yield f"RAY_AUTH_TOKEN_PATH: {token_path} cannot be read ({error}); see docs/security.md for how to make a token"


def _open_applications(config: dict[str, Any]) -> Iterator[str]:
    """Applications without API keys: behind HAProxy every client looks local, so they would reject all requests."""
    from deployments.schema import OWN
    from deployments.tenants import API_KEY_VARIABLE, load_tenants

    for index, application in enumerate(config["applications"]):
        if application["import_path"] in OWN:
            path = (application.get("args") or {}).get("tenants_file")
            if not load_tenants(path, os.environ):
                yield (
                    f"applications[{index}]: --fast-path needs API keys, because HAProxy hides the client's address: set "
                    f"args.tenants_file or {API_KEY_VARIABLE}"
                )


def _port_problems(config: dict[str, Any]) -> Iterator[str]:
    """Why Serve could not listen on the configured port; Serve itself would notice only after Ray has started."""
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(config)
    if schema.proxy_location == "Disabled":
        return
    host, port = schema.http_options.host, schema.http_options.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as listener:
            # Connections that have just ended are not in the way.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        yield (
            f"http_options: cannot listen on {host}:{port} ({error.strerror or error}); stop what listens there (`ss -ltnp` "
            "tells), or choose another host or port"
        )


def _memory_problems(config: dict[str, Any]) -> Iterator[str]:
    """Why memory cannot hold the processes and one replica's tiers; the model comes on top."""
    from deployments.schema import own_args
    from engine.host_memory import GIB, host_memory

    needed_gib = RAY_GIB
    for application in config["applications"]:
        args = own_args(application)
        for model in {} if args is None else args.models.values():
            engine = model.engine_config
            needed_gib += REPLICA_GIB
            if engine.num_gpu_blocks is None and engine.gpu_memory_gib is not None and not model.num_gpus:
                needed_gib += engine.gpu_memory_gib
            if engine.num_cpu_blocks is None and engine.mode == "pensieve":
                needed_gib += engine.kv_offloading_size
    memory = host_memory()
    if memory is not None and needed_gib * GIB > memory.total:
        yield (
            f"too little memory: the processes and one replica's cache take {needed_gib:.1f} GiB, the model comes on top, "
            f"and this process can use {memory}; lower gpu_memory_gib or kv_offloading_size, or use `pensieve chat`"
        )


def own_applications(config: str) -> Iterator[tuple[dict[str, Any], AppArgs | OpenAIAppArgs]]:
    """The applications of a checked file that are ours, with their arguments."""
    from deployments.schema import own_args, read_serve_config

    for application in read_serve_config(config)["applications"]:
        args = own_args(application)
        if args is not None:
            yield application, args


def urls(config: str) -> list[str]:
    """Where this machine reaches our applications; each ends with a slash."""
    from ray.serve.schema import ServeDeploySchema

    from deployments.schema import read_serve_config

    schema = ServeDeploySchema.model_validate(read_serve_config(config))
    if schema.proxy_location == "Disabled":
        return []
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(schema.http_options.host, schema.http_options.host)
    host = f"[{host}]" if ":" in host else host
    prefixes = [(application.get("route_prefix") or "/").rstrip("/") for application, _ in own_applications(config)]
    return [f"http://{host}:{schema.http_options.port}{prefix}/" for prefix in prefixes]
