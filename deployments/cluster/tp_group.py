"""A tensor-parallel group on Ray.

Rank 0 is the engine in the replica, in bundle 0 of its placement group; ranks 1 to n-1 are actors in the other bundles.
Nothing here knows a plan.

    placement group   bundle 0: replica (LLMServer, rank 0)   bundle 1: TensorParallelWorker, rank 1   ...
    replica ends   -> Ray ends its workers, Serve gives the placement group back
    worker is lost -> the group is broken, and the replica ends: its requests go on elsewhere (engine_client.py)
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.engine_log import log_engine_with_serve
from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError, EngineStoppedError

if TYPE_CHECKING:
    from engine.executor.group import GroupExecutor
    from engine.executor.worker import GroupMember

# Serve writes this logger to the replica's own file.
logger = logging.getLogger("ray.serve")

GIB = 1 << 30
# How long a replica whose group is broken may take to tidy up before it ends.
TIDY_UP_S = 2.0


class TensorParallelWorker:
    """The actor of one rank. label: how Ray names it in the logs. log_level: the replica's."""

    def __init__(self, label: str, log_level: int) -> None:
        self._label = label
        log_engine_with_serve(log_level)

    def __repr__(self) -> str:
        return self._label

    def run(self, config: EngineConfig, member: GroupMember) -> None:
        """Until rank 0 says stop."""
        from engine.executor.worker import run_worker

        run_worker(config, member)


class RayWorkers:
    """Starts ranks 1 to n-1 in the bundles of this process's placement group; the engine's WorkerStarter.

    name: the replica's, after which its workers are called.
    """

    def __init__(self, name: str, size: int) -> None:
        group = ray.util.get_current_placement_group()
        num_bundles = 0 if group is None else group.bundle_count
        if group is None or num_bundles < size:
            raise ConfigError(
                f"tensor_parallel_size is {size}, but the replica has a placement group of {num_bundles} bundles; do not "
                "set placement_group_bundles, deployments.app:build does",
                param="tensor_parallel_size",
            )
        self._name = name
        self._group: PlacementGroup = group
        self.node_ids: dict[int, str] = ray.util.placement_group_table(group)["bundles_to_node_id"]
        is_on_one_node = len({self.node_ids[rank] for rank in range(size)}) == 1
        self.host = None if is_on_one_node else ray.util.get_node_ip_address()
        self._workers: list[Any] = []
        self._runs: list[Any] = []

    def start(self, config: EngineConfig, members: Sequence[GroupMember]) -> None:
        for member in members:
            bundle = dict(self._group.bundle_specs[member.rank])
            label = f"{self._name}#rank{member.rank}"
            worker = (
                ray.remote(TensorParallelWorker)
                .options(
                    name=f"TENSOR_PARALLEL_WORKER::{label}",
                    num_cpus=bundle.pop("CPU", 0),
                    num_gpus=bundle.pop("GPU", 0),
                    resources=bundle,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, member.rank),
                )
                .remote(label, logger.getEffectiveLevel())
            )
            self._workers.append(worker)
            self._runs.append(worker.run.remote(config, member))

    def check(self) -> None:
        ended, _ = ray.wait(self._runs, timeout=0)
        if ended:
            rank = 1 + self._runs.index(ended[0])
            try:
                ray.get(ended[0])
            except RayError as error:
                raise EngineError(f"the worker of rank {rank} ended at its start: {error}") from error
            raise EngineError(f"the worker of rank {rank} ended at its start; see its log")

    def shutdown(self) -> None:
        for worker in self._workers:
            ray.kill(worker)


def start_group(config: EngineConfig) -> GroupExecutor:
    """The executor of a replica whose model is sharded; blocks until all ranks have loaded.

    When the group breaks later, this process ends, and Serve replaces the replica as a whole.
    """
    from engine.executor.group import GroupExecutor

    replica = serve.get_replica_context().replica_id
    name = f"{replica.deployment_id.app_name}#{replica.deployment_id.name}#{replica.unique_id}"
    workers = RayWorkers(name, config.tensor_parallel_size)
    executor = GroupExecutor(config, workers)
    for placement in executor.placements:
        logger.info(
            "rank %d of %d: bundle %d on node %s (%s), process %d, %s; weights %.2f GiB, GPU tier %.2f, CPU tier %.2f GiB",
            placement.rank,
            config.tensor_parallel_size,
            placement.rank,
            workers.node_ids[placement.rank],
            placement.host,
            placement.pid,
            placement.device,
            placement.num_weight_bytes / GIB,
            placement.num_gpu_tier_bytes / GIB,
            placement.num_cpu_tier_bytes / GIB,
        )

    def on_broken(broken: Future[EngineStoppedError]) -> None:
        if not broken.cancelled():  # as it is by a regular shutdown
            threading.Thread(target=_end_replica, args=(executor, broken.result()), daemon=True).start()

    executor.broken.add_done_callback(on_broken)
    return executor


def _end_replica(executor: GroupExecutor, why: EngineStoppedError) -> None:
    """Ends this process now, without waiting for failed health checks.

    As long as it lives, Serve keeps the placement group, and there may be no room for a second one.
    """
    logger.error("%s; this replica ends", why)
    tidying = threading.Thread(target=executor.shutdown, daemon=True)
    tidying.start()
    tidying.join(TIDY_UP_S)
    os._exit(1)
