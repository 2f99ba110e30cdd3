"""A small model on a made-up device, a cluster of one replica of it, and chats: what the tests of trust simulate."""

import random

from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.tier_table import TierSpec
from engine.simulator.cluster import Cluster, LinkSpec
from engine.simulator.devices import Device, ModelShape
from engine.simulator.routing import LeastLoaded
from engine.simulator.step_cost import Roofline
from engine.workloads.session import Session, Span, Turn

CHUNK_SIZE = 16
MODEL = ModelShape(num_parameters=1e9, num_layers=10, num_heads=16, num_kv_heads=16, head_dim=64)
DEVICE = Device(
    flops_per_s=1e14,
    hbm_bytes_per_s=1e12,
    memory_bytes=1e10,
    host_to_device=2e9,
    device_to_host=1e10,
    matmul_efficiency=0.5,
    attention_flops_per_s=1e13,
    hbm_efficiency=0.5,
    kv_efficiency=0.5,
    step_overhead_s=0.001,
)
COST = Roofline(MODEL, DEVICE, MODEL.kv_bytes_per_token * CHUNK_SIZE)


BYTES_PER_BLOCK = MODEL.kv_bytes_per_token * CHUNK_SIZE


def make_cluster(num_gpu_blocks: int = 64, num_cpu_blocks: int = 128, **options) -> Cluster:
    """disk: blocks of a third tier, which loads a block a little faster than it is computed."""
    num_disk_blocks = options.get("disk", 0)
    disk = TierSpec(name="disk", num_blocks=num_disk_blocks, is_fast=False)
    link = LinkSpec(BYTES_PER_BLOCK / 1e-4, BYTES_PER_BLOCK / 2e-4)

    def make_core() -> EngineCore:
        return EngineCore(
            CacheConfig(
                chunk_size=CHUNK_SIZE,
                num_gpu_blocks=num_gpu_blocks,
                num_cpu_blocks=num_cpu_blocks,
                keep=options.get("keep", True),
                cost_model=COST.cost_model(CHUNK_SIZE),
                max_swap_outs=options.get("max_swap_outs", 16),
                slow_tiers=(disk,) if num_disk_blocks else (),
            ),
            SchedulingConfig(
                max_model_len=num_gpu_blocks * CHUNK_SIZE,
                max_num_seqs=options.get("max_num_seqs", 8),
                max_num_batched_tokens=options.get("max_num_batched_tokens", 512),
                max_num_queued_reqs=1_000_000,
            ),
        )

    return Cluster(
        make_core=make_core,
        cost=COST,
        router=LeastLoaded(),
        bytes_per_block=BYTES_PER_BLOCK,
        links=(("disk", link),) if num_disk_blocks else (),
    )


def chats(seed: int, num_sessions: int = 30) -> list[Session]:
    """Some that share a beginning; they overload the GPU tier."""
    rng = random.Random(seed)
    sessions = []
    for number in range(num_sessions):
        prefix = (Span(rng.randrange(3), rng.randint(1, 40)),)
        turns = [
            Turn(
                (*(prefix if index == 0 else ()), Span(100 + number, rng.randint(1, 60), 60 * index)),
                rng.randint(1, 40),
                0.0 if index == 0 else rng.choice([0.0, 0.05, 0.5, 2.0]),
            )
            for index in range(rng.randint(1, 5))
        ]
        sessions.append(Session(f"s{number}", tuple(turns), start_s=number * rng.choice([0.01, 0.1])))
    return sorted(sessions, key=lambda session: session.start_s)


def one_turn(session: str, stream: int, start_s: float, num_new: int, num_output: int) -> Session:
    return Session(session, (Turn((Span(stream, num_new),), num_output),), start_s)
