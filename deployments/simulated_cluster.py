"""From a case to what the simulator takes: the core's configs from the engine's options, and the router that serves."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from deployments.experiment import Case
from deployments.simulated_routing import Affinity, PriceOfMoving
from engine.core.config import CPU_PREFILL_BATCH_TOKENS, CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.tier_table import TierSpec, peer_tier
from engine.errors import ConfigError
from engine.own_policy import load_policy
from engine.simulator.cluster import Cluster, LinkSpec
from engine.simulator.devices import DEVICES, GIB, MODELS
from engine.simulator.distserve import DistServe
from engine.simulator.network import NetworkSpec
from engine.simulator.routing import LeastLoaded, PowerOfTwo, Router
from engine.simulator.step_cost import Roofline, SeparateBatches, StepCost
from engine.simulator.step_table import StepTable
from engine.workloads.arrivals import ClosedLoop, Poisson, Ramp, arrange, parse_arrivals
from engine.workloads.session import Session
from engine.workloads.sources import load_workload, parse_options

# What a device keeps for activations and graphs, in bytes.
ACTIVATIONS_BYTES = 3 * GIB
# Instead of a file of steps: step times that were measured by others.
DISTSERVE = "distserve"
# As the disk tier says of itself.
DISK_MAX_WAIT_S, DISK_REWRITE_S = 10.0, 3600.0
# Sessions are drawn, for arrivals at a rate, until this many times as many as are expected to start.
MARGIN = 1.2


def make_cluster(case: Case, seed: int) -> Cluster:
    """Raises ConfigError if a tier would have no block."""
    if any(change.what == "roll" for change in case.changes):
        raise ConfigError(
            "a rolling update is done by Serve, and is measured only; leave --simulate out", param="changes"
        )
    engine = case.engine
    if engine.kv_cold_dtype != "same":
        raise ConfigError("cold tiers in fewer bits are not simulated; use kv_cold_dtype 'same'", param="kv_cold_dtype")
    cost, bytes_per_block = make_cost(case)
    num_gpu_blocks = engine.num_gpu_blocks or int(_gpu_tier_bytes(case) / bytes_per_block)
    if num_gpu_blocks < 1:
        raise ConfigError(
            "the device has no room for a GPU tier beside the weights; set gpu_memory_gib or num_gpu_blocks, or a higher "
            "tensor_parallel_size",
            param="gpu_memory_gib",
        )
    num_cpu_blocks = engine.num_cpu_blocks
    if num_cpu_blocks is None:
        num_cpu_blocks = int(engine.kv_offloading_size * GIB / bytes_per_block)
    slow, links = [], []
    if engine.kv_disk_path is not None and num_cpu_blocks and engine.mode == "pensieve":
        num_blocks = int(engine.kv_disk_size * GIB / bytes_per_block)
        spec = TierSpec(
            name="disk",
            num_blocks=num_blocks,
            is_fast=False,
            max_wait_s=DISK_MAX_WAIT_S,
            stores_first_use=False,
            rewrite_s=DISK_REWRITE_S,
        )
        slow.append(spec)
        links.append(("disk", LinkSpec(case.disk["read"], case.disk["write"], case.disk.get("latency_s", 0.0))))
    network = make_network(case) if num_cpu_blocks else None
    if network is not None:
        slow.append(peer_tier(num_cpu_blocks))
    cache = CacheConfig.of(
        engine,
        num_gpu_blocks=num_gpu_blocks,
        num_cpu_blocks=num_cpu_blocks,
        keep=engine.mode == "pensieve",
        cost_model=cost.cost_model(engine.chunk_size),
        own_policy=load_policy(engine.eviction_policy),
        slow_tiers=tuple(slow),
    )
    if engine.speculative is not None:
        raise ConfigError(
            "which guesses come true is not simulated; leave `speculative` out of the simulated engine",
            param="speculative",
        )
    window = num_gpu_blocks * engine.chunk_size
    is_on_cpu = isinstance(cost, StepTable) and not cost.overlaps_copies
    scheduling = SchedulingConfig.of(
        engine,
        max_model_len=min(engine.max_model_len or window, window),
        prefill_batch_tokens=engine.prefill_batch_tokens or (CPU_PREFILL_BATCH_TOKENS if is_on_cpu else None),
    )
    return Cluster(
        make_core=partial(EngineCore, cache, scheduling),
        cost=SeparateBatches(cost) if case.batching == "separate" else cost,
        router=make_router(case, seed),
        num_replicas=case.num_replicas,
        bytes_per_block=bytes_per_block,
        links=tuple(links),
        network=network,
        kv_hints=engine.kv_hints,
        drain_s=case.drain_s,
        num_ingresses=case.num_ingresses,
        changes=case.changes,
    )


def make_cost(case: Case) -> tuple[StepCost, float]:
    """The cost of steps, and bytes of a block. Raises ConfigError."""
    shape, device, chunk_size = case.model_shape, case.device, case.engine.chunk_size
    bytes_per_block = shape.kv_bytes_per_token * chunk_size
    if case.steps is None:
        return Roofline(shape, device, bytes_per_block), bytes_per_block
    if case.steps == DISTSERVE:
        if (shape, device) != (MODELS["opt-13b"], DEVICES["a100-80gb"]):
            raise ConfigError(
                "DistServe's step times are those of opt-13b on one a100-80gb; simulate these, or leave `steps` out",
                param="steps",
            )
        return DistServe(bytes_per_block), bytes_per_block
    table = StepTable.load(Path(case.steps)).with_chunks_of(chunk_size)
    return table, table.bytes_per_block


def make_network(case: Case) -> NetworkSpec | None:
    """Between replicas that hand over; None = they do not, or there is never another one."""
    if not case.engine.may_hand_over or (case.num_replicas == 1 and not case.changes):
        return None
    rate = case.engine.kv_transfer_rate
    return NetworkSpec(**case.network, rate_bytes_per_s=rate * 1e6 if rate else None)


def make_router(case: Case, seed: int) -> Router:
    """By its name in ROUTERS."""
    if case.routing == "least_loaded":
        return LeastLoaded()
    if case.routing == "power_of_two":
        return PowerOfTwo(seed)
    kind = PriceOfMoving if case.routing.startswith("price_of_moving") else Affinity
    return kind(case.num_fallback_replicas, of_two=case.routing.endswith("_of_two"))


def make_sessions(case: Case, seed: int) -> tuple[Iterable[Session], int | None]:
    """The workload in order of start times; and how many sessions are under way at any time, if that is fixed.

    Raises WorkloadError.
    """
    arrivals = parse_arrivals(case.arrivals)
    factor = case.num_replicas if case.arrivals_per_replica else 1
    options = {"seed": seed, **case.workload_options}
    if isinstance(arrivals, Poisson):
        arrivals = Poisson(arrivals.sessions_per_s * factor)
        options.setdefault("num_sessions", max(1, int(arrivals.sessions_per_s * case.duration_s * MARGIN) + 10))
    elif isinstance(arrivals, Ramp):
        arrivals = arrivals.times(factor)
        options.setdefault("num_sessions", max(1, int(arrivals.most_per_s * case.duration_s * MARGIN) + 10))
    elif isinstance(arrivals, ClosedLoop):
        arrivals = ClosedLoop(arrivals.num_active * factor)
        options.setdefault("num_sessions", max(1000, 50 * arrivals.num_active))
    sessions = load_workload(case.workload, parse_options(options))
    num_active = arrivals.num_active if isinstance(arrivals, ClosedLoop) else None
    return arrange(sessions, arrivals, seed), num_active


def _gpu_tier_bytes(case: Case) -> float:
    device, engine = case.device, case.engine
    if engine.gpu_memory_gib is not None:
        return engine.gpu_memory_gib * GIB * device.num_devices
    usable = device.memory_bytes * engine.gpu_memory_utilization - ACTIVATIONS_BYTES
    return usable * device.num_devices - case.model_shape.weight_bytes
