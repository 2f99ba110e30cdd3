"""The cluster that is measured: one that runs, or several nodes on this machine.

Such nodes are processes that Ray takes for machines.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deployments.cluster.ray_settings import DEFAULTS, guard
from engine.errors import ConfigError

# What each local node keeps for objects, of which an experiment makes few.
OBJECT_STORE_BYTES = 150 * 2**20


def prepare_environment() -> None:
    """As pensieve-serve has it; before anything of Ray is imported, which reads it then."""
    for name, value in {**DEFAULTS, **guard({**os.environ, "RAY_ADDRESS": "local"})}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_TMPDIR", tempfile.gettempdir())  # the paths of Ray's sockets are long


@contextmanager
def cluster_at(address: str | None, serving: Mapping[str, Any]) -> Iterator[None]:
    """The cluster at an address, or Ray's usual one; Serve is started there if it does not run. Raises ConfigError."""
    import ray

    from deployments.cluster.serve_start import start_serve

    try:
        ray.init(address or "auto", namespace="serve", log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise ConfigError(
            f"there is no Ray cluster at {address or 'RAY_ADDRESS, or on this machine'}; start one, or give --local-nodes 3",
            param="address",
        ) from error
    try:
        start_serve(serving)
        yield
    finally:
        ray.shutdown()


@contextmanager
def local_cluster(num_nodes: int, cpus_per_node: float, serving: Mapping[str, Any]) -> Iterator[None]:
    """So many nodes, which end with this. Call prepare_environment before."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from deployments.cluster.serve_start import start_serve

    node = {"num_cpus": cpus_per_node, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=node)
    try:
        for _ in range(num_nodes - 1):
            nodes.add_node(**node)
        ray.init(nodes.address, namespace="serve", log_to_driver=False, logging_level=logging.WARNING)
        start_serve({**serving, "proxy_location": "HeadOnly"})  # only one proxy of this machine can have the port
        yield
        serve.shutdown()
    finally:
        ray.shutdown()
        nodes.shutdown()
