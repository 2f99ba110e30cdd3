"""What clients say, and what a server learns, in a simulation."""

from __future__ import annotations

import pytest

from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.simulator.cluster import Cluster
from engine.simulator.devices import DEVICES, MODELS
from engine.simulator.routing import LeastLoaded
from engine.simulator.simulator import Simulator
from engine.simulator.step_cost import Roofline
from engine.workloads.session import Session, Span, Turn

CHUNK_SIZE = 200


def sessions() -> list[Session]:
    """Every 4 s a chat of one turn begins, and an agent that calls a tool eight times, for 20 s each."""
    made = []
    for number in range(40):
        chat, agent = 2 * number, 2 * number + 1
        made.append(Session(f"chat {number}", (Turn((Span(chat, 2000),), 20),), start_s=4.0 * number))
        turns = [Turn((Span(agent, 1000, 1000 * step),), 20, 20.0, "tool", "search") for step in range(1, 9)]
        first = Turn((Span(agent, 1000),), 20)
        made.append(Session(f"agent {number}", (first, *turns), start_s=4.0 * number))
    return made


def run(mode: str) -> EngineCore:
    model = MODELS["opt-13b"]
    bytes_per_block = model.kv_bytes_per_token * CHUNK_SIZE
    cost = Roofline(model, DEVICES["a100-80gb"], bytes_per_block)
    cache = CacheConfig(
        chunk_size=CHUNK_SIZE,
        num_gpu_blocks=290,
        num_cpu_blocks=610,
        cost_model=cost.cost_model(CHUNK_SIZE),
        kv_hints=mode,
    )
    scheduling = SchedulingConfig(max_model_len=16_384, max_num_batched_tokens=2048, max_num_queued_reqs=1000)
    core = EngineCore(cache, scheduling)
    cluster = Cluster(
        make_core=lambda: core, cost=cost, router=LeastLoaded(), bytes_per_block=bytes_per_block, kv_hints=mode
    )
    Simulator(cluster, sessions()).run(400.0)
    core.check_integrity()
    return core


@pytest.fixture(scope="module")
def recomputed_without() -> int:
    return run("off").stats.num_dropped_tokens


@pytest.mark.parametrize(("mode", "most"), [("client", 0.25), ("learned", 0.75)])
def test_less_is_computed_again_if_it_is_known_who_comes_back(mode, most, recomputed_without):
    """By clients, who never comes; by the server, that a tool takes 20 s while others come much later, if at all."""
    core = run(mode)
    assert core.stats.num_dropped_tokens < most * recomputed_without
    assert (core.get_statistics()["retention"]["accepted"] > 0) == (mode == "client")
