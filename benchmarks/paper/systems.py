"""The systems that the paper compares, and one simulated run of one of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from benchmarks.paper import constants
from benchmarks.paper.published import Panel
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.simulator.cluster import Cluster
from engine.simulator.devices import MODELS, Device, find_device
from engine.simulator.outcome import Summary
from engine.simulator.routing import LeastLoaded
from engine.simulator.simulator import Simulator
from engine.simulator.step_cost import Roofline, SeparateBatches
from engine.workloads.arrivals import Poisson, arrange
from engine.workloads.distributions import Exponential, Lognormal
from engine.workloads.synthetic import Synthetic, draw_sessions, sharegpt, ultrachat

WORKLOADS = {"sharegpt": sharegpt, "ultrachat": ultrachat}
# What may differ from the constants of 10a.
KV_SHARE, INTERCONNECT, TURNS, LENGTHS = "kv_share", "interconnect", "turns", "lengths"


@dataclass(frozen=True, slots=True)
class System:
    """How one of them serves.

    keep: whether KV outlives its request; has_cpu_tier: and in host memory, too. is_unified: prompts and decodes are in one
    batch. reserve: share of GPU blocks that are free when a request is admitted. is_native: no Python runs between steps.
    """

    keep: bool = True
    has_cpu_tier: bool = True
    is_unified: bool = True
    reserve: float = constants.RESERVE
    is_native: bool = False
    eviction_policy: str = "retention_value"


SYSTEMS = {
    "vllm-0.2.0": System(keep=False, is_unified=False, reserve=constants.VLLM_RESERVE),
    "tensorrt-llm-0.12": System(keep=False, is_native=True),
    "pensieve-gpu-only": System(has_cpu_tier=False),
    "pensieve": System(),
    "pensieve-separate": System(is_unified=False),
    "pensieve-lru": System(eviction_policy="lru"),
    "pensieve-trailing-lru": System(eviction_policy="trailing_lru"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run is of; its figures follow from this and from constants.py alone.

    changed: of KV_SHARE, INTERCONNECT, TURNS, LENGTHS: what is not as in 10a. rate: of requests offered, in turns a second.
    host_share: of the paper's host memory.
    """

    panel: Panel
    system: str
    rate: float
    changed: tuple[str, ...] = ()
    chunk_size: int = constants.CHUNK_SIZE
    think_s: float = constants.THINK_S
    host_share: float = 1.0
    seed: int = 0
    duration_s: float = constants.DURATION_S
    warm_up_s: float = constants.WARM_UP_S

    @property
    def key(self) -> str:
        """Another one if anything is simulated otherwise; `changed` alone may change nothing."""
        inputs = (
            replace(self, changed=()),
            self.device,
            self.workload,
            SYSTEMS[self.system],
            constants.GPU_BYTES,
            constants.HOST_BYTES,
        )
        return hashlib.sha256(repr(inputs).encode()).hexdigest()[:12]

    @property
    def device(self) -> Device:
        device = replace(find_device(constants.DEVICE), num_devices=self.panel.num_gpus)
        system = SYSTEMS[self.system]
        if system.is_native:
            device = replace(device, step_overhead_s=constants.NATIVE_OVERHEAD_S)
        else:
            overheads = (constants.STEP_OVERHEAD_S, constants.DECODE_OVERHEAD_S)
            device = replace(device, step_overhead_s=overheads[0], decode_overhead_s=overheads[1])
            if KV_SHARE in self.changed:
                share = constants.KV_SHARE[self.panel.model]
                device = replace(device, kv_efficiency=device.kv_efficiency * share)
        if INTERCONNECT in self.changed:
            device = replace(device, interconnect_bytes_per_s=constants.INTERCONNECT_BYTES_PER_S)
        return device

    @property
    def workload(self) -> Synthetic:
        """An endless one: the means of the data set, and the spreads of constants.py."""
        spec = WORKLOADS[self.panel.dataset](10**7)
        turn_sigma, length_sigma = constants.TURN_SIGMA, constants.LENGTH_SIGMA
        if self.panel.dataset == "ultrachat":
            turn_sigma = constants.ULTRACHAT_TURN_SIGMA if TURNS in self.changed else turn_sigma
            length_sigma = constants.ULTRACHAT_LENGTH_SIGMA if LENGTHS in self.changed else length_sigma
        return replace(
            spec,
            turns=_spread(spec.turns, turn_sigma),
            new_tokens=_spread(spec.new_tokens, length_sigma),
            output_tokens=_spread(spec.output_tokens, length_sigma),
            think_s=Exponential(self.think_s),
            max_context_len=constants.WINDOW,
        )

    def simulate(self) -> Summary:
        shape, device, system = MODELS[self.panel.model], self.device, SYSTEMS[self.system]
        bytes_per_block = shape.kv_bytes_per_token * self.chunk_size
        roofline = Roofline(shape, device, bytes_per_block)
        cost = roofline if system.is_unified else SeparateBatches(roofline)
        host_bytes = self.host_share * constants.HOST_BYTES if system.has_cpu_tier else 0.0
        cache_config = CacheConfig(
            chunk_size=self.chunk_size,
            num_gpu_blocks=int(self.panel.num_gpus * constants.GPU_BYTES / bytes_per_block),
            num_cpu_blocks=int(self.panel.num_gpus * host_bytes / bytes_per_block),
            keep=system.keep,
            swap_out_watermark=constants.WATERMARK,
            eviction_policy=system.eviction_policy,
            cost_model=cost.cost_model(self.chunk_size),
        )
        scheduling = SchedulingConfig(
            max_model_len=constants.WINDOW,
            max_num_seqs=constants.MAX_NUM_SEQS,
            max_num_batched_tokens=constants.MAX_NUM_BATCHED_TOKENS,
            max_num_queued_reqs=1_000_000,
            decode_reserve=system.reserve,
        )
        spec = self.workload
        sessions = arrange(draw_sessions(spec, self.seed), Poisson(self.rate / mean_turns(spec)), self.seed)
        cluster = Cluster(make_core=lambda: EngineCore(cache_config, scheduling), cost=cost, router=LeastLoaded())
        return Simulator(cluster, sessions).run(self.duration_s).summary(self.warm_up_s)


@cache
def mean_turns(spec: Synthetic, num_drawn: int = 4000) -> float:
    """Of sessions as they are drawn: rounding and the window change the mean a little."""
    sample = replace(spec, num_sessions=num_drawn)
    return float(np.mean([len(session.turns) for session in draw_sessions(sample, seed=12345)]))


def _spread(distribution: object, sigma: float) -> Lognormal:
    assert isinstance(distribution, Lognormal)
    return Lognormal(distribution.mean, sigma)
