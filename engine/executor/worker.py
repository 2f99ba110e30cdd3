"""Ranks 1 to n-1 of a tensor-parallel group, each on its shard of the model; they follow rank 0.

`python -m engine.executor.worker` is one such process: it reads (EngineConfig, GroupMember), pickled, from standard
input.
"""

from __future__ import annotations

import logging
import pickle
import signal
import sys
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from engine.config import EngineConfig
from engine.errors import AdapterError
from engine.executor.local import LocalExecutor
from engine.executor.peers.blocks import make_rank_blocks
from engine.executor.plan_channel import AdapterLoaded, AdapterOrder, PlanReceiver, SwapsDone, connect_tiers, failure_of
from engine.executor.process_group import GroupMember, ProcessGroup
from engine.executor.tiers.disk_tier import make_rank_tier
from engine.executor.tiers.group_channel import TierFollower, wants_tier_channel

__all__ = ["GroupMember", "run_worker"]

logger = logging.getLogger(__name__)


def run_worker(config: EngineConfig, member: GroupMember) -> None:
    """Join the group, load this rank's shard, follow plans until rank 0 says stop or is gone; blocking.

    What goes wrong here is reported to rank 0 and raised: the group is broken then.
    """
    receiver = PlanReceiver(member)
    group: ProcessGroup | None = None
    try:
        tiers = connect_tiers(member) if wants_tier_channel(config) else None
        group = ProcessGroup(member, config.device)
        _follow_plans(config, group, receiver, tiers)
    except EOFError:
        logger.warning("rank %d: rank 0 is gone", member.rank)
    except BaseException as error:
        receiver.report(failure_of(error))  # before anything that may wait for other ranks
        raise
    finally:
        if group is not None:
            group.close()
        receiver.close()


def _follow_plans(
    config: EngineConfig, group: ProcessGroup, receiver: PlanReceiver, tiers: Connection[Any, Any] | None
) -> None:
    executor = LocalExecutor(config, group)
    follower = None
    if tiers is not None:
        follower = TierFollower(tiers, partial(make_rank_tier, config, executor), partial(make_rank_blocks, executor))
    try:
        receiver.report(executor.placement)
        while (message := receiver.receive()) is not None:
            if isinstance(message, AdapterOrder):
                _obey(message, executor, receiver)
                continue
            token_ids, plan = message
            executor.note_sampled(token_ids)
            result = executor.execute(plan)
            if config.verify_swaps and plan.swap_ins:
                receiver.report(SwapsDone(result.failed_swap_ins))
            receiver.finish_step(plan.step_id)
            if follower is not None:
                follower.finish_step(plan.step_id)
    finally:
        if follower is not None:
            follower.close()
        executor.shutdown()


def _obey(order: AdapterOrder, executor: LocalExecutor, receiver: PlanReceiver) -> None:
    """Load or unload an adapter. One that cannot be loaded harms no group."""
    if order.identity:
        executor.unload_adapter(order.identity)
        return
    try:
        receiver.report(AdapterLoaded(executor.load_adapter(order.folder)))
    except AdapterError as error:
        receiver.report(AdapterLoaded(error=error))


def main() -> None:
    # Ctrl-C goes to every process of a terminal; rank 0 decides what comes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config, member = pickle.load(sys.stdin.buffer)
    logging.basicConfig(level=logging.WARNING, format=f"%(levelname)s rank {member.rank} %(name)s: %(message)s")
    run_worker(config, member)


if __name__ == "__main__":
    main()
